"""The static gate: compile every kernel as it would be launched, and hold it to budgets. Needs no GPU."""

import argparse
import importlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from qalign_kernels import _command_line
from qalign_kernels._files import Files

from ..suite.rows import write
from .budgets import BUDGETS, hold_instruction_budgets, unheld_version
from .compilation import DTYPES, HEAD_DIMS, TARGETS, compile_all, record
from .row import merged, result, table

READINGS = (_command_line.Reading(("update",), lambda arguments: arguments.json is not None, "with --json"),)

QUICK = {"sm_90": 64, "sm_80": 64, "gfx942": 40}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        nargs="+",
        choices=TARGETS,
        metavar="ARCH",
        help=f"architectures (default all: {' '.join(TARGETS)})",
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="bf16, fp16 or both (default)")
    dims = " ".join(map(str, HEAD_DIMS))
    parser.add_argument(
        "--head-dim", nargs="+", type=int, choices=HEAD_DIMS, metavar="D", help=f"head dims (default {dims})"
    )
    parser.add_argument(
        "--op", nargs="+", metavar="NAME", help="cases whose name contains one of these words"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="bf16: every case on sm_90 at d = 64, the core cases on sm_80 at 64 and gfx942 at 40",
    )
    jobs = "compile in N processes (default: one per core)"
    parser.add_argument("--jobs", type=_command_line.count, default=os.cpu_count(), metavar="N", help=jobs)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument(
        "--update",
        action="store_true",
        help="keep the rows of FILE for other cases, architectures, dtypes and head dims",
    )
    parser.add_argument(
        "--budgets",
        type=Path,
        default=BUDGETS,
        metavar="FILE",
        help="limits to hold (default benchmarks/static/budgets.json)",
    )
    parser.add_argument(
        "--cases",
        default="benchmarks.static.cases",
        metavar="MODULE",
        help="the module whose CASES are compiled (default benchmarks.static.cases)",
    )


def files(arguments: argparse.Namespace) -> Files:
    return Files(
        reads=[("--budgets", arguments.budgets)],
        writes=[("--json", arguments.json)] if arguments.json else [],
    )


def run(arguments: argparse.Namespace) -> int:
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on"):
        raise ValueError(
            "TRITON_INTERPRET: expected unset, because interpreted kernels cannot be compiled, got it set"
        )
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton

    budgets = json.loads(arguments.budgets.read_text())
    cases = [
        case for case in importlib.import_module(arguments.cases).CASES if _named(case.name, arguments.op)
    ]
    if not cases:
        raise ValueError(f"--op: expected part of a case name, got {' '.join(arguments.op)}")
    scope = list(_scope(arguments))
    jobs, rows = record(cases, scope, arguments.quick)
    try:
        rows += compile_all(jobs, budgets, arguments.jobs)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command takes what was compiled from Triton's cache") from None
    rows.sort(key=lambda row: (row.cases, row.kernel, row.target, row.dtype, row.head_dim))
    unmatched = hold_instruction_budgets(rows, budgets, triton.__version__)
    print(table(rows))
    if arguments.json:
        results = [result(row) for row in rows]
        if arguments.update and arguments.json.is_file():
            results = merged(
                json.loads(arguments.json.read_text()), results, {case.name for case in cases}, set(scope)
            )
        write(arguments.json, results)
    broken = [
        f"{row.target} {row.dtype} d={row.head_dim} {row.cases[0]} ({row.kernel}): {problem}"
        for row in rows
        for problem in row.problems
    ]
    broken += unmatched
    print(f"\n{len(rows)} compilations, {len(broken)} budgets broken")
    if unheld := unheld_version(budgets, triton.__version__):
        print(f"  {unheld}")
    for line in broken:
        print(f"  {line}")
    return 1 if broken else 0


def _named(name: str, words: list[str] | None) -> bool:
    return not words or any(word in name for word in words)


def _scope(arguments: argparse.Namespace) -> Iterable[tuple[str, str, int]]:
    """List the chosen combinations of target, dtype and head dim."""
    for target in arguments.target or (QUICK if arguments.quick else TARGETS):
        for dtype in arguments.dtype or (("bf16",) if arguments.quick else DTYPES):
            for head_dim in arguments.head_dim or (
                (QUICK.get(target, 64),) if arguments.quick else HEAD_DIMS
            ):
                yield target, dtype, head_dim
