"""Shared by `distill` and `texture`: the arguments of a run, label maps, and the report of the result."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._shared import count, positive, read_label_map, say, seed, write

if TYPE_CHECKING:
    from ..context.regions import Regions


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the optimiser."""
    run = parser.add_argument_group("distillation")
    run.add_argument("--steps", type=count, metavar="N", help="denoising steps (default: as published)")
    run.add_argument(
        "--iterations",
        type=count,
        metavar="M",
        help="optimiser iterations in each step (default: as published)",
    )
    run.add_argument(
        "--rate", type=positive, metavar="R", help="learning rate of the optimiser (default: as published)"
    )
    run.add_argument(
        "--layers",
        nargs="+",
        metavar="NAME",
        help="self-attention layers: up, names or patterns (default: the last six of the decoder)",
    )
    run.add_argument(
        "--tune-decoder",
        type=count,
        nargs="?",
        const=75,
        default=0,
        metavar="N",
        help="tune the VAE's decoder to the style for N iterations (default N: %(const)s), for sharpness",
    )
    run.add_argument("--seed", type=seed, default=0, help="seed of all noise (default: %(default)s)")


def run_settings(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    settings = {
        "num_inference_steps": options.steps,
        "iterations": options.iterations,
        "learning_rate": options.rate,
    }
    return settings | {
        "layers": options.layers,
        "tune_decoder": options.tune_decoder,
        "generator": torch.Generator().manual_seed(options.seed),
    }


def read_regions(
    mask: Sequence[Path],
    of_style: tuple[int, int],
    of_output: tuple[int, int] | None,
    style_wanted: tuple[int, int] | None,
    output_wanted: tuple[int, int] | None,
) -> "Regions":
    """Read the label maps of a style and of the output, as `read_label_map`."""
    from ..context.regions import Regions

    style, output = (
        read_label_map(mask[0], of_style, style_wanted),
        read_label_map(mask[1], of_output, output_wanted),
    )
    return Regions(appearance=style, structure=output)


def report(result: Any, path: Path) -> int:
    """Write the picture, and print the losses and whether the run was interrupted."""
    write("picture", result.images[0], path)
    if len(result.losses):
        first, last = result.losses[0].tolist(), result.losses[-1].tolist()
        distillation = f"distillation {first[1]:.4g} to {last[1]:.4g}"
        count = f"{len(result.losses)} iterations"
        say(f"loss: {first[0]:.4g} to {last[0]:.4g} in {count}; {distillation}")
    if len(result.decoder_losses):
        first, last = result.decoder_losses[0].item(), result.decoder_losses[-1].item()
        say(f"loss of the decoder: {first:.4g} to {last:.4g} in {len(result.decoder_losses)} iterations")
    if result.interrupted:
        say("interrupted: the picture is the best one so far")
    return 130 if result.interrupted else 0
