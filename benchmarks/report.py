"""Markdown tables and a plot of result files. `python -m benchmarks pages` puts tables into documents."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qalign_kernels._files import Files, replacing
from qalign_kernels.bench.measure import markdown

from .static import evidence
from .static.budgets import BUDGETS
from .suite import rows
from .suite.providers import OURS, SDPA
from .suite.rows import Row
from .suite.shapes import CONTIGUOUS

RESULTS = Path(__file__).with_name("results")
PLOTTED_OP, PLOTTED_HEADS = "qalign_attention", (1, 8, 40)
NOTE = (
    "Times are of one call. x SDPA is the time over that of `scaled_dot_product_attention` on the same shape "
    "in the same run: below 1 is faster. Peak memory is beyond the inputs, the output included. "
    "U/N is the fraction of reference tokens that were matched."
)
ALL_COLUMNS = {
    "op": "op",
    "shape": "[B, H, N, D]",
    "provider": "provider",
    "p20_ms": "p20 ms",
    "p50_ms": "p50 ms",
    "p80_ms": "p80 ms",
    "tflops": "TFLOP/s",
    "ratio_to_sdpa": "x SDPA",
    "peak_mib": "peak MiB",
    "unique_fraction": "U/N",
    "layout": "layout",
}
SUMMARY_HEAD = (
    "op",
    "[B, H, N, D]",
    "backend",
    "ms",
    "x SDPA",
    "eager ms",
    "reference ms",
    "MiB",
    "eager MiB",
    "reference MiB",
    "U/N",
)


class Results(NamedTuple):
    """What result files hold, by kind."""

    times: list[Row]
    validations: list[dict[str, Any]]
    compiled: list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "result files of any command (default: all of benchmarks/results)"
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help=kinds)
    out = "write report.md and report.png there; without it the tables go to stdout"
    parser.add_argument("--out", type=Path, metavar="DIR", help=out)


def files(arguments: argparse.Namespace) -> Files:
    names = ("report.md", "report.png") if arguments.out else ()
    written = [("--out", arguments.out / name) for name in names]
    return Files([("FILE", file) for file in arguments.files], written)


def run(arguments: argparse.Namespace) -> int:
    results = read(arguments.files or sorted(RESULTS.glob("*/*.json")))
    if not results.times:
        raise ValueError("FILE: expected at least one file with rows of `speed`, got none")
    if arguments.out:
        with replacing(arguments.out / "report.md") as unfinished:
            unfinished.write_text(report(results))
        with replacing(arguments.out / "report.png") as unfinished:
            plot(results.times, unfinished)
        print(f"wrote {arguments.out / 'report.md'} and {arguments.out / 'report.png'}")
    else:
        print(report(results), end="")
    return 0


def read(paths: Sequence[Path]) -> Results:
    """Read the files and sort their contents by kind. Files of other kinds are shown by other reports."""
    results = Results([], [], [])
    for path in paths:
        kind, content = rows.read(path)
        match kind:
            case rows.TIMES:
                results.times.extend(content)
            case rows.VALIDATION:
                results.validations.append(content)
            case rows.COMPILED:
                results.compiled.extend(content)
    return results


def by_device(times: Sequence[Row]) -> list[list[Row]]:
    """Group the rows by device, PyTorch, Triton and dtype, in order; of equal rows the last counts."""
    groups: dict[tuple, dict[tuple, Row]] = {}
    for row in times:
        setting = row.device, row.torch, row.triton, row.dtype
        groups.setdefault(setting, {})[(*_place(row), row.layout, row.provider)] = row
    return [list(group.values()) for group in groups.values()]


def _place(row: Row) -> tuple:
    """Name what providers are compared on: the op, the shape and the data."""
    return row.op, *row.shape, row.asked_fraction


def heading(group: Sequence[Row]) -> str:
    first, commits = group[0], ", ".join(sorted({row.commit for row in group}))
    versions = f"PyTorch {first.torch}, Triton {first.triton or 'absent'}"
    return f"{first.device}, {first.dtype}, {versions}, commit {commits}"


def other_evidence(results: Results) -> list[str]:
    """Lay out accuracy and machine code, where the files hold them."""
    parts = [f"### Accuracy\n\n{evidence.accuracy(content)}" for content in results.validations]
    if results.compiled:
        tables = evidence.machine_code(results.compiled, json.loads(BUDGETS.read_text()))
        parts.append(f"### Machine code, without a GPU\n\n{tables}")
    return parts


def report(results: Results) -> str:
    """Lay out every row of every device, losses and wins alike."""
    parts = ["# Benchmarks", f"{NOTE} TFLOP/s count the op's definition for every provider."]
    for group in by_device(results.times):
        lines = [[_cell(getattr(row, name)) for name in ALL_COLUMNS] for row in group]
        parts += [f"## {heading(group)}", markdown([*ALL_COLUMNS.values()], lines)]
    return "\n\n".join([*parts, *other_evidence(results)]) + "\n"


def summary(group: Sequence[Row]) -> str:
    """Lay out one line for each op and shape: ours beside eager PyTorch and the reference."""
    places: dict[tuple, dict[str, Row]] = {}
    for row in group:
        if row.layout != CONTIGUOUS:
            places.setdefault(_place(row), {})[row.provider] = row
    lines = [_summary_line(found, name) for found in places.values() for name in OURS if name in found]
    return f"**{heading(group)}**\n\n{markdown(SUMMARY_HEAD, lines)}\n\n{NOTE}"


def _summary_line(found: dict[str, Row], name: str) -> list[str]:
    mine = found[name]
    peers = [found.get(peer) for peer in ("eager", "reference")]
    times = [peer.p50_ms if peer else None for peer in peers]
    memory = [peer.peak_mib if peer else None for peer in peers]
    cells = [mine.op, mine.shape, name, mine.p50_ms, mine.ratio_to_sdpa, *times]
    return [_cell(cell) for cell in (*cells, mine.peak_mib, *memory, mine.unique_fraction)]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return "-" if value is None else str(value)


def plot(times: Sequence[Row], file: Path) -> None:
    """Draw time and peak memory of Q-Align in one call against tokens, one row of panels for each device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = by_device(times)
    figure, panels = pyplot.subplots(len(groups), 2, figsize=(11, 4 * len(groups)), squeeze=False)
    for (time_panel, memory_panel), group in zip(panels, groups):
        shown = sorted((row for row in group if _is_plotted(row)), key=lambda row: row.shape[2])
        for provider in dict.fromkeys(row.provider for row in group if _is_plotted(row)):
            own = [row for row in shown if row.provider == provider]
            _draw(time_panel, provider, [(row.shape[2], row.p50_ms) for row in own])
            measured = [(row.shape[2], row.peak_mib) for row in own if row.peak_mib is not None]
            _draw(memory_panel, provider, measured)
        ticks = sorted({row.shape[2] for row in shown})
        _label(time_panel, heading(group), "ms per call", ticks)
        _label(memory_panel, f"{PLOTTED_OP}, [1, 8, N, 40]", "peak MiB beyond the inputs", ticks)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _is_plotted(row: Row) -> bool:
    batch, heads, _, head_dim = row.shape
    on_random_data = row.op == PLOTTED_OP and row.asked_fraction is None
    return on_random_data and (batch, heads, head_dim) == PLOTTED_HEADS and row.layout != CONTIGUOUS


def _draw(panel: Any, provider: str, points: Sequence[tuple[int, float]]) -> None:
    if points:
        width, dashes = 2.5 if provider in OURS else 1.2, "--" if provider.startswith(SDPA) else "-"
        panel.plot(*zip(*points), label=provider, marker="o", linewidth=width, linestyle=dashes)


def _label(panel: Any, title: str, axis: str, ticks: list[int]) -> None:
    panel.set(title=title, xlabel="tokens N", ylabel=axis, xscale="log", yscale="log")
    panel.set_xticks(ticks, labels=ticks)
    panel.set_xticks([], minor=True)
    panel.title.set_fontsize(9)
    panel.grid(True, which="both", alpha=0.3)
    if panel.lines:
        panel.legend()
