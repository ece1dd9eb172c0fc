"""Write report.md from the files of the stages. A file may be missing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qalign_kernels.bench.measure import markdown

from ..static import evidence
from ..suite.rows import Row, parse
from ..suite.shapes import PROCESSOR
from .must_show import LINES, NOT_CAPTURED, Line, Verdict, describe, judge, ratio
from .running.journal import Journal
from .running.sequence import Outcome

Content = dict[str, Any]
PLANS = ("must_show", "speed")
PEERS = (
    ("attention", "sdpa"),
    ("attention", "sdpa cudnn"),
    ("attention", "sdpa flash"),
    ("attention", "fa3"),
    ("attention", "flex"),
)
NOTE = (
    "Times are of single calls with an empty L2 cache, medians over rounds in which providers take turns. "
    "Eager calls launch kernel by kernel; graph times are of a replayed CUDA graph. Ratios divide times of "
    "graphs of the same inputs in the same process: below 1 is faster. TFLOP/s count the op's definition "
    "for every provider. Shares are of a large matmul that was timed between the same rounds. Inputs are "
    "[B, N, H, D] in memory, except where the op says contiguous. U/N is the measured fraction of "
    "reference tokens that were matched."
)


def text(folder: Path, outcomes: Sequence[Outcome]) -> str:
    """Lay out the whole report."""
    environment, ceilings = (
        read_stage(folder / "environment.json", {}),
        read_stage(folder / "ceilings.json", {}),
    )
    must_rows, rows = (parse(read_stage(folder / f"{plan}.json", [])) for plan in PLANS)
    parts = [
        f"# {_heading(environment)}",
        stage_table(outcomes),
        f"## Must show\n\n{must_show_table(must_rows)}\n\n{NOTE}",
        f"## Ceilings\n\n{ceiling_table(ceilings)}",
        f"## Speed\n\n{speed_table([must_rows, rows])}",
        f"## Peak extra memory, MiB, output included\n\n{memory_table(rows)}",
        f"## Accuracy\n\n{_accuracy(folder)}",
        f"## compute-sanitizer\n\n{_sanitizer(read_stage(folder / 'sanitizer.json', {}))}",
        f"## Not shown, and why\n\n{_notes(folder)}",
        f"## Machine\n\n```json\n{json.dumps(environment, indent=1)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def read_stage(file: Path, otherwise: Any) -> Any:
    """Read the file of a stage, or give `otherwise` where there is none."""
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return otherwise


def _heading(environment: Content) -> str:
    if not environment:
        return "GPU run, machine unknown"
    return "{device}, {capability}, PyTorch {torch}, Triton {triton}, commit {commit}".format(**environment)


def stage_table(outcomes: Sequence[Outcome]) -> str:
    return markdown(
        ("stage", "status", "s", ""), [(x.stage, x.status, f"{x.seconds:.0f}", x.note) for x in outcomes]
    )


def ceiling_table(ceilings: Content) -> str:
    rows = ceilings.get("rows", [])
    if not rows:
        return "Not measured."
    cells = [(row["name"], f"{row['value']:.4g}", row["unit"], _clock(row)) for row in rows]
    return "\n\n".join(
        [
            markdown(("ceiling", "measured", "unit", "SM MHz while it ran"), cells),
            *ceilings.get("problems", []),
        ]
    )


def _clock(row: Content) -> str:
    if row.get("sm_mhz"):
        return f"{row['sm_mhz']:.0f}"
    return " ".join(f"{value:.0f}" for value in row.get("sm_mhz_while_running") or []) or "-"


def must_show_table(rows: Sequence[Row]) -> str:
    verdicts = [judge(line, rows) for line in LINES]
    cells = [_line_cells(line, verdict) for line, verdict in zip(LINES, verdicts)]
    words = [verdict.text.split(";")[0] for verdict in verdicts]
    total = ", ".join(f"{words.count(word)} {label}" for word, label in COUNTED)
    head = ("what", "[B, H, N, D]", "U/N", "must", "goal", "measured", "mode", "verdict")
    return f"{markdown(head, cells)}\n\n{len(LINES)} lines: {total}."


COUNTED = (
    ("goal", "reach the goal"),
    ("must", "hold the must"),
    ("MISSED", "miss it"),
    (NOT_CAPTURED, NOT_CAPTURED),
    ("not measured", "not measured"),
)


def _line_cells(line: Line, verdict: Verdict) -> tuple[str, ...]:
    fraction = "-" if verdict.unique_fraction is None else f"{verdict.unique_fraction:.3f}"
    figures = list(
        dict.fromkeys("not measured" if value is None else f"{value:.3g}" for value in verdict.measured)
    )
    sizes = str(line.shape.size)
    return (
        line.what,
        sizes,
        fraction,
        describe(line, [line.must]),
        describe(line, line.goals),
        " / ".join(figures),
        verdict.mode,
        verdict.text,
    )


def speed_table(runs: Sequence[Sequence[Row]]) -> str:
    """Lay out every row; ratios are between rows of the same run."""
    groups: dict[tuple, list[Row]] = {}
    for number, rows in enumerate(runs):
        for row in rows:
            groups.setdefault((number, *row.shape, row.asked_fraction, row.layout), []).append(row)
    if not groups:
        return "Not measured."
    cells = []
    for group in groups.values():
        yardsticks = {(row.op, row.provider): row for row in group}
        cells += [_speed_cells(row, yardsticks) for row in group]
    head = (
        "op",
        "[B, H, N, D]",
        "U/N",
        "provider",
        "eager ms (p20 p50 p80)",
        "graph ms",
        "TFLOP/s",
        "of matmul",
        *_peer_names(),
        "peak MiB",
    )
    return markdown(head, cells)


def _peer_names() -> list[str]:
    return [f"x {provider}" for _, provider in PEERS]


def _speed_cells(row: Row, yardsticks: dict[tuple[str, str], Row]) -> tuple[str, ...]:
    ratios = [ratio(row, yardsticks[peer]) if peer in yardsticks else None for peer in PEERS]
    fraction = row.unique_fraction if row.unique_fraction is not None else row.asked_fraction
    eager = " ".join(_figure(value) for value in (row.p20_ms, row.p50_ms, row.p80_ms))
    eager += " host-bound" if row.host_bound else ""
    graph = NOT_CAPTURED if row.graph_p50_ms is None else _figure(row.graph_p50_ms)
    figures = (_figure(x) for x in (row.graph_tflops, row.ceiling_share, *ratios, row.peak_mib))
    op = row.op if row.layout == PROCESSOR else f"{row.op} {row.layout}"
    provider = f"{row.provider} ({row.implementation})" if row.implementation else row.provider
    return op, str(row.shape), _figure(fraction), provider, eager, graph, *figures


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def memory_table(rows: Sequence[Row]) -> str:
    """Lay out the memory of qalign_attention and attention against the number of tokens."""
    shown = [
        row
        for row in rows
        if row.op in ("qalign_attention", "attention")
        and row.peak_mib is not None
        and (row.asked_fraction, row.layout) == (None, PROCESSOR)
    ]
    columns = list(dict.fromkeys((row.op, row.provider) for row in shown))
    groups: dict[tuple, dict[tuple, float | None]] = {}
    for row in sorted(shown, key=lambda row: (row.shape[3], row.shape[1], row.shape[2])):
        groups.setdefault(tuple(row.shape), {})[row.op, row.provider] = row.peak_mib
    if not groups:
        return "Not measured."
    head = ("[B, H, N, D]", *(f"{op} {provider}" for op, provider in columns))
    return markdown(
        head,
        [
            (str(list(shape)), *(_figure(found.get(column)) for column in columns))
            for shape, found in groups.items()
        ],
    )


def _accuracy(folder: Path) -> str:
    validation = read_stage(folder / "validate.json", {})
    if not validation.get("rows"):
        return "Not measured."
    unfinished = [f"{name} ({reason})" for name, reason in validation.get("unfinished", {}).items()]
    failures = [f"- {failure}" for row in validation["rows"] for failure in row["failures"][:3]]
    dropped = validation.get("dropped", [])
    parts = [
        evidence.accuracy(validation),
        "\n".join(failures),
        f"Unfinished: {', '.join(unfinished)}." if unfinished else "",
        f"Not run for lack of memory: {'; '.join(dropped)}." if dropped else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _sanitizer(content: Content) -> str:
    if not content.get("rows"):
        return f"{content.get('note', 'not run')}."
    cells = [
        (row["tool"], row["part"], len(row["calls"]), row["seconds"], row["verdict"])
        for row in content["rows"]
    ]
    return markdown(("tool", "part of the ops", "calls", "s", "verdict"), cells)


def _notes(folder: Path) -> str:
    journals = [Journal(folder / "logs" / f"{plan}.journal") for plan in PLANS]
    failures, notes = (
        [text for journal in journals for text in journal.texts(kind)] for kind in ("failure", "note")
    )
    lines = [*(f"- FAILED: {text}" for text in failures), *(f"- {text}" for text in notes)]
    return "\n".join(dict.fromkeys(lines)) or "Nothing."
