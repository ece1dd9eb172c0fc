"""Compare every op with float64 on this machine: `python -m qalign_kernels.validate`.

A row of the table is one op, backend and dtype over several shapes. The error is the largest absolute
difference from the reference formula in float64. The budget is the error of the same formula in plain PyTorch
and in the dtype under test, plus a slack from eps and the length of the sums (see `qalign_kernels.testing`).
Memory that an op allocates is filled with NaN first. On a GPU each call is repeated without the NaN: its
results must be within the budget too, and the same bit by bit.

Without a GPU the Triton kernels run in Triton's interpreter, in float32 and float16. The exit status is 0 if
all errors are within the budget, 1 if not, 2 for bad arguments and 130 for Ctrl-C. The file of --json is
written after every op, so that Ctrl-C keeps the rows so far.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import __version__, _backends, _command_line
from .._files import Files, drafting
from ..testing import Verdict, judge, judge_exact, judge_match, poisoned_memory
from .cases import OPS, Case
from .draw import LARGE, Draw, Shape

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
COLUMNS = "{:42s} {:9s} {:8s} {:>5}  {:>9s}  {:>9s}  {:>12s}  {:7s} {:>6s}"


class OpResult(NamedTuple):
    """The result of one op in one dtype.

    Attributes:
        rows: one for each backend that ran a case.
        dropped: the cases that did not run, because their float64 truth needs more memory than is free.
    """

    rows: list["Row"]
    dropped: list[str]


class Row(NamedTuple):
    """One line of the table. `error` and `budget` are of the case with the largest ratio of the two."""

    op: str
    backend: str
    dtype: str
    cases: int
    error: float
    budget: float
    ratio: float
    passed: bool
    failures: tuple[str, ...]
    seconds: float


def _map_tensors(inputs: SimpleNamespace, convert: Callable[[Tensor], Tensor]) -> SimpleNamespace:
    def apply(x):
        if isinstance(x, list):
            return [apply(y) for y in x]
        return convert(x) if x is not None and x.is_floating_point() else x

    return SimpleNamespace(**{name: apply(x) for name, x in vars(inputs).items()})


def _ratio(verdict: Verdict) -> float:
    return (
        verdict.error / verdict.budget
        if verdict.budget > 0
        else (0.0 if verdict.error == 0 else float("inf"))
    )


def _same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(
        torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))
        for a, b in zip(first, second, strict=True)
    )


class Truth:
    """The outputs of a case in float64 and in plain PyTorch, computed once for all backends."""

    def __init__(self, case: Case) -> None:
        self.case = case
        doubled = _map_tensors(case.inputs, Tensor.double)
        self.truth, self.yardstick = self._compute(doubled), self._compute(case.inputs)

    def _compute(self, inputs: SimpleNamespace) -> tuple[Tensor, ...]:
        return (
            self.case.call(inputs, "reference") if self.case.tables is None else (self.case.tables(inputs),)
        )

    def judge(self, outputs: Sequence[Tensor]) -> Verdict:
        case = self.case
        if case.tables is not None:
            index, score = outputs
            return judge_match(
                index, score, self.yardstick[0], self.truth[0], case.reduction, packed=case.packed
            )
        if len(outputs) != len(self.truth):
            return Verdict(float("inf"), 0.0, False)
        if case.exact:
            verdicts = [judge_exact(actual, truth) for actual, truth in zip(outputs, self.truth)]
        else:
            verdicts = [judge(*three, case.reduction) for three in zip(outputs, self.yardstick, self.truth)]
        return max(verdicts, key=_ratio)


def _one_line(text: str, length: int = 240) -> str:
    """The start and the end of a message. Compilers put the place first and the reason last."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def _run_case(truth: Truth, backend: str, device: torch.device) -> tuple[Verdict, str]:
    """Run one case; returns its verdict and the reason of a failure, which is empty if it passes."""
    case = truth.case
    try:
        with poisoned_memory():
            outputs = case.call(case.inputs, backend)
        verdict = truth.judge(outputs)
        if device.type == "cuda":
            repeats = [case.call(case.inputs, backend) for _ in range(2)]
            torch.cuda.synchronize(device)
            verdict = max(verdict, truth.judge(repeats[0]), key=_ratio)
            if not case.description.endswith("gradient") and not _same_bits(*repeats):
                return Verdict(verdict.error, verdict.budget, False), "two equal calls give different bits"
    except Exception as error:  # one kernel that fails must not end the table
        return Verdict(float("inf"), 0.0, False), _one_line(f"{type(error).__name__}: {error}")
    return verdict, "" if verdict.passed else f"error {verdict.error:.3g}, budget {verdict.budget:.3g}"


