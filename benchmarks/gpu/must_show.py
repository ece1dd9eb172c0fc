"""The limits and goals for one GPU, as data, and the verdict on measured rows."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..suite.rows import Row
from ..suite.shapes import PROCESSOR, UNIQUE_FRACTION, Shape, shape_named

Visit = tuple[str, str]  # op, provider
OURS = "triton"
DEFAULT: tuple[Visit, ...] = (("attention", "sdpa"),)
FA3: tuple[Visit, ...] = (("attention", "fa3"),)
FASTEST: tuple[Visit, ...] = (("attention", "sdpa cudnn"), ("attention", "fa3"))
EAGER: tuple[Visit, ...] = (("qalign_attention", "eager sdpa"),)
UNMASKED: tuple[Visit, ...] = (("attention", OURS),)
NOT_CAPTURED = "not captured"
BYTES_PER_ROW = 64  # allowed O(N) memory for each head of each token: maps, counts, log-sum-exps


class Bar(NamedTuple):
    """A limit. A limit on a ratio of times is against the fastest peer of `against` that was measured."""

    limit: float
    against: tuple[Visit, ...] = ()


class Line(NamedTuple):
    """One op at one shape, on data with this U/N: a limit on one of MEASURES, and goals beyond it."""

    what: str
    op: str
    shape: Shape
    measure: str
    must: Bar
    goals: tuple[Bar, ...]
    asked_fraction: float = UNIQUE_FRACTION


class Measure(NamedTuple):
    """How a limit is written, and whether more is better."""

    text: str
    more_is_better: bool = False


MEASURES = {
    "time ratio": Measure("≤ {limit:g} × {against}"),
    "ceiling share": Measure("≥ {limit:g} of the matmul", True),
    "speed-up": Measure("≥ {limit:g} × faster than {against}", True),
    "graph µs": Measure("≤ {limit:g} µs"),
    "memory ratio": Measure("≤ {limit:g} × (K+V) + O(N)"),
}


def _lines(what: str, op: str, names: str, measure: str, must: Bar, *goals: Bar, **how: Any) -> list[Line]:
    return [Line(what, op, shape_named(name), measure, must, goals, **how) for name in names.split()]


def _against_sdpa(what: str, op: str, names: str, must: float, goal: float, **how: Any) -> list[Line]:
    return _lines(what, op, names, "time ratio", Bar(must, DEFAULT), Bar(goal, DEFAULT), **how)


WHOLE = "whole qalign_attention, joint"
WIDE, NARROW, FLUX = "sdxl sd21-1024px", "sd15-512px sd15-low sd15-1024px", "flux"
HEAD_DIM_SHAPES = {40: "sd15-512px", 64: "sdxl", 80: "sd15-low", 128: "flux", 160: "sd15-mid"}
ATTENTION = {40: (0.85, 0.58), 64: (0.90, 0.68), 80: (0.75, 0.55), 128: (0.77, 0.62), 160: (0.75, 0.55)}
PER_HEAD = {64: (0.50, 0.65), 128: (0.65, 0.80)}
CONTRAST = {64: (1.5, 1.1), 128: (1.05, 0.85)}

LINES = [
    *_lines(
        WHOLE,
        "qalign_attention",
        WIDE,
        "time ratio",
        Bar(0.87, DEFAULT),
        Bar(0.65, DEFAULT),
        Bar(1.0, FASTEST),
    ),
    *_against_sdpa(WHOLE, "qalign_attention", NARROW, 0.80, 0.52),
    *_lines(
        WHOLE, "qalign_attention", FLUX, "time ratio", Bar(0.85, DEFAULT), Bar(0.65, DEFAULT), Bar(1.3, FA3)
    ),
    *_against_sdpa(
        f"{WHOLE}, U/N = 1", "qalign_attention", f"{WIDE} {NARROW} {FLUX}", 1.20, 0.95, asked_fraction=1.0
    ),
    *_lines(
        "joint similarity_argmax",
        "similarity_argmax",
        "sd15-512px sdxl flux",
        "ceiling share",
        Bar(0.60),
        Bar(0.80),
    ),
    *(
        line
        for op, kind in (("similarity_argmax_per_head", "exact"), ("similarity_argmax_packed", "packed"))
        for head_dim, (must, goal) in PER_HEAD.items()
        for line in _lines(
            f"per-head similarity_argmax, {kind}",
            op,
            HEAD_DIM_SHAPES[head_dim],
            "ceiling share",
            Bar(must),
            Bar(goal),
        )
    ),
    *(
        line
        for head_dim, (must, goal) in ATTENTION.items()
        for line in _against_sdpa("attention, all keys", "attention", HEAD_DIM_SHAPES[head_dim], must, goal)
    ),
    *(
        line
        for head_dim, (must, goal) in CONTRAST.items()
        for line in _against_sdpa(
            "contrast attention", "attention_contrast", HEAD_DIM_SHAPES[head_dim], must, goal
        )
    ),
    *_against_sdpa("guided refinement", "qalign_attention_guided", "sd15-512px sdxl", 1.5, 1.0),
    *_against_sdpa(
        "topk refinement, k = 8, with its similarity_topk",
        "qalign_attention_topk",
        "sd15-512px sdxl",
        0.9,
        0.5,
    ),
    *_lines(
        "two equal labels",
        "attention_half_labels",
        "sdxl sd15-512px",
        "time ratio",
        Bar(0.60, UNMASKED),
        Bar(0.54, UNMASKED),
    ),
    *_lines(
        "whole call under a CUDA graph",
        "qalign_attention",
        "sd15-mid sd15-low sd15-256px sdxl-low",
        "graph µs",
        Bar(40),
        Bar(20),
    ),
    *_lines(
        "against eager matmul, argmax, gather, SDPA",
        "qalign_attention",
        f"{WIDE} {NARROW} {FLUX}",
        "speed-up",
        Bar(3, EAGER),
        Bar(5, EAGER),
    ),
    *_lines(
        "peak extra memory", "qalign_attention", f"{WIDE} {NARROW} {FLUX}", "memory ratio", Bar(2), Bar(1)
    ),
]


class Verdict(NamedTuple):
    """The outcome for one line.

    Attributes:
        measured: figures for the limit and for each goal; None where a figure was not measured.
        mode: how the times were taken.
        text: the verdict in a word or two.
    """

    measured: tuple[float | None, ...]
    mode: str
    unique_fraction: float | None
    text: str


def judge(line: Line, rows: Sequence[Row]) -> Verdict:
    """Compare a line with the rows of inputs in the layout of attention processors."""
    place = line.shape.size, line.asked_fraction, PROCESSOR
    found = {
        (row.op, row.provider): row for row in rows if (row.shape, row.asked_fraction, row.layout) == place
    }
    mine = found.get((line.op, OURS))
    if mine is None:
        return Verdict((None,) * (1 + len(line.goals)), "-", None, "not measured")
    measured, modes = zip(*(_measure(line, bar, mine, found) for bar in (line.must, *line.goals)))
    absent = dict.fromkeys(
        provider for bar in line.goals for op, provider in bar.against if (op, provider) not in found
    )
    word = modes[0] if modes[0] == NOT_CAPTURED else _word(line, measured)
    text = f"{word}; without {', '.join(absent)}" if absent and measured[0] is not None else word
    return Verdict(measured, modes[0], mine.unique_fraction, text)


def _measure(line: Line, bar: Bar, mine: Row, found: dict[Visit, Row]) -> tuple[float | None, str]:
    """Give the figure that is compared with the bar, and the mode of its times."""
    if line.measure == "memory ratio":
        return memory_ratio(line.shape, mine), "-"
    peers = [found[visit] for visit in bar.against if visit in found]
    if bar.against and not peers:
        return None, "-"
    if mine.graph_p50_ms is None or any(row.graph_p50_ms is None for row in peers):
        return None, NOT_CAPTURED
    if line.measure == "graph µs":
        return 1e3 * mine.graph_p50_ms, "graph"
    if line.measure == "ceiling share":
        return mine.ceiling_share, "graph"
    value = max(filter(None, (ratio(mine, peer) for peer in peers)))  # to the fastest peer
    return (1 / value if line.measure == "speed-up" else value), "graph"


def ratio(mine: Row, other: Row) -> float | None:
    """Divide times of graphs.

    None where a graph was not captured: an eager time would measure the host, not the kernel.
    """
    if mine.graph_p50_ms is None or other.graph_p50_ms is None:
        return None
    return mine.graph_p50_ms / other.graph_p50_ms


def memory_ratio(shape: Shape, row: Row) -> float | None:
    """Divide the extra memory by the size of K and V, at two bytes a number.

    Extra memory is the peak beyond the inputs, the output, and BYTES_PER_ROW for each head of each token.
    """
    if row.peak_mib is None or row.output_mib is None:
        return None
    rows = shape.batch * shape.heads * shape.tokens
    extra_bytes = (row.peak_mib - row.output_mib) * 2**20 - BYTES_PER_ROW * rows
    return max(0.0, extra_bytes) / (2 * 2 * rows * shape.head_dim)


def _word(line: Line, measured: tuple[float | None, ...]) -> str:
    better = MEASURES[line.measure].more_is_better
    held = [
        None if value is None else value >= bar.limit if better else value <= bar.limit
        for value, bar in zip(measured, (line.must, *line.goals))
    ]
    must, *goals = held
    if must is None:
        return "not measured"
    if not must:
        return "MISSED"
    return "goal" if all(goals) else "must"


def describe(line: Line, bars: Iterable[Bar]) -> str:
    text = MEASURES[line.measure].text
    return ", ".join(text.format(limit=bar.limit, against=_names(bar.against)) for bar in bars)


def _names(visits: tuple[Visit, ...]) -> str:
    if visits == EAGER:
        return "eager"
    if visits == UNMASKED:
        return "unmasked"
    names = [
        "default SDPA" if provider == "sdpa" else provider.removeprefix("sdpa ") for _, provider in visits
    ]
    return names[0] if len(names) == 1 else f"the fastest of {', '.join(names)}"
