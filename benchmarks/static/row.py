"""The row of one compilation: as `--json` writes it, joined with rows of earlier runs, and as a line of the table."""

from dataclasses import asdict, dataclass, field
from typing import Any

from qalign_kernels.bench.measure import aligned


@dataclass
class Row:
    """What a compilation gave.

    `lane_instructions` is per score element of the hot loop; None where a kernel has no score loop. `undefined` names
    the uniform registers that are read before an instruction has written them, and `stray_descriptors` those with
    a wrong part of a descriptor for a wgmma; no budget allows either.
    """

    cases: list[str]
    kernel: str
    target: str
    dtype: str
    head_dim: int
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int = 0
    spill_bytes: int = 0
    narrow_loads: int = 0
    undefined: list[str] = field(default_factory=list)
    stray_descriptors: list[str] = field(default_factory=list)
    shared_kib: float = 0.0
    matrix: str = "-"
    seconds: float = 0.0
    lane_instructions: float | None = None
    problems: list[str] = field(default_factory=list)

    def tile(self) -> str:
        return "x".join(
            str(self.constexprs[name]) for name in ("BLOCK_M", "BLOCK_N") if name in self.constexprs
        )

    def flags(self) -> list[str]:
        return [name for name, value in self.constexprs.items() if value is True]


def result(row: Row) -> dict[str, Any]:
    """The row as `--json` writes it: of the constexprs the tile and the names of those that are set."""
    import triton

    written = {name: value for name, value in asdict(row).items() if name not in ("constexprs", "seconds")}
    return {"triton": triton.__version__, **written, "tile": row.tile(), "flags": row.flags()}


def merged(
    before: list[dict], results: list[dict], compiled: set[str], scope: set[tuple[str, str, int]]
) -> list[dict]:
    """`results` and what `before` has that was not compiled anew. A compilation that old cases and new ones share then has a row of each."""
    kept = []
    for row in before:
        anew = compiled if (row["target"], row["dtype"], row["head_dim"]) in scope else set()
        if cases := [name for name in row["cases"] if name not in anew]:
            kept.append(row | {"cases": cases})
    return sorted(
        [*kept, *results],
        key=lambda row: (row["cases"], row["kernel"], row["target"], row["dtype"], row["head_dim"]),
    )


def table(rows: list[Row]) -> str:
    head = (
        "case",
        "kernel",
        "flags",
        "target",
        "dtype",
        "d",
        "tile",
        "warps",
        "stages",
        "regs",
        "spills",
        "KiB",
        "matrix",
        "/score",
        "",
    )
    lines = []
    for row in rows:
        more = f" (+{len(row.cases) - 1})" if len(row.cases) > 1 else ""
        per_score = "-" if row.lane_instructions is None else f"{row.lane_instructions:.2f}"
        cells = (
            row.cases[0] + more, row.kernel, ",".join(row.flags()).lower(), row.target, row.dtype, row.head_dim, row.tile() or "-",
            row.num_warps, row.num_stages, row.registers, row.spill_bytes, f"{row.shared_kib:.1f}", row.matrix, per_score,
            "BROKEN" if row.problems else "ok",
        )  # fmt: skip
        lines.append(cells)
    return aligned(head, lines)
