"""Attention distillation on held-out scenes of the embedded model: loss, colours and layout, beside key and value injection."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from qalign.files import replacing

from . import text_table

TIMESTEPS = (1, 201, 401, 601, 801)  # at which clean latents are held against the style, before and after
FIGURES = {
    "time_s": "s",
    "colour_error": "colour error",
    "layout_iou": "part IoU",
    "loss_first": "loss, first",
    "loss_last": "last",
    "distillation": "of the picture",
}
METHODS = ("untouched", "injection", "optimise", "optimise, one timestep, no content", "sample, a fifth of the steps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=3, help="of held-out scenes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of the schedule; the descent at one timestep has as many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs and of all noise (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the report there after every method; what it already has is not measured again")


def run(arguments: argparse.Namespace) -> int:
    from qalign.embedded.scenes import held_out_pairs

    settings = {"steps": arguments.steps, "seed": arguments.seed}
    report: dict[str, Any] = {"settings": settings, "pairs": []}
    if arguments.json is not None and arguments.json.is_file():
        report = json.loads(arguments.json.read_text())
        if report["settings"] != settings:
            raise ValueError(f"--json: expected a report of {settings}, got one of {report['settings']}")
    for number, pair in enumerate(held_out_pairs(arguments.pairs, arguments.seed)):
        if number == len(report["pairs"]):
            report["pairs"].append({"appearance": pair.appearance, "structure": pair.structure, "methods": {}})
        found = report["pairs"][number]["methods"]
        for name in METHODS:
            if name not in found:
                found[name] = measure(pair, name, **settings)
                if arguments.json is not None:
                    with replacing(arguments.json) as unfinished:
                        unfinished.write_text(json.dumps(report, indent=1) + "\n")
    print(render(report))
    return 0


@torch.no_grad()
def measure(pair: Any, name: str, *, steps: int, seed: int) -> dict[str, float]:
    """Figures of one pair by one method. All methods get the same pictures, prompt and seed.

    `distillation` is that of the finished picture against the appearance, mean over `TIMESTEPS`; `loss_first` and `loss_last` are what the run saw.
    """
    from qalign import AppearanceTransferPipeline, AttentionDistillation, AttentionDistillationPipeline, CrossImage
    from qalign.distillation import AttentionReader
    from qalign.embedded.scenes import render as render_scenes
    from qalign.leakage import OBJECT, colour_error, read_layouts

    scenes = render_scenes([pair.appearance, pair.structure])
    (appearance, structure), (of_appearance, of_structure) = scenes.image, scenes.labels
    prompt = f"a photo of a {scenes.plans[1]}"
    injection = AppearanceTransferPipeline.embedded()
    distillation = AttentionDistillationPipeline.from_pipe(injection)
    for pipe in (injection, distillation):
        pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"output_type": "pt", "generator": torch.manual_seed(seed)}
    alone = AttentionDistillation(content_weight=0.0)
    given: dict[str, dict[str, Any]] = {
        "optimise": {"num_inference_steps": steps},
        "optimise, one timestep, no content": {"num_inference_steps": 1, "iterations": steps, "method": alone},
        "sample, a fifth of the steps": {"mode": "sample", "num_inference_steps": max(steps // 5, 1)},
    }
    figures, begun = {}, time.perf_counter()
    if name == "untouched":
        picture = structure
    elif name == "injection":
        options |= {"noun": scenes.plans[1], "num_inference_steps": steps}
        picture = injection(appearance, structure, prompt, method=CrossImage(contrast=1.0), **options).images[0]
    else:
        result = distillation(appearance, structure, prompt, **options, **given[name])
        picture = result.images[0]
        figures = {"loss_first": result.losses[0, 1].item(), "loss_last": result.losses[-1, 1].item()}
    figures["time_s"] = time.perf_counter() - begun

    error = colour_error(picture, of_structure, appearance, of_appearance)[OBJECT].nanmean().item()
    figures |= {"colour_error": error, "layout_iou": read_layouts(distillation, {"": picture}, scenes, prompt, seed=seed)[""]}
    null, latents = distillation.conditions("", *structure.shape[-2:])[0], distillation.encode(torch.stack([picture, appearance]))
    with AttentionReader(distillation) as read:
        at = [[read(row[None], torch.tensor(timestep), null) for row in latents] for timestep in TIMESTEPS]
    return figures | {"distillation": sum(alone.loss(own, style).distillation.item() for own, style in at) / len(at)}


def render(report: dict[str, Any]) -> str:
    """Means over the pairs as a table."""
    rows = []
    for name in METHODS:
        pairs = [pair["methods"][name] for pair in report["pairs"] if name in pair["methods"]]
        means = {figure: sum(pair[figure] for pair in pairs) / len(pairs) for figure in FIGURES if pairs and figure in pairs[0]}
        rows.append([name, len(pairs), *(f"{means[figure]:.3g}" if figure in means else "-" for figure in FIGURES)])
    return text_table.aligned(["method", "pairs", *FIGURES.values()], rows)
