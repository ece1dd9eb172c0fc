"""The row of one compilation: its fields, its JSON, and its line in the table."""

from dataclasses import asdict, dataclass, field
from typing import Any

from qalign_kernels.bench.measure import aligned


@dataclass
class Row:
    """The outcome of one compilation.

    Attributes:
        lane_instructions: per score element of the hot loop; None where a kernel has no score loop.
        undefined: uniform registers that are read before an instruction has written them. No budget allows
            any.
        stray_descriptors: uniform registers that hold a wrong part of a descriptor for a wgmma. No budget
            allows any.
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
    """Give the row as `--json` writes it, with the tile and the flags in place of the constexprs."""
    import triton

    written = {name: value for name, value in asdict(row).items() if name not in ("constexprs", "seconds")}
    return {"triton": triton.__version__, **written, "tile": row.tile(), "flags": row.flags()}


def merged(
    before: list[dict], results: list[dict], compiled: set[str], scope: set[tuple[str, str, int]]
) -> list[dict]:
    """Join new rows with the old rows that were not compiled again.

    A compilation of old and new cases then has two rows.
    """
    kept = []
    for row in before:
        anew = compiled if (row["target"], row["dtype"], row["head_dim"]) in scope else set()
        if cases := [name for name in row["cases"] if name not in anew]:
            kept.append(row | {"cases": cases})
    return sorted(
        [*kept, *results],
        key=lambda row: (row["cases"], row["kernel"], row["target"], row["dtype"], row["head_dim"]),
    )


HEAD = (
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


def table(rows: list[Row]) -> str:
    """Lay out the rows."""
    return aligned(HEAD, [_cells(row) for row in rows])


def _cells(row: Row) -> tuple[object, ...]:
    more = f" (+{len(row.cases) - 1})" if len(row.cases) > 1 else ""
    what = row.cases[0] + more, row.kernel, ",".join(row.flags()).lower()
    place = row.target, row.dtype, row.head_dim, row.tile() or "-", row.num_warps, row.num_stages
    resources = row.registers, row.spill_bytes, f"{row.shared_kib:.1f}", row.matrix
    per_score = "-" if row.lane_instructions is None else f"{row.lane_instructions:.2f}"
    return *what, *place, *resources, per_score, "BROKEN" if row.problems else "ok"
