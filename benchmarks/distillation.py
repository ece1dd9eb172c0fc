"""Attention distillation on held-out scenes of the embedded model: loss, colours and layout, beside key and value injection."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import text_table

TIMESTEPS = (1, 201, 401, 601, 801)  # at which clean latents are held against the style, before and after
FIGURES = {
    "time_s": "s",
    "colour_error": "colour error",
    "colour_ratio": "relative",
    "layout_iou": "part IoU",
    "loss_first": "loss, first",
    "loss_last": "last",
    "distillation_before": "of pictures, before",
    "distillation_after": "after",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=3, help="of held-out scenes (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="leave out so many pairs before them (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of the schedule; the descent at one timestep has as many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs and of all noise (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the report there; pairs that it already has are kept")


def run(arguments: argparse.Namespace) -> int:
    from qalign.embedded.scenes import held_out_pairs

    settings = {"steps": arguments.steps, "seed": arguments.seed}
    report: dict[str, Any] = {"settings": settings, "pairs": []}
    if arguments.json is not None and arguments.json.is_file():
        written = json.loads(arguments.json.read_text())
        if written["settings"] != settings:
            raise ValueError(f"--json: expected a report of {settings}, got one of {written['settings']}")
        report["pairs"] = written["pairs"]
    for pair in held_out_pairs(arguments.first + arguments.pairs, arguments.seed)[arguments.first :]:
        report["pairs"].append({"appearance": pair.appearance, "structure": pair.structure, "methods": measure(pair, **settings)})
    report["means"] = means([pair["methods"] for pair in report["pairs"]])
    print(render(report))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


@torch.no_grad()
def measure(pair: Any, *, steps: int, seed: int) -> dict[str, dict[str, float]]:
    """Figures of one pair by method. All methods get the same pictures, prompt and seed."""
    from qalign import AppearanceTransferPipeline, CrossImage
    from qalign.distillation import AttentionReader
    from qalign.embedded.scenes import render as render_scenes
    from qalign.leakage import OBJECT, colour_error, read_layouts
    from qalign.methods.attention_distillation import AttentionDistillation
    from qalign.pipelines import AttentionDistillationPipeline

    scenes = render_scenes([pair.appearance, pair.structure])
    (appearance, structure), (of_appearance, of_structure) = scenes.image, scenes.labels
    prompt = f"a photo of a {scenes.plans[1]}"
    injection = AppearanceTransferPipeline.embedded()
    distillation = AttentionDistillationPipeline.from_pipe(injection)
    for pipe in (injection, distillation):
        pipe.set_progress_bar_config(disable=True)
    taken: list[Tensor] = []

    def inject() -> Tensor:
        options: dict[str, Any] = {"noun": scenes.plans[1], "num_inference_steps": steps, "output_type": "pt"}
        return injection(appearance, structure, prompt, method=CrossImage(contrast=1.0), generator=torch.manual_seed(seed), **options).images

    def distil(mode: str, **options: Any) -> Tensor:
        result = distillation(appearance, structure, prompt, mode=mode, output_type="pt", generator=torch.manual_seed(seed), **options)
        taken.append(result.losses[:, 1])
        return result.images

    alone = AttentionDistillation(content_weight=0.0)
    methods: dict[str, Callable[[], Tensor]] = {
        "untouched": lambda: structure[None],
        "injection": inject,
        "optimise": lambda: distil("optimise", num_inference_steps=steps),
        "optimise, one timestep, no content": lambda: distil("optimise", num_inference_steps=1, iterations=steps, method=alone),
        "sample, a fifth of the steps": lambda: distil("sample", num_inference_steps=steps // 5),
    }
    pictures, figures = {"appearance": appearance}, {}
    null = distillation.conditions("", *structure.shape[-2:])[0]

    def distance(read: AttentionReader, picture: Tensor) -> float:
        latents = distillation.encode(torch.stack([picture, appearance]))
        at = [[read(row[None], torch.tensor(timestep), null) for row in latents] for timestep in TIMESTEPS]
        return sum(alone.loss(own, style).distillation.item() for own, style in at) / len(at)

    for name, make in methods.items():
        taken.clear()
        begun = time.perf_counter()
        picture = make()[0].float().clamp(0, 1)
        took = time.perf_counter() - begun
        error = colour_error(picture, of_structure, appearance, of_appearance)[OBJECT].nanmean().item()
        pictures[name] = picture
        figures[name] = {"time_s": took, "colour_error": error}
        if taken:
            figures[name] |= {"loss_first": taken[0][0].item(), "loss_last": taken[0][-1].item()}
    layouts = read_layouts(distillation, pictures, scenes, prompt, seed=seed)
    with AttentionReader(distillation) as read:
        before = distance(read, structure)
        for name, row in figures.items():
            row |= {"colour_ratio": row["colour_error"] / figures["untouched"]["colour_error"], "layout_iou": layouts[name]}
            row |= {"distillation_before": before, "distillation_after": distance(read, pictures[name])}
    return figures


def means(pairs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {name: {figure: sum(pair[name][figure] for pair in pairs) / len(pairs) for figure in row} for name, row in pairs[0].items()}


def render(report: dict[str, Any]) -> str:
    """The means as a table."""
    rows = [[name, *(f"{row[figure]:.3g}" if figure in row else "-" for figure in FIGURES)] for name, row in report["means"].items()]
    return text_table.aligned(["method", *FIGURES.values()], rows)
