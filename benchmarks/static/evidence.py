"""Tables of accuracy and of machine code, from what `validate --json` and `static --json` wrote."""

import fnmatch
from typing import Any

from qalign_kernels.bench.measure import markdown

from .machine_code import minor_version

Row = dict[str, Any]
MEASURED_DTYPES = ("float32", "float16", "bfloat16")


def accuracy(validation: Row) -> str:
    """Lay out the worst error of each op, backend and dtype, and the share of its budget."""
    rows: dict[tuple[str, str], dict[str, Row]] = {}
    for row in validation["rows"]:
        rows.setdefault((row["op"], row["backend"]), {})[row["dtype"]] = row
    lines = [[*key, *(_error(found.get(dtype)) for dtype in MEASURED_DTYPES)] for key, found in rows.items()]
    cases, failed = (
        sum(row["cases"] for row in validation["rows"]),
        sum(len(row["failures"]) for row in validation["rows"]),
    )
    note = (
        f"{cases} cases, {failed} failed. Largest error against float64; "
        "in brackets the share of its budget that the worst case takes."
    )
    table = markdown(("op", "backend", *MEASURED_DTYPES), lines)
    return f"**{'; '.join(validation['device'])}**\n\n{table}\n\n{note}"


def _error(row: Row | None) -> str:
    if row is None:
        return "-"
    return (
        ("exact" if row["error"] == 0 else f"{row['error']:.1e} ({row['ratio']:.2f})")
        if row["passed"]
        else "FAILED"
    )


def machine_code(rows: list[Row], budgets: Row) -> str:
    """Lay out one line for each architecture, dtype and Triton, the pinned Triton first.

    A second table has the kernels with a budget, under the pinned Triton.
    """
    rows = sorted(
        rows, key=lambda row: (minor_version(row["triton"]) != budgets["pinned_triton"], row["triton"])
    )
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["dtype"], row["triton"]), []).append(row)
    lines = [_target_line(key, found, budgets) for key, found in groups.items()]
    head = (
        "architecture",
        "dtype",
        "Triton",
        "kernels compiled",
        "most registers",
        "with spills",
        "most shared KiB",
        "budgets broken",
    )
    held = [
        [
            " ".join([budget["case"], *([budget["kernel"]] if "kernel" in budget else [])]),
            budget["target"],
            row["tile"],
            row["registers"],
            row["lane_instructions"],
            budget["limits"][budgets["pinned_triton"]],
        ]
        for budget in budgets["lane_instructions"]
        for row in rows
        if minor_version(row["triton"]) == budgets["pinned_triton"] and _is_budgeted(row, budget)
    ]
    kernel = f"kernel (bf16, d = 64, Triton {budgets['pinned_triton']})"
    names = (kernel, "architecture", "tile", "registers", "lane-instructions per score", "budget")
    return f"{markdown(head, lines)}\n\n{markdown(names, held)}"


def _target_line(key: tuple[str, str, str], rows: list[Row], budgets: Row) -> list[object]:
    registers, shared_kib = (max(row[name] for row in rows) for name in ("registers", "shared_kib"))
    spilling, broken = (sum(bool(row[name]) for row in rows) for name in ("spill_bytes", "problems"))
    shared = f"{shared_kib:.0f} of {budgets['shared_memory_kib'][key[0]]}"
    return [*key, len(rows), registers, spilling, shared, broken]


def _is_budgeted(row: Row, budget: Row) -> bool:
    same = all(row[name] == budget[name] for name in ("target", "dtype", "head_dim"))
    held = fnmatch.fnmatch(row["kernel"], budget.get("kernel", "*"))
    flags = all((flag in row["flags"]) == value for flag, value in budget.get("constexprs", {}).items())
    return same and held and flags and budget["case"] in row["cases"] and row["lane_instructions"] is not None
