"""Compile each kernel as it would be launched, on any machine, and read the machine code."""

import contextlib
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch

from ..suite import progress
from . import machine_code
from .budgets import hold_limits
from .machine_code import Loop, MachineCode
from .row import Row

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

TOKENS = (4096, 1000)  # no tile divides the second

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


def record(cases: list, scope: list[tuple[str, str, int]], quick: bool) -> tuple[list[Job], list[Row]]:
    """List every distinct compilation behind the launches of the cases.

    Core cases also run with a ragged number of tokens. `quick` leaves out the ragged ones, and on all targets
    but sm_90 the cases that are not core.

    Returns:
        The jobs, and a row with a problem for each case that did not launch.
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
                except Exception as error:  # a launcher may raise anything
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
    """Make the job that Triton's launcher would compile: signature, constants, and alignments."""
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
    """Compile in forked processes, which inherit the jobs; progress goes to stderr."""
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
    """Leave interrupts to the parent, which reports them in one line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _cancelling(pool: ProcessPoolExecutor) -> Iterator[None]:
    """On an interrupt, wait only for compilations that have begun."""
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
    except Exception as error:  # the compiler may raise anything
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
    """Give the class of source that Triton compiles; Gluon kernels begin at a later stage."""
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
    r"(?:tt\.dot|warp_group_dot|tc_gen5_mma) .* : "
    r"(?:tensor|!ttg\.memdesc)<(\d+)x(\d+)x.*?[*,] (?:tensor|!ttg\.memdesc)<\d+x(\d+)x"
)


def tiles_per_pass(ttgir: str, loop: Loop, block_n: int, num_warps: int) -> int:
    """Count the score tiles that one pass of the machine loop covers.

    The count is the unrolling in Triton (the loop's step) times the unrolling below it (multiply-adds).
    """
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
