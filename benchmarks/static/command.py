"""The static gate: compile every kernel as it would be launched, on any machine, and hold what came out against budgets."""

import argparse
import contextlib
import fnmatch
import importlib
import json
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from qalign_kernels import _command_line
from qalign_kernels._files import Files
from qalign_kernels.bench.measure import aligned

from ..suite import progress
from ..suite.rows import write
from . import machine_code
from .machine_code import Loop, MachineCode

READINGS = (_command_line.Reading(("update",), lambda arguments: arguments.json is not None, "with --json"),)
BUDGETS = Path(__file__).with_name("budgets.json")
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_103": ("cuda", 103, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_DIMS = (32, 40, 64, 80, 96, 128, 160)
TOKENS = (4096, 1000)  # the second is ragged: no tile divides it
QUICK = {"sm_90": 64, "sm_80": 64, "gfx942": 40}
EVERY_CASE_TARGET = "sm_90"


@dataclass
class Job:
    """One distinct compilation, and the cases that launch it."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    target: str
    dtype: str
    head_dim: int
    cases: list[str] = field(default_factory=list)

    def key(self) -> str:
        name = (self.kernel.fn.__module__, self.kernel.fn.__qualname__)
        return repr(
            (
                name,
                self.signature,
                self.constexprs,
                self.attributes,
                self.options["num_warps"],
                self.options["num_stages"],
                self.target,
            )
        )

    def named_constexprs(self) -> dict[str, Any]:
        return {
            self.kernel.arg_names[path[0]]: value for path, value in self.constexprs.items() if len(path) == 1
        }


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
        help="keep what FILE has of other cases, architectures, dtypes and head dims",
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
        help="the module whose CASES are driven (default benchmarks.static.cases)",
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
    """The (target, dtype, head dim) combinations asked for."""
    for target in arguments.target or (QUICK if arguments.quick else TARGETS):
        for dtype in arguments.dtype or (("bf16",) if arguments.quick else DTYPES):
            for head_dim in arguments.head_dim or (
                (QUICK.get(target, 64),) if arguments.quick else HEAD_DIMS
            ):
                yield target, dtype, head_dim


def record(cases: list, scope: list[tuple[str, str, int]], quick: bool) -> tuple[list[Job], list[Row]]:
    """Every distinct compilation behind the cases' launches, and a broken row for each case that did not launch.

    Core cases are also taken with a ragged number of tokens; `quick` takes no ragged ones, and core cases only off sm_90.
    """
    from qalign_kernels._triton._launch import recording

    jobs: dict[str, Job] = {}
    broken = []
    for target, dtype, head_dim in scope:
        for case in cases:
            if quick and not case.core and target != EVERY_CASE_TARGET:
                continue
            for count in TOKENS if case.core and not quick else TOKENS[:1]:
                try:
                    with recording(target) as launches:
                        case.run(head_dim, DTYPES[dtype], count)
                except Exception as error:  # whatever a launcher raises is a finding
                    problem = (
                        f"does not launch on meta tensors: {type(error).__name__}: {error}".splitlines()[0]
                    )
                    broken.append(
                        Row([case.name], "-", target, dtype, head_dim, {}, 0, 0, problems=[problem])
                    )
                    break
                for launch in launches:
                    job = specialise(launch, target, dtype, head_dim)
                    found = jobs.setdefault(job.key(), job)
                    if case.name not in found.cases:
                        found.cases.append(case.name)
    return list(jobs.values()), broken


def specialise(launch: Any, target: str, dtype: str, head_dim: int) -> Job:
    """The compilation that Triton's own launcher would ask for: signature, constants and alignments of the recorded arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget(*TARGETS[target]))
    kernel = launch.kernel
    bound, specialisation, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(
        **launch.arguments
    )
    choices = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    options, signature, constexprs, attributes = kernel._pack_args(
        backend, choices, bound, specialisation, {}
    )
    return Job(kernel, signature, constexprs, attributes, dict(options.__dict__), target, dtype, head_dim)


