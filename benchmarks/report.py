"""Markdown tables and a plot from the files that `speed`, `validate` and `static` wrote, and the section of the README between its markers."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from qalign_kernels._files import Files, replacing
from qalign_kernels.bench.measure import markdown

from .static import evidence
from .suite.providers import OURS, SDPA
from .suite.shapes import CONTIGUOUS

BUDGETS = Path(__file__).parent / "static" / "budgets.json"
RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
PLOTTED_OP, PLOTTED_HEADS = "qalign_attention", (1, 8, 40)
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "JSON files of `speed`, `validate` or `static` (default: all of benchmarks/results)"
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help=kinds)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write report.md and report.png there; without it the tables go to stdout",
    )
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help=f"rewrite the section between {BEGIN} and {END} in FILE"
    )


def files(arguments: argparse.Namespace) -> Files:
    written = (
        []
        if arguments.out is None
        else [("--out", arguments.out / name) for name in ("report.md", "report.png")]
    )
    return Files(
        [("FILE", file) for file in arguments.files],
        written + ([("--readme", arguments.readme)] if arguments.readme else []),
    )


def run(arguments: argparse.Namespace) -> int:
    files = arguments.files or sorted(RESULTS.glob("*/*.json"))
    contents = [read(file) for file in files]
    rows = [
        row for content in contents if isinstance(content, list) and _is_timing(content) for row in content
    ]
    if not rows:
        raise ValueError("FILE: expected at least one file with rows of `speed`, got none")
    if arguments.readme:
        replace_section(
            arguments.readme,
            "\n\n".join([*(summary(group) for group in by_device(rows)), *other_evidence(contents)]),
        )
        print(f"wrote the section of {arguments.readme}")
    if arguments.out:
        with replacing(arguments.out / "report.md") as unfinished:
            unfinished.write_text(report(rows, contents))
        with replacing(arguments.out / "report.png") as unfinished:
            plot(rows, unfinished)
        print(f"wrote {arguments.out / 'report.md'} and {arguments.out / 'report.png'}")
    elif not arguments.readme:
        print(report(rows, contents), end="")
    return 0


def read(file: Path) -> Any:
    try:
        rows = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: expected JSON rows, got {error}") from None
    if any(
        known(rows)
        for known in (evidence.is_validation, evidence.is_static, evidence.is_stage, evidence.is_host)
    ):
        return rows
    if not isinstance(rows, list) or any(not isinstance(row, dict) or "p50_ms" not in row for row in rows):
        raise ValueError(f"{file}: expected a list of rows as `speed --json` writes it, got something else")
    return rows


def _is_timing(rows: list[Row]) -> bool:
    return not evidence.is_static(rows) and not evidence.is_host(rows)


def by_device(rows: list[Row]) -> list[list[Row]]:
    """Rows of one device, PyTorch, Triton and dtype together, in the order in which they came; of equal rows the last counts."""
    groups: dict[tuple, dict[tuple, Row]] = {}
    for row in rows:
        setting = tuple(row[name] for name in ("device", "torch", "triton", "dtype"))
        place = row["op"], *row["shape"], row.get("asked_fraction"), row.get("layout"), row["provider"]
        groups.setdefault(setting, {})[place] = row
    return [list(group.values()) for group in groups.values()]


def heading(rows: list[Row]) -> str:
    first = rows[0]
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return f"{first['device']}, {first['dtype']}, PyTorch {first['torch']}, Triton {first['triton'] or 'absent'}, commit {commits}"


def other_evidence(contents: list[Any]) -> list[str]:
    """Accuracy and machine code, where the files hold them."""
    parts = [
        f"### Accuracy\n\n{evidence.accuracy(content)}"
        for content in contents
        if evidence.is_validation(content)
    ]
    compiled = [row for content in contents if evidence.is_static(content) for row in content]
    if compiled:
        parts.append(
            f"### Machine code, without a GPU\n\n{evidence.machine_code(compiled, json.loads(BUDGETS.read_text()))}"
        )
    return parts


def report(rows: list[Row], contents: list[Any]) -> str:
    """Every row of every device, losses and wins alike."""
    head = (
        "op",
        "[B, H, N, D]",
        "provider",
        "p20 ms",
        "p50 ms",
        "p80 ms",
        "TFLOP/s",
        "x SDPA",
        "peak MiB",
        "U/N",
        "layout",
    )
    keys = (
        "op",
        "shape",
        "provider",
        "p20_ms",
        "p50_ms",
        "p80_ms",
        "tflops",
        "ratio_to_sdpa",
        "peak_mib",
        "unique_fraction",
        "layout",
    )
    parts = ["# Benchmarks", f"{NOTE} TFLOP/s count the op's definition, whoever runs it."]
    for group in by_device(rows):
        parts += [
            f"## {heading(group)}",
            markdown(head, [[_cell(row.get(key)) for key in keys] for row in group]),
        ]
    return "\n\n".join([*parts, *other_evidence(contents)]) + "\n"


NOTE = (
    "Times are of one call. x SDPA is the time over that of `scaled_dot_product_attention` on the same shape in the same run: below 1 is faster. "
    "Peak memory is beyond the inputs, the output included. U/N is the fraction of reference tokens that were matched."
)


def summary(rows: list[Row]) -> str:
    """One line for each op and shape: ours beside eager PyTorch and the reference."""
    head = (
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
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row.get("layout") != CONTIGUOUS:
            place = row["op"], *row["shape"], row.get("asked_fraction")
            groups.setdefault(place, {})[row["provider"]] = row
    lines = []
    for found in groups.values():
        for name in OURS:
            if name in found:
                mine, eager, reference = found[name], found.get("eager", {}), found.get("reference", {})
                cells = [
                    mine["op"],
                    mine["shape"],
                    name,
                    mine["p50_ms"],
                    mine["ratio_to_sdpa"],
                    eager.get("p50_ms"),
                    reference.get("p50_ms"),
                ]
                cells += [
                    mine["peak_mib"],
                    eager.get("peak_mib"),
                    reference.get("peak_mib"),
                    mine["unique_fraction"],
                ]
                lines.append([_cell(cell) for cell in cells])
    return f"**{heading(rows)}**\n\n{markdown(head, lines)}\n\n{NOTE}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def replace_section(readme: Path, text: str) -> None:
    before = readme.read_text()
    if BEGIN not in before or END not in before:
        raise ValueError(f"{readme}: expected the markers {BEGIN} and {END}, got a file without them")
    section = f"{BEGIN}\n{text}\n{END}"
    with replacing(readme) as unfinished:
        unfinished.write_text(
            re.sub(
                f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: section, before, count=1, flags=re.DOTALL
            )
        )


def plot(rows: list[Row], file: Path) -> None:
    """Time and peak memory against tokens for Q-Align in one call, one row of panels for each device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = by_device(rows)
    figure, panels = pyplot.subplots(len(groups), 2, figsize=(11, 4 * len(groups)), squeeze=False)
    for (time_panel, memory_panel), group in zip(panels, groups):
        by_chance = [row for row in group if row["op"] == PLOTTED_OP and row.get("asked_fraction") is None]
        chosen = [
            row
            for row in by_chance
            if (row["shape"][0], row["shape"][1], row["shape"][3]) == PLOTTED_HEADS
            and row.get("layout") != CONTIGUOUS
        ]
        for provider in dict.fromkeys(row["provider"] for row in chosen):
            own = sorted(
                (row for row in chosen if row["provider"] == provider), key=lambda row: row["shape"][2]
            )
            tokens = [row["shape"][2] for row in own]
            style = {
                "marker": "o",
                "linewidth": 2.5 if provider in OURS else 1.2,
                "linestyle": "--" if provider.startswith(SDPA) else "-",
            }
            time_panel.plot(tokens, [row["p50_ms"] for row in own], label=provider, **style)
            measured = [(n, row["peak_mib"]) for n, row in zip(tokens, own) if row["peak_mib"] is not None]
            if measured:
                memory_panel.plot(*zip(*measured), label=provider, **style)
        ticks = sorted({row["shape"][2] for row in chosen})
        _label(time_panel, heading(group), "ms per call", ticks)
        _label(memory_panel, f"{PLOTTED_OP}, [1, 8, N, 40]", "peak MiB beyond the inputs", ticks)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _label(panel: Any, title: str, axis: str, ticks: list[int]) -> None:
    panel.set(title=title, xlabel="tokens N", ylabel=axis, xscale="log", yscale="log")
    panel.set_xticks(ticks, labels=ticks)
    panel.set_xticks([], minor=True)
    panel.title.set_fontsize(9)
    panel.grid(True, which="both", alpha=0.3)
    if panel.lines:
        panel.legend()