def _fits(shape: Shape, device: torch.device) -> bool:
    """Whether the float64 truth, about eight N×N tables, fits in half of the free memory."""
    free, _ = torch.cuda.mem_get_info(device)
    return 8 * 8 * shape.batch * shape.heads * shape.query_tokens * shape.key_tokens < free // 2


def run_op(
    name: str, backends: Sequence[str], dtype: str, device: torch.device, *, quick: bool = False
) -> OpResult:
    """Run the cases of one op in one dtype on each of the backends that serves the op.

    On a GPU each case is called once before it is timed, so that the time has no compilation.
    """
    op = OPS[name]
    backends = [backend for backend in backends if backend in op.backends]
    shapes = list(op.shapes[:1] if quick else op.shapes)
    dropped: list[str] = []
    if device.type == "cuda" and backends:
        large = LARGE[:1] if quick else LARGE
        dropped += [f"{name}, {dtype}, {shape}" for shape in large if not _fits(shape, device)]
        shapes += [shape for shape in large if _fits(shape, device)]
    verdicts: dict[str, list[Verdict]] = {backend: [] for backend in backends}
    failures: dict[str, list[str]] = {backend: [] for backend in backends}
    seconds = dict.fromkeys(backends, 0.0)
    for shape in shapes if backends else ():
        for case in op.cases(Draw(shape, DTYPES[dtype], device)):
            try:
                truth = Truth(case)
            except torch.OutOfMemoryError:  # another program may use the memory
                dropped.append(f"{name}, {dtype}, {case.description}")
                continue
            for backend in backends:
                if device.type == "cuda":
                    _compile(case, backend)
                start = time.perf_counter()
                verdict, problem = _run_case(truth, backend, device)
                seconds[backend] += time.perf_counter() - start
                verdicts[backend].append(verdict)
                if problem:
                    failures[backend].append(f"{name}, {backend}, {dtype}, {case.description}: {problem}")
    rows = []
    for backend in (name for name in backends if verdicts[name]):
        worst = max(verdicts[backend], key=_ratio)
        figures = (len(verdicts[backend]), worst.error, worst.budget, _ratio(worst))
        rows.append(
            Row(
                name,
                backend,
                dtype,
                *figures,
                not failures[backend],
                tuple(failures[backend]),
                seconds[backend],
            )
        )
    return OpResult(rows, dropped)


def _compile(case: Case, backend: str) -> None:
    """Call the case once. An error is ignored here, because it is raised again in the judged call."""
    with contextlib.suppress(Exception):
        case.call(case.inputs, backend)


