"""The report of `gpu --first`, from the files of its stages. A file may be missing."""

from collections.abc import Sequence
from pathlib import Path

from qalign_kernels.bench.measure import markdown

from ..suite.rows import Row, parse
from .must_show import DEFAULT, ratio
from .report import Content, read_stage, stage_table
from .running.sequence import Outcome

SHOWN_PROBLEMS = 25
SHOWN_KERNELS = 6  # of each shape


def text(folder: Path, outcomes: Sequence[Outcome]) -> str:
    """Lay out the stages, the wrong calls, the times of the main ops, their kernels, and the tiles."""
    names = ("right", "core", "kernels", "tiles", "gluon")
    right, core, kernels, tiles, gluon = (read_stage(folder / f"{name}.json", []) for name in names)
    parts = [
        stage_table(outcomes),
        f"## Right?\n\n{right_text(right)}",
        f"## Main ops, graph times\n\n{core_table(parse(core))}",
        f"## Kernels of one call, µs\n\n{kernel_table(kernels)}",
        f"## Tiles, time over the shipped one's\n\n{tile_table(tiles)}",
        f"## Ceilings, and what failed\n\n{other_lines([*kernels, *tiles])}",
        f"## Kernels for Hopper\n\n{gluon_lines(gluon)}",
    ]
    return "\n\n".join(parts) + "\n"


def right_text(rows: Sequence[Content]) -> str:
    """Count the correct calls, and list the calls that are wrong or failed."""
    wrong = [row for row in rows if not (row.get("right") and row.get("same_bits"))]
    lines = [f"{len(rows) - len(wrong)} of {len(rows)} calls are right and repeat bit by bit."]
    for row in wrong[:SHOWN_PROBLEMS]:
        tile = f" tile {row['tile']}" if row["tile"] else ""
        reason = row.get("error") or ("wrong" if not row["right"] else "two calls differ in bits")
        lines.append(f"- {row['op']} {row['shape']} {row['layout']} {row['dtype']}{tile}: {reason[:160]}")
    if len(wrong) > SHOWN_PROBLEMS:
        lines.append(f"- and {len(wrong) - SHOWN_PROBLEMS} more")
    return "\n".join(lines)


def core_table(rows: Sequence[Row]) -> str:
    """Lay out the main ops beside SDPA, with their share of the matmul that was timed between the rounds."""
    yardsticks = {tuple(row.shape): row for row in rows if (row.op, row.provider) == DEFAULT[0]}
    lines = []
    for row in rows:
        sdpa = yardsticks.get(tuple(row.shape))
        of_sdpa = ratio(row, sdpa) if sdpa else None
        time = "not captured" if row.graph_p50_ms is None else f"{1e3 * row.graph_p50_ms:.1f}"
        provider = f"{row.provider} ({row.implementation})" if row.implementation else row.provider
        figures = ("-" if value is None else f"{value:.2f}" for value in (of_sdpa, row.ceiling_share))
        host = "-" if row.host_us is None else f"{row.host_us:.0f}"
        lines.append((row.op, str(row.shape), provider, time, *figures, host))
    head = ("op", "[B, H, N, D]", "provider", "graph µs", "x SDPA", "of matmul", "host µs")
    return markdown(head, lines) if lines else "Not measured."


def kernel_table(rows: Sequence[Content]) -> str:
    """Lay out the longest kernels of each shape."""
    groups: dict[tuple, list[Content]] = {}
    for row in rows:
        if row["what"] == "kernel":
            groups.setdefault((row["op"], row["provider"], *row["shape"]), []).append(row)
    lines = []
    for (op, provider, *shape), found in groups.items():
        name = f"{provider} ({found[0]['implementation']})" if found[0]["implementation"] else provider
        for row in found[:SHOWN_KERNELS]:
            lines.append((op, name, str(shape), row["name"][:60], f"{row['us']:.1f}", f"{row['launches']:g}"))
    head = ("op", "provider", "[B, H, N, D]", "kernel", "µs", "launches")
    return markdown(head, lines) if lines else "Not measured."


def tile_table(rows: Sequence[Content]) -> str:
    """Lay out the tiles of each trial and shape, the fastest first."""
    found = [row for row in rows if row["what"] == "tile" and "us" in row]
    order = {
        name: position
        for position, name in enumerate(dict.fromkeys((row["op"], *row["shape"]) for row in found))
    }
    found.sort(key=lambda row: (order[(row["op"], *row["shape"])], row["us"]))
    lines = [
        (row["op"], str(row["shape"]), str(row["tile"]), f"{row['us']:.1f}", _relative(row)) for row in found
    ]
    return markdown(("op", "[B, H, N, D]", "tile", "µs", "of shipped"), lines) if lines else "Not measured."


def _relative(row: Content) -> str:
    return "shipped" if row["shipped"] else "-" if row["of_shipped"] is None else f"{row['of_shipped']:.3f}"


def other_lines(rows: Sequence[Content]) -> str:
    """List the ceilings and the steps that failed."""
    lines = [
        f"- {row['name']}: {row['value']:.0f} {row['unit']}"
        for row in rows
        if row["what"] in ("L2", "ceiling")
    ]
    lines += [
        f"- FAILED {row.get('name') or (row['op'], row['shape'], row['tile'])}: {row['error']}"
        for row in rows
        if "error" in row
    ]
    return "\n".join(lines) or "Not measured."


def gluon_lines(rows: Sequence[Content]) -> str:
    """List the general kernel and the kernel for Hopper at each shape."""
    lines = []
    for row in rows:
        kernel = (
            f"tile {row['tile']}{', shipped' if row['shipped'] else ''}"
            if row["tile"]
            else "the general kernel"
        )
        lines.append(f"- {row['what']} at {row['shape']}, {kernel}: {row.get('error') or _gluon_result(row)}")
    return "\n".join(lines) or "Not run."


def _gluon_result(row: Content) -> str:
    word = "" if row["right"] is None else "right, " if row["right"] else "WRONG, "
    return f"{word}{row['us']:.1f} µs, its kernel {row['kernel_us']:.1f} µs, {row['tflops']:.0f} TFLOP/s"
