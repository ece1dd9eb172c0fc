"""Hold compiled kernels against the limits of budgets.json."""

import fnmatch
from pathlib import Path

from . import machine_code
from .row import Row

BUDGETS = Path(__file__).with_name("budgets.json")


def hold_limits(row: Row, budgets: dict) -> None:
    """Add the problems of a row with the limits of all kernels.

    The limits are on undefined registers, stray descriptors, spills, narrow loads, shared memory and matrix
    instructions.
    """
    if row.undefined:
        row.problems.append(f"reads uniform registers before anything writes them: {' '.join(row.undefined)}")
    if row.stray_descriptors:
        registers = " ".join(row.stray_descriptors)
        row.problems.append(
            f"multiplies matrices at descriptors whose upper words are no constants: {registers}"
        )
    if row.spill_bytes > (most := most_spills(row, budgets)):
        row.problems.append(f"spills {row.spill_bytes} bytes, at most {most} allowed")
    if row.narrow_loads > budgets["narrow_loads"]:
        row.problems.append(
            f"loads {row.narrow_loads} times 2 bytes or less, "
            f"at most {budgets['narrow_loads']} allowed for aligned tensors"
        )
    limit = budgets["shared_memory_kib"][row.target]
    if row.shared_kib > limit:
        row.problems.append(f"wants {row.shared_kib:.0f} KiB of shared memory, a block has {limit}")
    expected = budgets["matrix_instruction"][row.target]
    if row.matrix != "-" and not fnmatch.fnmatch(row.matrix, expected):
        row.problems.append(f"multiplies matrices by {row.matrix}, expected {expected}")


def most_spills(row: Row, budgets: dict) -> int:
    """Give the bytes that a kernel may spill; some may spill more, because a GPU measured it to be faster."""
    measured = (
        spill["bytes"]
        for spill in budgets.get("measured_spills", [])
        if (spill["target"], spill["head_dim"]) == (row.target, row.head_dim)
        and any(case.startswith(spill["case"]) for case in row.cases)
    )
    return max(budgets["spill_bytes"], *measured, 0)


_PLACE = ("target", "dtype", "head_dim")


def instruction_limit(budget: dict, version: str) -> float | None:
    """Give the most lane-instructions per score that a budget allows under this Triton.

    Every minor version generates other machine code, so each has a limit of its own; None where it has none.
    """
    return budget["limits"].get(machine_code.minor_version(version))


def hold_instruction_budgets(rows: list[Row], budgets: dict, version: str) -> list[str]:
    """Add the problems of the rows with budgets of lane-instructions.

    Returns:
        A line for each budget that matched no row, although its case was compiled.
    """
    unmatched = []
    for budget in budgets["lane_instructions"]:
        limit = instruction_limit(budget, version)
        if limit is None:
            continue
        scope = [
            row
            for row in rows
            if budget["case"] in row.cases and all(getattr(row, name) == budget[name] for name in _PLACE)
        ]
        held = [row for row in scope if _fits(row, budget)]
        for row in held:
            if row.lane_instructions is not None and row.lane_instructions > limit:
                row.problems.append(
                    f"{row.lane_instructions} lane-instructions per score, "
                    f"at most {limit} allowed for {budget['case']}"
                )
        if scope and all(row.lane_instructions is None for row in held):
            unmatched.append(f"budget for {budget['case']} on {budget['target']} matches no score loop")
    return unmatched


def unheld_version(budgets: dict, version: str) -> str | None:
    """Say that this Triton has no budgets of instructions, or give None where it has some."""
    if any(instruction_limit(budget, version) for budget in budgets["lane_instructions"]):
        return None
    expected = "expected a minor version that budgets.json names"
    return f"Triton {version}: {expected}, so no budget of instructions is held"


def _fits(row: Row, budget: dict) -> bool:
    wanted = budget.get("constexprs", {})
    return fnmatch.fnmatch(row.kernel, budget.get("kernel", "*")) and all(
        row.constexprs.get(name) == value for name, value in wanted.items()
    )