def _device(name: str | None) -> torch.device:
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _triton_state(device: torch.device) -> tuple[str | None, str]:
    """The reason why Triton cannot run on `device`, or None, and the text for the header.

    Without a GPU this turns on the interpreter.
    """
    note = " in its interpreter (TRITON_INTERPRET is set)" if _backends.interpreted() else ""
    if device.type != "cuda":
        if "triton" not in sys.modules:
            os.environ.setdefault("TRITON_INTERPRET", "1")
            _backends.interpreted.cache_clear()
        note = " in its interpreter (no GPU: TRITON_INTERPRET=1 is set for this process)"
    problem = _backends.triton_problem()
    if problem is None:
        problem = _backends.triton_refusal(torch.empty(1, device=device), ())
    return (
        problem,
        f"Triton does not run: {problem}" if problem else f"Triton {sys.modules['triton'].__version__}{note}",
    )


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    top = _command_line.Parser(
        "python -m qalign_kernels.validate", description="Compare every op with float64 on this machine."
    )
    _command_line.add_command(top, sys.modules[__name__])
    return top


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=_backends.BACKENDS[1:],
        metavar="NAME",
        help="triton, tiled or reference (default: triton, if it can run here, and tiled)",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        metavar="NAME",
        help=f"{', '.join(DTYPES)} (default: all but float64)",
    )
    parser.add_argument(
        "--op",
        nargs="+",
        metavar="NAME",
        help="run the ops whose name in the table starts with NAME (default: all)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--quick", action="store_true", help="run fewer shapes")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows to FILE after every op"
    )


def files(options: argparse.Namespace) -> Files:
    return Files(writes=[("--json", options.json)] if options.json else [])


def _header(device: torch.device, triton: str) -> str:
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return f"qalign_kernels {__version__}, torch {torch.__version__}, {name}\n{triton}"


def _line(row: Row) -> str:
    figures = f"{row.error:.2e}", f"{row.budget:.2e}", f"{row.ratio:.2f}"
    return COLUMNS.format(
        row.op,
        row.backend,
        row.dtype,
        row.cases,
        *figures,
        "ok" if row.passed else "FAILED",
        f"{row.seconds:.1f}",
    )


def _shown(failures: Sequence[str], limit: int = 3) -> list[str]:
    more = [f"  ... and {len(failures) - limit} more"] if len(failures) > limit else []
    return [f"  FAILED {failure}" for failure in failures[:limit]] + more


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return _command_line.main(parser, arguments)


def run(options: argparse.Namespace) -> int:
    """Validate and print the table; returns 0 if every error is within its budget."""
    if options.device == "cuda":
        _command_line.require_device("cuda")
    device = _device(options.device)
    names = [
        name for name in OPS if options.op is None or any(name.startswith(prefix) for prefix in options.op)
    ]
    if unknown := [prefix for prefix in options.op or () if not any(name.startswith(prefix) for name in OPS)]:
        raise ValueError(f"--op: expected the start of one of {', '.join(OPS)}, got {', '.join(unknown)}")
    problem, triton = _triton_state(device)
    if problem and "triton" in (options.backend or ()):
        raise ValueError(f"--backend: expected a backend that can run here, got triton: {problem}")
    backends = options.backend or (["tiled"] if problem else ["triton", "tiled"])

    print(_header(device, triton))
    print(
        COLUMNS.format(
            "op", "backend", "dtype", "cases", "error", "budget", "error/budget", "verdict", "time_s"
        ),
        flush=True,
    )
    rows: list[Row] = []
    dropped: list[str] = []
    start = time.perf_counter()
    with drafting(options.json) as draft:
        for name, dtype in itertools.product(names, options.dtype or list(DTYPES)[:3]):
            probe = torch.empty(1, dtype=DTYPES[dtype], device=device)
            served = [
                backend
                for backend in backends
                if backend != "triton" or _backends.triton_refusal(probe, ()) is None
            ]
            result = run_op(name, served, dtype, device, quick=options.quick)
            dropped += result.dropped
            for row in result.rows:
                rows.append(row)
                print(_line(row), *_shown(row.failures), sep="\n", flush=True)
            report = {
                "device": _header(device, triton).splitlines(),
                "rows": [row._asdict() for row in rows],
                "dropped": dropped,
            }
            draft(json.dumps(report, indent=1))  # after every op, so that an interrupted run keeps its rows
    for case in dropped:
        print(f"did not run, too little memory: {case}")
    cases, failures = sum(row.cases for row in rows), sum(len(row.failures) for row in rows)
    print(f"{cases} cases in {len(rows)} rows, {failures} failed, {time.perf_counter() - start:.0f} s")
    return 1 if failures or not rows else 0