_jobs: list[Job] = []


def compile_all(jobs: list[Job], budgets: dict, processes: int) -> list[Row]:
    """Compile over forked processes, which inherit the jobs; progress goes to stderr."""
    global _jobs
    _jobs = jobs
    rows: list[Row] = []
    options: dict[str, Any] = {"mp_context": get_context("fork"), "initializer": _leave_interrupts}
    with ProcessPoolExecutor(max(1, min(processes, len(jobs) or 1)), **options) as pool, _cancelling(pool):
        futures = {pool.submit(_compile, position): job for position, job in enumerate(jobs)}
        for future in as_completed(futures):
            job = futures[future]
            try:
                row = future.result()
            except BrokenProcessPool:
                row = _row(job)
                row.problems.append("the compiler ended its process")
            hold_limits(row, budgets)
            rows.append(row)
            progress.show(
                len(rows),
                len(jobs),
                f"{row.target} {row.dtype} d={row.head_dim} {row.kernel} {row.cases[0]}, {row.seconds:.1f} s",
            )
    return rows


def _leave_interrupts() -> None:
    """To the parent, which says in one line that it was interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _cancelling(pool: ProcessPoolExecutor) -> Iterator[None]:
    """An interrupt waits for what is compiled now, and for nothing else."""
    try:
        yield
    except KeyboardInterrupt:
        pool.shutdown(cancel_futures=True)
        raise


def _row(job: Job) -> Row:
    options = job.options
    return Row(
        job.cases,
        job.kernel.fn.__name__,
        job.target,
        job.dtype,
        job.head_dim,
        job.named_constexprs(),
        options["num_warps"],
        options["num_stages"],
    )


def _compile(position: int) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget

    job = _jobs[position]
    row = _row(job)
    start = time.perf_counter()
    source = _source_class(job.kernel)(job.kernel, job.signature, job.constexprs, job.attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[job.target]), options=job.options)
    except Exception as error:  # whatever the compiler raises is a finding
        row.problems.append(f"does not compile: {type(error).__name__}: {error}".splitlines()[0])
        return row
    row.seconds = round(time.perf_counter() - start, 2)
    code = read(compiled)
    record_resources(row, code)
    row.matrix = machine_code.matrix_family(code.matrix())
    if row.matrix == "-" and "tt.dot " in compiled.asm.get("ttir", ""):
        row.matrix = "none"
    loop, num_warps = code.hot_loop(), compiled.metadata.num_warps
    if loop and "BLOCK_M" in row.constexprs and "BLOCK_N" in row.constexprs:
        block_m, block_n = row.constexprs["BLOCK_M"], row.constexprs["BLOCK_N"]
        scores = block_m * block_n * tiles_per_pass(compiled.asm["ttgir"], loop, block_n, num_warps)
        row.lane_instructions = round(loop.instructions * code.lanes * num_warps / scores, 2)
    return row


def _source_class(kernel: Any) -> Any:
    """What Triton compiles of a kernel; its Gluon kernels begin at a later stage."""
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def record_resources(row: Row, code: MachineCode) -> None:
    row.registers, row.spill_bytes, row.shared_kib = (
        code.registers,
        code.spill_bytes,
        code.shared_bytes / 1024,
    )
    row.narrow_loads, row.undefined = code.narrow_loads(), code.undefined()
    row.stray_descriptors = code.stray_descriptors()


def read(compiled: Any) -> MachineCode:
    from triton import knobs

    if "amdgcn" in compiled.asm:
        return machine_code.read_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)
    return machine_code.read_cubin(
        compiled.asm["cubin"], knobs.nvidia.cuobjdump.path, compiled.metadata.shared
    )


_FOR = re.compile(r"^(\s*)(?:%\S+ = )?scf\.for .* step %c(\d+)\w*")
_DOT = re.compile(
    r"(?:tt\.dot|warp_group_dot|tc_gen5_mma) .* : (?:tensor|!ttg\.memdesc)<(\d+)x(\d+)x.*?[*,] (?:tensor|!ttg\.memdesc)<\d+x(\d+)x"
)


def tiles_per_pass(ttgir: str, loop: Loop, block_n: int, num_warps: int) -> int:
    """How many score tiles one pass of the machine loop covers: unrolling in Triton (its step) times unrolling below it (multiply-adds)."""
    loops: list[tuple[int, int]] = []  # multiply-adds, step
    open_loops: list[list[int]] = []  # indent, step, multiply-adds
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if match := _FOR.match(line):
            open_loops.append([len(match.group(1)), int(match.group(2)), 0])
        elif open_loops and line.strip().startswith("}") and indent == open_loops[-1][0]:
            _, step, work = open_loops.pop()
            loops.append((work, step))
        elif open_loops and (match := _DOT.search(line)):
            m, k, n = map(int, match.groups())
            open_loops[-1][2] += m * k * n
    work, step = max(loops, default=(0, block_n))
    unrolled = step // block_n if step % block_n == 0 else 1
    done = [machine_code.multiply_adds(name, num_warps) for name in loop.matrix]
    below = round(sum(x for x in done if x) / work) if work and None not in done else 1
    return unrolled * max(1, below)


def hold_limits(row: Row, budgets: dict) -> None:
    """Add what breaks the limits that every kernel has.

    They hold undefined registers, stray descriptors, spills, narrow loads, shared memory and matrix instructions.
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
            f"loads {row.narrow_loads} times 2 bytes or less, at most {budgets['narrow_loads']} allowed for aligned tensors"
        )
    limit = budgets["shared_memory_kib"][row.target]
    if row.shared_kib > limit:
        row.problems.append(f"wants {row.shared_kib:.0f} KiB of shared memory, a block has {limit}")
    expected = budgets["matrix_instruction"][row.target]
    if row.matrix != "-" and not fnmatch.fnmatch(row.matrix, expected):
        row.problems.append(f"multiplies matrices by {row.matrix}, expected {expected}")


