"""Attention distillation on held-out scenes of the embedded model, beside key and value injection.

It measures the loss, the colours and the layout.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from qalign_kernels import _command_line
from qalign_kernels._files import Files, replacing

from . import method_report
from .method_report import MethodReport

TIMESTEPS = (1, 201, 401, 601, 801)  # for comparing clean latents with the style
FIGURES = {
    "time_s": "s",
    "colour_error": "colour error",
    "layout_iou": "part IoU",
    "loss_first": "loss, first",
    "loss_last": "last",
    "distillation": "of the picture",
}
INJECTIONS = {"injection": {}, "injection, plain": {"swap_guidance_scale": 1.0}}
DISTILLATIONS: dict[str, dict[str, Any]] = {
    "optimise, as published": {},
    "optimise, rate 0.1, annealed": {"learning_rate": 0.1, "anneal": True},
    "one timestep, no content, annealed": {
        "learning_rate": 0.3,
        "anneal": True,
        "content_weight": 0.0,
        "one": True,
    },
    "sample, rate 0.05, once a step": {
        "mode": "sample",
        "learning_rate": 0.05,
        "iterations": 1,
        "guidance_scale": 1.0,
        "adain": False,
    },
}
METHODS = ("untouched", *INJECTIONS, *DISTILLATIONS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pairs",
        type=_command_line.count,
        default=3,
        help="number of pairs of held-out scenes (default: %(default)s)",
    )
    steps = "denoising steps, or iterations of the descent at one timestep (default: %(default)s)"
    parser.add_argument("--steps", type=_command_line.count, default=100, help=steps)
    parser.add_argument(
        "--seed",
        type=_command_line.seed,
        default=0,
        help="seed of the pairs and of all noise (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        help="write the report there after every method; figures that it already has are not measured again",
    )
    parser.add_argument(
        "--sheet", type=Path, help="draw the pictures, a row for each pair that this run measured completely"
    )


def files(arguments: argparse.Namespace) -> Files:
    return method_report.files(arguments)


def run(arguments: argparse.Namespace) -> int:
    from qalign.embedded.scenes import held_out_pairs, render
    from qalign.evaluation.plots import transfer_grid

    settings = {"steps": arguments.steps, "seed": arguments.seed}
    report, rows = MethodReport.open("pairs", settings, arguments.json), []
    for number, pair in enumerate(held_out_pairs(arguments.pairs, arguments.seed)):
        pictures = {"appearance": render([pair.appearance]).image[0]}
        found = report.methods(number, {"appearance": pair.appearance, "structure": pair.structure})
        for name in METHODS:
            if name not in found:
                found[name], picture = measure(pair, name, **settings)
                pictures[name.replace(", ", "\n", 1)] = picture
                report.save()
        if len(pictures) == 1 + len(METHODS):
            rows.append(pictures)
    if arguments.sheet is not None and rows:
        with replacing(arguments.sheet) as unfinished:
            transfer_grid(rows).savefig(unfinished, format="png", dpi=60, bbox_inches="tight")
    report.save(complete=True)
    print(report.table(METHODS, FIGURES))
    return 0


@torch.no_grad()
def measure(pair: Any, name: str, *, steps: int, seed: int) -> tuple[dict[str, float], torch.Tensor]:
    """Make one picture by one method, and measure it.

    All methods get the same pair, prompt and seed, and `steps` steps or iterations. `distillation` is the
    loss of the finished picture against the appearance, a mean over `TIMESTEPS`. `loss_first` and `loss_last`
    are losses of the run.

    Returns:
        The figures and the picture.
    """
    from qalign import (
        AppearanceTransferPipeline,
        AttentionDistillation,
        AttentionDistillationPipeline,
        CrossImage,
    )
    from qalign.embedded.scenes import render
    from qalign.evaluation.picture_metrics import OBJECT, colour_error, read_layouts
    from qalign.sampling.attention_reader import AttentionReader

    scenes = render([pair.appearance, pair.structure])
    (appearance, structure), (of_appearance, of_structure) = scenes.image, scenes.labels
    prompt = f"a photo of a {scenes.plans[1]}"
    injection = AppearanceTransferPipeline.embedded()
    distillation = AttentionDistillationPipeline.from_pipe(injection)
    for pipe in (injection, distillation):
        pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {
        "output_type": "pt",
        "generator": torch.manual_seed(seed),
        "num_inference_steps": steps,
    }
    figures, begun = {}, time.perf_counter()
    if name == "untouched":
        picture = structure
    elif name in INJECTIONS:
        options |= {"noun": scenes.plans[1], "method": CrossImage(contrast=1.0), **INJECTIONS[name]}
        picture = injection(appearance, structure, prompt, **options).images[0]
    else:
        options |= DISTILLATIONS[name]
        if options.pop("one", False):
            options |= {"num_inference_steps": 1, "iterations": steps}
        method = AttentionDistillation(content_weight=options.pop("content_weight", 0.2))
        result = distillation(appearance, structure, prompt, method=method, **options)
        picture = result.images[0]
        figures = {"loss_first": result.losses[0, 1].item(), "loss_last": result.losses[-1, 1].item()}
    figures["time_s"] = time.perf_counter() - begun

    error = colour_error(picture, of_structure, appearance, of_appearance)[OBJECT].nanmean().item()
    figures |= {
        "colour_error": error,
        "layout_iou": read_layouts(distillation, {"": picture}, scenes, prompt, seed=seed)[""],
    }
    null, latents = (
        distillation.conditions("", *structure.shape[-2:])[0],
        distillation.encode(torch.stack([picture, appearance])),
    )
    with AttentionReader(distillation) as read:
        at = [[read(row[None], torch.tensor(timestep), null) for row in latents] for timestep in TIMESTEPS]
    alone = AttentionDistillation(content_weight=0.0)
    return figures | {
        "distillation": sum(alone.loss(own, style).distillation.item() for own, style in at) / len(at)
    }, picture
