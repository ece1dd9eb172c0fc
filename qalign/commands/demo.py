"""The main job, twice: its cost on real photographs, and its effect on pictures whose parts are known.

First one denoising step over two photographs with the geometry of Stable Diffusion 1.5 and random weights: stock, with Q-Align materialised,
and with Q-Align as shipped. Then appearance transfer between held-out scenes on the trained model inside the package, by Cross-Image attention
and by Q-Align, with the matches behind it and its leakage. Nothing is downloaded.

examples:
  python -m qalign demo
  python -m qalign demo --only transfer --pairs 12 --out demo_out
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._shared import COMPARED, Files, Reading, count, say, seed, write

NEEDS = ("diffusers", "transformers", "PIL", "accelerate", "matplotlib", "psutil", "skimage")
PARTS = ("step", "transfer")
READINGS = (
    Reading(("size",), lambda options: options.only != "transfer", "without --only transfer"),
    Reading(("pairs",), lambda options: options.only != "step", "without --only step"),
)
WRITTEN = {
    "step": ("correspondences.png", "demo.json"),
    "transfer": ("transfer.png", "transfer_matches.png", "heat_maps.png", "leakage.png", "leakage.json"),
}
ROWS = 2  # of the grid
STEPS = 30  # of the transfers in the grid
MEASURED_STEPS = 20  # of those that are measured
COMMITTED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "leakage.json"
FIGURES = ("part_agreement", "own_part_mass", "object_background_leakage", "leaking_pairs", "leaking_pairs_improved", "layout_iou", "colour_error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    out = Path("demo_out")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="for pictures and figures (default: %(default)s)")
    parser.add_argument("--only", choices=PARTS, help="one of the two parts")
    parser.add_argument("--size", type=side, default=512, metavar="PIXELS", help="side of the photographs, a multiple of 32 (default: %(default)s)")
    parser.add_argument("--pairs", type=count, default=6, metavar="N", help="of scenes whose leakage is measured (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="of weights, noise and scenes (default: %(default)s)")


def side(text: str) -> int:
    """A picture size: a multiple of 32 pixels, so that two halvings of the latent grid come out even."""
    value = int(text) if text.isdigit() else 0
    if value < 64 or value % 32:
        raise argparse.ArgumentTypeError(f"expected a multiple of 32 from 64, got {text!r}")
    return value


def files(options: argparse.Namespace) -> Files:
    return Files(
        writes=[
            ("--out", options.out / name)
            for part in PARTS
            if options.only in (None, part)
            for name in WRITTEN[part]
        ]
    )


def run(options: argparse.Namespace) -> int:
    from ..evaluation import photographs

    begin = time.perf_counter()
    if options.only != "transfer":
        photographs.run(options.out, size=options.size, seed=options.seed)
    if options.only != "step":
        show_transfer(options.out, options.pairs, options.seed)
    say(f"\nall of it in {time.perf_counter() - begin:.0f} s")
    return 0


def show_transfer(out: Path, pairs: int, seed: int) -> dict[str, Any]:
    """The second part: pictures and figures in `out`; returns the leakage report."""
    import torch

    from ..context.layers import picture_size
    from ..evaluation import leakage
    from ..evaluation.correspondence import compare
    from ..evaluation.plots import leakage_by_layer_and_step, transfer_grid
    from ..pipelines import AppearanceTransferPipeline
    from . import correspond

    begin = time.perf_counter()

    def progress(text: str) -> None:
        say(f"[{time.perf_counter() - begin:5.1f} s] {text}")

    say("\nAppearance transfer between held-out scenes, on the trained model inside the package.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = AppearanceTransferPipeline.embedded(torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for number in range(ROWS):
        progress(f"transfer {number + 1} of {ROWS}: inversion, then {', '.join(COMPARED.values())}; {STEPS} steps")
        rows.append(transfer(pipe, seed + number))
    structure, appearance, labels, caption = correspond.held_out_scenes(seed, picture_size(pipe))
    progress("what matches what")
    shown = correspond.choose(compare(pipe, structure, appearance, caption, seed=seed))
    lines, shares = correspond.draw_lines(shown, structure, appearance, labels)
    heat_maps = correspond.draw_heat_maps(shown, structure, appearance, correspond.default_points(shown, structure, labels), labels)
    settings = leakage.Settings(steps=MEASURED_STEPS, every=1, seed=seed)
    progress(f"leakage on {pairs} pairs, {settings.steps} steps")
    report = leakage.run(pipe, pairs=pairs, settings=settings)
    progress("done")
    say(f"\nmatches in the first pair, {shown.layer}")
    for signal, share in shares.items():
        say(f"  {signal:<28}{share:>6.1%} of the object's tokens go to their own part")
    say("\n" + table({f"{pairs} pairs, just now": report} | committed()) + "\n")
    grid = transfer_grid(rows, title="Appearance transfer on the embedded model", note=f"Held-out scenes, {STEPS} steps, seed {seed}.")
    write("grid", grid, out / "transfer.png")
    write("matches", lines, out / "transfer_matches.png")
    write("heat maps", heat_maps, out / "heat_maps.png")
    curves = {COMPARED[name]: by_layer(entry["by_layer_and_step"]) for name, entry in report["methods"].items()}
    plot = leakage_by_layer_and_step(
        curves,
        title=f"Object attention outside its own part, {pairs} pairs",
        ylabel="share of attention mass",
        threshold=settings.threshold,
        note="Edited layers; dotted: a pair whose mean is above leaks. Steps that read the structure's keys are left out.",
    )
    write("leakage by layer and step", plot, out / "leakage.png")
    write("figures", json.dumps(report, indent=2) + "\n", out / "leakage.json")
    return report


def transfer(pipe: Any, seed: int) -> dict[str, Any]:
    """A row of the grid: the first held-out pair of `seed`, by every method from one inversion."""
    import torch

    from ..context.layers import picture_size
    from .correspond import held_out_scenes

    structure, appearance, _, caption = held_out_scenes(seed, picture_size(pipe))
    inversion = pipe.invert(appearance, structure, caption, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed))
    row: dict[str, Any] = {"structure": structure, "appearance": appearance}
    for name, title in COMPARED.items():
        row[title] = pipe(appearance, structure, caption, method=name, inversion=inversion).images[0]
    return row


def by_layer(entry: Mapping[str, Any], figure: str = "cross_region_mass") -> dict[str, list[tuple[float, float]]]:
    """layer -> [(step, value)] of one method of a leakage report."""
    return {
        layer: [(step, float("nan") if value is None else value) for step, value in zip(entry["steps"], values)]
        for layer, values in zip(entry["layers"], entry[figure])
    }


def committed() -> dict[str, Any]:
    """The report that stands in the repository, if this is one."""
    if not COMMITTED.is_file():
        return {}
    report = json.loads(COMMITTED.read_text(encoding="utf-8"))
    return {f"{report['pairs']} pairs, as committed": report}


def table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Reports of leakage side by side."""
    from ..evaluation.leakage import TITLES

    columns = [(title, COMPARED[name], report["methods"][name]) for title, report in reports.items() for name in COMPARED]
    heads = "".join(f"{title:>30}" for title in reports)
    lines = [f"{'attention leakage':<38}{heads}", f"{'':<38}" + "".join(f"{name:>15}" for _, name, _ in columns)]
    for figure in FIGURES:
        cells = [_cell(entry.get(figure)) for _, _, entry in columns]
        lines.append(f"{TITLES.get(figure, figure.replace('_', ' ')):<38}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
