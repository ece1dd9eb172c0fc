"""The second part of the demo: appearance transfer by the compared methods, its matches and its leakage."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._demo_step import stopwatch
from ._leakage_tables import summary_table
from ._shared import COMPARED, SIDE, say, write

ROWS = 2  # of the grid
STEPS = 30  # of the transfers in the grid
MEASURED_STEPS = 20  # of the transfers that are measured
COMMITTED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "leakage.json"


def show_transfer(out: Path, pairs: int, seed: int) -> dict[str, Any]:
    """Transfer, match and measure; print figures and write pictures to `out`. Return the leakage report."""
    import torch

    from ..evaluation import leakage
    from ..pipelines import AppearanceTransferPipeline

    say("\nPart 2: appearance transfer between scenes that the model was not trained on.")
    progress = stopwatch()
    pipe = AppearanceTransferPipeline.embedded(torch.float32)
    pipe = pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for number in range(ROWS):
        progress(f"transfer {number + 1} of {ROWS}: inversion, then {', '.join(COMPARED.values())}")
        rows.append(transfer(pipe, seed + number))
    write("grid", draw_grid(rows, seed), out / "transfer.png")
    progress("match the tokens of the first pair")
    show_matches(pipe, out, seed)
    settings = leakage.Settings(steps=MEASURED_STEPS, every=1, seed=seed)
    progress(f"measure leakage on {pairs} pairs, {settings.steps} steps")
    report = leakage.run(pipe, pairs=pairs, settings=settings)
    progress("done")
    say("\n" + summary_table({f"{pairs} pairs, just now": report} | committed()) + "\n")
    write("leakage by layer and step", draw_leakage(report), out / "leakage.png")
    write("figures", json.dumps(report, indent=2) + "\n", out / "leakage.json")
    return report


def transfer(pipe: Any, seed: int) -> dict[str, Any]:
    """One row of the grid: the first held-out pair of `seed`, by every compared method from one inversion."""
    import torch

    from ..context.layers import picture_size
    from ..evaluation.match_figures import held_out_scenes

    structure, appearance, _, caption = held_out_scenes(seed, picture_size(pipe))
    generator = torch.Generator().manual_seed(seed)
    inversion = pipe.invert(appearance, structure, caption, num_inference_steps=STEPS, generator=generator)
    row: dict[str, Any] = {"structure": structure, "appearance": appearance}
    for name, title in COMPARED.items():
        row[title] = pipe(appearance, structure, caption, method=name, inversion=inversion).images[0]
    return row


def draw_grid(rows: list[dict[str, Any]], seed: int) -> Any:
    from ..evaluation.plots import transfer_grid

    return transfer_grid(
        rows,
        title="The structure of the first picture with the appearance of the second",
        note="Cross-Image and Q-Align follow their papers; QAlignWarp is this library's variant. "
        f"Scenes that the model was not trained on, {STEPS} steps, seed {seed}.",
    )


def show_matches(pipe: Any, out: Path, seed: int) -> None:
    """Print how many tokens match their own part in the first pair, and draw matches and heat maps."""
    from ..context.layers import picture_size
    from ..evaluation import match_figures
    from ..evaluation.correspondence import compare

    structure, appearance, labels, caption = match_figures.held_out_scenes(seed, picture_size(pipe))
    shown = match_figures.choose(compare(pipe, structure, appearance, caption, seed=seed), SIDE)
    lines, shares = match_figures.draw_lines(shown, structure, appearance, labels)
    points = match_figures.default_points(shown, structure, labels)
    for signal, share in shares.items():
        say(f"  {signal}: {share:.1%} of the object's tokens match their own part")
    write("matches", lines, out / "transfer_matches.png")
    heat_maps = match_figures.draw_heat_maps(shown, structure, appearance, points, labels)
    write("heat maps", heat_maps, out / "heat_maps.png")


def draw_leakage(report: Mapping[str, Any]) -> Any:
    from ..evaluation.plots import leakage_by_layer_and_step

    curves = {
        COMPARED[name]: by_layer(entry["by_layer_and_step"]) for name, entry in report["methods"].items()
    }
    return leakage_by_layer_and_step(
        curves,
        title=f"Object attention outside its own part, mean of {report['pairs']} pairs: lower is better",
        ylabel="fraction of attention",
        threshold=report["settings"]["threshold"],
        note="Edited layers. Dotted: a pair leaks if its mean over layers and steps is above this line. "
        "Steps that read the structure's keys are left out.",
    )


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
    """The report in the repository, by its title. There is none in an installed package."""
    if not COMMITTED.is_file():
        return {}
    report = json.loads(COMMITTED.read_text(encoding="utf-8"))
    return {f"{report['pairs']} pairs, as committed": report}