def most_spills(row: Row, budgets: dict) -> int:
    """How many bytes a kernel may spill: more than the others where a GPU showed that it is faster so."""
    measured = (
        spill["bytes"]
        for spill in budgets.get("measured_spills", [])
        if (spill["target"], spill["head_dim"]) == (row.target, row.head_dim)
        and any(case.startswith(spill["case"]) for case in row.cases)
    )
    return max(budgets["spill_bytes"], *measured, 0)


_PLACE = ("target", "dtype", "head_dim")


def instruction_limit(budget: dict, version: str) -> float | None:
    """The most lane-instructions per score that a budget allows under this Triton; None for one that it does not name.

    Every minor version makes other machine code, so each has a limit of its own.
    """
    return budget["limits"].get(machine_code.minor_version(version))


def hold_instruction_budgets(rows: list[Row], budgets: dict, version: str) -> list[str]:
    """Add what breaks a budget of lane-instructions; returns the budgets that found nothing although their case was compiled."""
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
                    f"{row.lane_instructions} lane-instructions per score, at most {limit} allowed for {budget['case']}"
                )
        if scope and all(row.lane_instructions is None for row in held):
            unmatched.append(f"budget for {budget['case']} on {budget['target']} matches no score loop")
    return unmatched


def unheld_version(budgets: dict, version: str) -> str | None:
    """That this Triton has no budgets of instructions, if so: a gate that holds nothing must say it."""
    if any(instruction_limit(budget, version) for budget in budgets["lane_instructions"]):
        return None
    return f"Triton {version}: expected a minor version that budgets.json names, so no budget of instructions is held"


def _fits(row: Row, budget: dict) -> bool:
    wanted = budget.get("constexprs", {})
    return fnmatch.fnmatch(row.kernel, budget.get("kernel", "*")) and all(
        row.constexprs.get(name) == value for name, value in wanted.items()
    )


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
