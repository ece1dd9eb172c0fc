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
HEAD = ("method", "steps", "s", "colour error", "relative", "part IoU", "loss before", "loss after", "factor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=3, help="of held-out scenes (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="leave out so many pairs before them (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of injection and of optimising; sampling takes a fifth (default: %(default)s)")
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
    from qalign.regions import Regions

    scenes = render_scenes([pair.appearance, pair.structure])
    (appearance, structure), (of_appearance, of_structure) = scenes.image, scenes.labels
    prompt = f"a photo of a {scenes.plans[1]}"
    injection = AppearanceTransferPipeline.embedded()
    distillation = AttentionDistillationPipeline.from_pipe(injection)
    for pipe in (injection, distillation):
        pipe.set_progress_bar_config(disable=True)
    regions = Regions(appearance=of_appearance, structure=of_structure)

    inversion = injection.invert(appearance, structure, prompt, num_inference_steps=steps, generator=torch.manual_seed(seed))

    def inject(adain: str | None) -> Tensor:
        options: dict[str, Any] = {"adain": adain, "noun": scenes.plans[1], "inversion": inversion, "output_type": "pt"}
        return injection(None, None, prompt, method=CrossImage(contrast=1.0), **options).images

    def distil(mode: str, length: int, **options: Any) -> Tensor:
        options |= {"mode": mode, "num_inference_steps": length, "output_type": "pt", "generator": torch.manual_seed(seed)}
        return distillation(appearance, structure, prompt, **options).images

    methods: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "untouched": (0, lambda: structure[None]),
        "injection": (steps, lambda: inject(None)),
        "injection, masked AdaIN": (steps, lambda: inject("masked")),
        "optimise": (steps, lambda: distil("optimise", steps)),
        "sample": (steps // 5, lambda: distil("sample", steps // 5)),
        "sample, part masks": (steps // 5, lambda: distil("sample", steps // 5, regions=regions)),
    }
    pictures, figures = {"appearance": appearance}, {}
    null = distillation.conditions("", *structure.shape[-2:])[0]
    loss = AttentionDistillation(content_weight=0.0).loss

    def distance(read: AttentionReader, picture: Tensor) -> float:
        latents = distillation.encode(torch.stack([picture, appearance]))
        at = [[read(row[None], torch.tensor(timestep), null) for row in latents] for timestep in TIMESTEPS]
        return sum(loss(own, style).distillation.item() for own, style in at) / len(at)

    for name, (length, make) in methods.items():
        begun = time.perf_counter()
        picture = make()[0].float().clamp(0, 1)
        took = time.perf_counter() - begun
        error = colour_error(picture, of_structure, appearance, of_appearance)[OBJECT].nanmean().item()
        pictures[name] = picture
        figures[name] = {"steps": length, "time_s": took, "colour_error": error}
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
    rows = []
    for name, row in report["means"].items():
        before, after = row["distillation_before"], row["distillation_after"]
        cells = [row["steps"], row["time_s"], row["colour_error"], row["colour_ratio"], row["layout_iou"], before, after, before / after]
        rows.append([name, *(f"{cell:.3g}" for cell in cells)])
    return text_table.aligned(HEAD, rows)
