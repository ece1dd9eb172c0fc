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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._shared import COMPARED, SIDE, Files, Reading, count, say, seed, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..evaluation.photographs import Outcome

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
LINES = 120  # at most, between the photographs
ROWS = 2  # of the grid
STEPS = 30  # of the transfers in the grid
MEASURED_STEPS = 20  # of those that are measured
COMMITTED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "leakage.json"
FIGURES = (
    "part_agreement",
    "own_part_mass",
    "object_background_leakage",
    "leaking_pairs",
    "leaking_pairs_improved",
    "layout_iou",
    "colour_error",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    out = Path("demo_out")
    parser.add_argument(
        "--out", type=Path, default=out, metavar="DIR", help="for pictures and figures (default: %(default)s)"
    )
    parser.add_argument("--only", choices=PARTS, help="one of the two parts")
    parser.add_argument(
        "--size",
        type=side,
        default=512,
        metavar="PIXELS",
        help="side of the photographs, a multiple of 32 (default: %(default)s)",
    )
    parser.add_argument(
        "--pairs",
        type=count,
        default=6,
        metavar="N",
        help="of scenes whose leakage is measured (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="of weights, noise and scenes (default: %(default)s)"
    )


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
    begin = time.perf_counter()
    if options.only != "transfer":
        show_step(options.out, options.size, options.seed)
    if options.only != "step":
        show_transfer(options.out, options.pairs, options.seed)
    say(f"\nall of it in {time.perf_counter() - begin:.0f} s")
    return 0


def show_step(out: Path, size: int, seed: int) -> None:
    """The first part: figures printed, a picture and a report in `out`."""
    from ..evaluation import photographs

    progress = _stopwatch()
    say(
        "Q-Align, one denoising step. The weights are random and seeded: tokens, heads, head dims and cost are those of Stable"
    )
    say("Diffusion 1.5; a picture that it would paint is not the point and none is painted.")
    write_step(photographs.run(size=size, seed=seed, progress=progress), out)


def write_step(found: "Outcome", out: Path) -> None:
    """Print the figures of the first part, and write correspondences.png and demo.json to `out`."""
    say(render_step(found.report) + "\n")
    write("picture", draw_step(found), out / "correspondences.png")
    write("figures", json.dumps(found.report, indent=2) + "\n", out / "demo.json")


def draw_step(found: "Outcome") -> "Figure":
    """Lines between the photographs in a layer of the middle size, and the errors of all its matches."""
    import torch

    from ..evaluation.correspondence import SIGNALS
    from ..evaluation.plots import MatchPanel, correspondence

    layers = found.report["layers"]
    sizes = sorted({figures["tokens"] for figures in layers})
    tokens = sizes[len(sizes) // 2]
    chosen = next(i for i, figures in enumerate(layers) if figures["tokens"] == tokens)
    truth, matches = found.panels[chosen]
    shown = []
    for signal, name in SIGNALS.items():
        index, score = (tensor.flatten().cpu() for tensor in matches[signal])
        best = torch.nonzero(truth.known).flatten()
        best = best[score[best].topk(min(LINES, len(best))).indices]
        target = truth.position[index[best].long()]
        right = (target - truth.target[best]).norm(dim=-1) <= truth.pitch
        title = f"{name[0].upper()}{name[1:]}: {right.double().mean():.0%} of these lines end within {truth.pitch:.0f} px of the truth"
        shown.append(MatchPanel(title, truth.position[best], target, right))
    curves = {
        name: truth.error(matches[signal].index.flatten().cpu()) for signal, name in SIGNALS.items()
    } | {"chance": truth.chance()}
    return correspondence(
        found.pair.structure,
        found.pair.appearance,
        shown,
        title=f"Matches in {layers[chosen]['layer']}: {tokens} tokens, independent noise on both photographs, random weights",
        note=f"Lines: the {len(shown[0].source)} most similar matches among tokens whose truth is known; green where they end within one token "
        "of it (true disparity of the stereo pair).\nWith random weights the query and key projections are independent, so query-key "
        "matches are no better than chance by construction; what query-query keeps is real.",
        curves=curves,
        tolerance=truth.pitch,
    )


def render_step(report: Mapping[str, Any]) -> str:
    """The report of the first part as tables."""
    names = {
        "stock": "stock processor",
        "materialised": "Q-Align, materialised",
        "shipped": "Q-Align, as shipped",
    }
    lines = [
        "",
        f"{'one denoising step':<24}{'time s':>9}{'in edited attention s':>24}{'peak memory MiB':>18}",
    ]
    for name, step in report["steps"].items():
        lines.append(
            f"{names[name]:<24}{step['time_s']:>9.2f}{step['attention_s']:>24.2f}{step['peak_mib']:>18.0f}"
        )
    lines.append(
        f"(one run each, which other work on the machine disturbs; memory above the level before the step: {report['memory']})"
    )
    differences = report["agreement"]
    lines += [
        "",
        "largest difference of the prediction, relative to the largest prediction",
        f"  shipped to materialised Q-Align          {differences['shipped_to_materialised']:.1e}",
        f"  Q-Align to stock, output row             {differences['output_row_to_stock']:.1e}",
        f"  Q-Align to stock, the other rows         {differences['reference_rows_to_stock']:.1e}",
        "",
        f"{'layer':<28}{'N':>6}{'d':>5}{'U/N':>7}{'within one token of the truth':>33}{'median error px':>24}",
        f"{'':<46}{'q-q':>13}{'q-k':>10}{'chance':>10}{'q-q':>10}{'q-k':>7}{'chance':>7}",
    ]
    for row in report["layers"]:
        within, error = row["within_one_token"], row["median_error_px"]
        lines.append(
            f"{row['layer']:<28}{row['tokens']:>6}{row['head_dim']:>5}{row['unique_fraction']:>7.2f}"
            f"{within['query_query']:>13.1%}{within['query_key']:>10.1%}{within['chance']:>10.2%}"
            f"{error['query_query']:>10.0f}{error['query_key']:>7.0f}{error['chance']:>7.0f}"
        )
    lines += [
        "U/N: matched share of the reference tokens. q-q: query-query similarity (Q-Align). q-k: query-key similarity (Cross-Image);",
        "query and key projections are independent random matrices here, so q-k can only be at chance. Trained ones are not.",
        "",
        f"{'where attention goes':<28}{'effective keys':>24}{'spread px (rms from its centre)':>38}",
        f"{'':<28}{'all keys':>13}{'rearranged':>12}{'all keys':>16}{'rearranged':>12}{'guided':>9}",
    ]
    for row in report["layers"]:
        keys, spread = row["effective_keys"], row["attention_spread_px"]
        lines.append(
            f"{row['layer']:<28}{keys['all_keys']:>13.0f}{keys['rearranged']:>12.0f}"
            f"{spread['all_keys']:>16.0f}{spread['rearranged']:>12.0f}{spread['guided']:>9.0f}"
        )
    lines.append(
        "effective keys: exp of the entropy over distinct keys. rearranged re-weights and prunes keys; guided acts per query."
    )
    return "\n".join(lines)


def _stopwatch() -> Callable[[str], None]:
    """What prints a line behind the seconds since now."""
    begin = time.perf_counter()

    def progress(text: str) -> None:
        say(f"[{time.perf_counter() - begin:5.1f} s] {text}")

    return progress


def show_transfer(out: Path, pairs: int, seed: int) -> dict[str, Any]:
    """The second part: pictures and figures in `out`; returns the leakage report."""
    import torch

    from ..context.layers import picture_size
    from ..evaluation import leakage, match_figures
    from ..evaluation.correspondence import compare
    from ..evaluation.plots import leakage_by_layer_and_step, transfer_grid
    from ..pipelines import AppearanceTransferPipeline

    progress = _stopwatch()
    say("\nAppearance transfer between held-out scenes, on the trained model inside the package.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = AppearanceTransferPipeline.embedded(torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for number in range(ROWS):
        progress(
            f"transfer {number + 1} of {ROWS}: inversion, then {', '.join(COMPARED.values())}; {STEPS} steps"
        )
        rows.append(transfer(pipe, seed + number))
    structure, appearance, labels, caption = match_figures.held_out_scenes(seed, picture_size(pipe))
    progress("what matches what")
    shown = match_figures.choose(compare(pipe, structure, appearance, caption, seed=seed), SIDE)
    lines, shares = match_figures.draw_lines(shown, structure, appearance, labels)
    heat_maps = match_figures.draw_heat_maps(
        shown, structure, appearance, match_figures.default_points(shown, structure, labels), labels
    )
    settings = leakage.Settings(steps=MEASURED_STEPS, every=1, seed=seed)
    progress(f"leakage on {pairs} pairs, {settings.steps} steps")
    report = leakage.run(pipe, pairs=pairs, settings=settings)
    progress("done")
    say(f"\nmatches in the first pair, {shown.layer}")
    for signal, share in shares.items():
        say(f"  {signal:<28}{share:>6.1%} of the object's tokens go to their own part")
    say("\n" + table({f"{pairs} pairs, just now": report} | committed()) + "\n")
    grid = transfer_grid(
        rows,
        title="Appearance transfer on the embedded model",
        note=f"Held-out scenes, {STEPS} steps, seed {seed}.",
    )
    write("grid", grid, out / "transfer.png")
    write("matches", lines, out / "transfer_matches.png")
    write("heat maps", heat_maps, out / "heat_maps.png")
    curves = {
        COMPARED[name]: by_layer(entry["by_layer_and_step"]) for name, entry in report["methods"].items()
    }
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
    from ..evaluation.match_figures import held_out_scenes

    structure, appearance, _, caption = held_out_scenes(seed, picture_size(pipe))
    inversion = pipe.invert(
        appearance,
        structure,
        caption,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(seed),
    )
    row: dict[str, Any] = {"structure": structure, "appearance": appearance}
    for name, title in COMPARED.items():
        row[title] = pipe(appearance, structure, caption, method=name, inversion=inversion).images[0]
    return row


def by_layer(
    entry: Mapping[str, Any], figure: str = "cross_region_mass"
) -> dict[str, list[tuple[float, float]]]:
    """layer -> [(step, value)] of one method of a leakage report."""
    return {
        layer: [
            (step, float("nan") if value is None else value) for step, value in zip(entry["steps"], values)
        ]
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
    from ._leakage_tables import TITLES

    shown = {
        title: [name for name in COMPARED if name in report["methods"]] for title, report in reports.items()
    }
    columns = [
        (COMPARED[name], reports[title]["methods"][name]) for title, names in shown.items() for name in names
    ]
    heads = "".join(f"{title:>{15 * len(names)}}" for title, names in shown.items())
    lines = [
        f"{'attention leakage':<38}{heads}",
        f"{'':<38}" + "".join(f"{name:>15}" for name, _ in columns),
    ]
    for figure in FIGURES:
        cells = [_cell(entry.get(figure)) for _, entry in columns]
        lines.append(
            f"{TITLES.get(figure, figure.replace('_', ' ')):<38}" + "".join(f"{cell:>15}" for cell in cells)
        )
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
