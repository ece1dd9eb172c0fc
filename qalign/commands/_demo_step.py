"""The first part of the demo: the measured denoising step as printed tables and a picture."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._shared import say, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..evaluation.denoising_step import Outcome

LINES = 120  # at most, between the photographs


def show_step(out: Path, size: int, seed: int) -> None:
    """Measure the step, print its figures, and write a picture and a report to `out`."""
    from ..evaluation import denoising_step

    say(
        "\nPart 1: one denoising step. The weights are random, so no picture is drawn. Tokens, heads and cost"
    )
    say("are those of Stable Diffusion 1.5. The left photograph is the structure, the right one appearance.")
    write_step(denoising_step.run(size=size, seed=seed, progress=stopwatch()), out)


def stopwatch() -> Callable[[str], None]:
    """A function that prints a line behind the seconds since now."""
    begin = time.perf_counter()

    def progress(text: str) -> None:
        say(f"[{time.perf_counter() - begin:5.1f} s] {text}")

    return progress


def write_step(outcome: "Outcome", out: Path) -> None:
    """Print the figures of the step, and write correspondences.png and demo.json to `out`."""
    say(render_step(outcome.report) + "\n")
    write("matches", draw_step(outcome), out / "correspondences.png")
    write("figures", json.dumps(outcome.report, indent=2) + "\n", out / "demo.json")


def draw_step(outcome: "Outcome") -> "Figure":
    """Draw matches of a middle-sized layer as lines between the photographs, and all its errors."""
    import torch

    from ..evaluation.correspondence import SIGNALS
    from ..evaluation.match_plots import MatchPanel, correspondence

    layers = outcome.report["layers"]
    sizes = sorted({figures["tokens"] for figures in layers})
    tokens = sizes[len(sizes) // 2]
    chosen = next(i for i, figures in enumerate(layers) if figures["tokens"] == tokens)
    truth, matches = outcome.panels[chosen]
    panels = []
    for signal, name in SIGNALS.items():
        index, score = (tensor.flatten().cpu() for tensor in matches[signal])
        best = torch.nonzero(truth.known).flatten()
        best = best[score[best].topk(min(LINES, len(best))).indices]
        target = truth.position[index[best].long()]
        right = (target - truth.target[best]).norm(dim=-1) <= truth.pitch
        share = f"{right.double().mean():.0%} of these lines end within {truth.pitch:.0f} px of the truth"
        panels.append(MatchPanel(f"{name}: {share}", truth.position[best], target, right))
    curves = {
        name: truth.error(matches[signal].index.flatten().cpu()) for signal, name in SIGNALS.items()
    } | {"chance": truth.chance()}
    return correspondence(
        outcome.pair.structure,
        outcome.pair.appearance,
        panels,
        title=f"Matches of {tokens} tokens in {layers[chosen]['layer']}, random weights",
        note=f"Lines: the {len(panels[0].source)} most similar matches of tokens with a known true position. "
        "Green lines end within one token of it.\nQuery and key projections are random and independent here, "
        "so query-key matches can only be chance. In a trained model they are better.",
        curves=curves,
        tolerance=truth.pitch,
    )


def render_step(report: Mapping[str, Any]) -> str:
    """The report of the step as tables."""
    return "\n".join([*_costs(report), *_agreement(report["agreement"]), *_layers(report["layers"])])


def _costs(report: Mapping[str, Any]) -> list[str]:
    from ..evaluation.denoising_step import VARIANTS

    lines = ["", f"{'one denoising step':<26}{'time s':>9}{'in edited layers s':>21}{'peak memory MiB':>18}"]
    for name, step in report["steps"].items():
        cells = f"{step['time_s']:>9.2f}{step['attention_s']:>21.2f}{step['peak_mib']:>18.0f}"
        lines.append(f"{VARIANTS[name]:<26}{cells}")
    return [
        *lines,
        "One run each, so other work on the machine disturbs the times.",
        f"Memory is above the level before the step ({report['memory']}).",
    ]


def _agreement(differences: Mapping[str, float]) -> list[str]:
    names = {
        "shipped_to_materialised": "Q-Align as shipped and by its formula",
        "output_row_to_stock": "Q-Align and no edits, output row",
        "reference_rows_to_stock": "Q-Align and no edits, the other rows",
    }
    lines = [f"  {name:<40}{differences[key]:.1e}" for key, name in names.items()]
    return ["", "largest difference between predictions, relative to the largest prediction", *lines]


def _layers(rows: list[Mapping[str, Any]]) -> list[str]:
    lines = [
        "",
        f"{'layer':<28}{'N':>6}{'d':>5}{'U/N':>7}{'within one token of truth':>33}{'median error px':>24}",
        f"{'':<46}{'q-q':>13}{'q-k':>10}{'chance':>10}{'q-q':>10}{'q-k':>7}{'chance':>7}",
    ]
    for row in rows:
        within, error = row["within_one_token"], row["median_error_px"]
        lines.append(
            f"{row['layer']:<28}{row['tokens']:>6}{row['head_dim']:>5}{row['unique_fraction']:>7.2f}"
            f"{within['query_query']:>13.1%}{within['query_key']:>10.1%}{within['chance']:>10.2%}"
            f"{error['query_query']:>10.0f}{error['query_key']:>7.0f}{error['chance']:>7.0f}"
        )
    lines += [
        "N: tokens. d: head dim. U/N: fraction of the reference tokens that are matched at all.",
        "q-q: query-query similarity, as Q-Align. q-k: query-key similarity, as Cross-Image.",
        "Query and key projections are random and independent here, so q-k can only be chance.",
        "",
        f"{'where attention goes':<28}{'effective keys':>24}{'spread px (rms from its centre)':>38}",
        f"{'':<28}{'all keys':>13}{'rearranged':>12}{'all keys':>16}{'rearranged':>12}{'guided':>9}",
    ]
    for row in rows:
        keys, spread = row["effective_keys"], row["attention_spread_px"]
        lines.append(
            f"{row['layer']:<28}{keys['all_keys']:>13.0f}{keys['rearranged']:>12.0f}"
            f"{spread['all_keys']:>16.0f}{spread['rearranged']:>12.0f}{spread['guided']:>9.0f}"
        )
    return [
        *lines,
        "effective keys: exp of the entropy over distinct keys. 'rearranged' weighs and removes keys",
        "for all queries alike, 'guided' acts on each query.",
    ]
