"""Time and memory of every op beside its peers, in one process, by pytest-benchmark; no figure for an op whose check fails."""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qalign_kernels import _command_line
from qalign_kernels._files import Files
from qalign_kernels.bench import measure
from qalign_kernels.bench.measure import DTYPES
from qalign_kernels.bench.ops import OPS, Op

from ..suite import progress, providers, rows, shapes
from ..suite.rows import Row
from ..suite.shapes import QUICK_SHAPES, SHAPES, Shape
from . import memory

REPEATS = 3
MAX_ROUNDS = 100
SLOW_PEERS = ("reference",)


class Item(NamedTuple):
    """One timed visit. Repeats of the providers alternate, there and back, so that drift cancels in their ratios."""

    op: Op
    shape: Shape
    layout: str
    repeat: int
    provider: str


@dataclass
class Measured:
    """What one provider showed for one op and shape."""

    call: Callable[[], Any]
    rounds: int
    hidden: measure.Hidden
    peak_mib: float | None
    saved_mib: float | None
    seconds: list[float] = field(default_factory=list)


class Plan:
    """The pytest plugin: what is timed, its checks before the first round, and the rows after the last."""

    def __init__(
        self, items: list[Item], dtype: str, device: str, seconds: float, with_memory: bool, file: Path | None
    ) -> None:
        self.items, self.dtype, self.device, self.seconds, self.with_memory, self.file = (
            items,
            dtype,
            device,
            seconds,
            with_memory,
            file,
        )
        self.rows: list[Row] = []
        self.failed: list[str] = []
        self.notes: list[str] = []
        self._group: tuple[str, str, str] | None = None
        self._measured: dict[str, Measured | str] = {}
        self._unique_fraction: float | None = None
        self._sdpa_peak: dict[str, float | None] = {}
        self._done = 0

    def identify(self, item: Item) -> str:
        provider = item.provider.replace(" ", "_")
        return f"{item.op.name}-{item.shape.name}-{item.layout}-{item.repeat}-{provider}"

    def prepare(self, item: Item) -> Measured:
        """What is to be timed now; skips the visit where the provider shows no figure."""
        import pytest

        if (item.op.name, item.shape.name, item.layout) != self._group:
            self._finish()
            self._start(item)
        self._done += 1
        progress.show(self._done, len(self.items), f"{item.op.name} {item.shape.size} {item.provider}")
        if item.provider not in self._measured:
            self._measured[item.provider] = self._first_visit(item)
        found = self._measured[item.provider]
        if isinstance(found, str):
            pytest.skip(found)
        return found

    def pytest_sessionfinish(self) -> None:
        self._finish()

    def pytest_report_teststatus(self) -> tuple[str, str, str]:
        return "", "", ""  # the progress is ours

    def _start(self, item: Item) -> None:
        self._group = item.op.name, item.shape.name, item.layout
        self._op, self._shape, self._layout = item.op, item.shape, item.layout
        self._measured, self._unique_fraction = {}, None
        self._inputs = shapes.make_inputs(
            item.shape, item.op.correlated, DTYPES[self.dtype], self.device, layout=item.layout
        )
        torch.compiler.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _first_visit(self, item: Item) -> Measured | str:
        """Build and check the provider, estimate its time, measure its memory; or the reason why it shows no figure."""
        where = f"{item.op.name} {item.shape.size} {item.provider}"
        if reason := providers.refusal(item.provider, item.op, self._inputs):
            self.notes.append(f"{where}: not run, {reason}")
            return reason
        try:
            call = providers.build(item.provider, item.op, self._inputs)
            result = call()
            if item.provider in providers.OURS:
                if not item.op.check(self._inputs, result, item.provider):
                    self.failed.append(where)
                    return "check failed"
                if item.op.match_map and self._unique_fraction is None:
                    match_map = item.op.match_map(self._inputs, result, item.provider)
                    self._unique_fraction = measure.unique_fraction(match_map)
            del result
            estimate, hidden = self._estimate(call), measure.hide_host(call)
            peak = self._peak(item, call)
            saves = item.op.learned and item.provider != providers.SDPA
            saved = measure.saved_mib(call, self._inputs)[0] if saves else None
        except Exception as error:  # a peer that cannot run here is a note, one of ours is a failure
            (self.failed if item.provider in providers.OURS else self.notes).append(
                f"{where}: {type(error).__name__}: {error}".splitlines()[0]
            )
            return "did not run"
        rounds = int(self.seconds / REPEATS / estimate)
        return Measured(call, max(1, min(rounds, MAX_ROUNDS)), hidden, peak, saved)

    def _estimate(self, call: Callable[[], Any]) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return max(time.perf_counter() - start, 1e-6)

    def _peak(self, item: Item, call: Callable[[], Any]) -> float | None:
        if item.provider == providers.SDPA:  # the same call whatever op it stands beside
            if item.shape.name not in self._sdpa_peak:
                self._sdpa_peak[item.shape.name] = self._measure_peak(item, call)
            return self._sdpa_peak[item.shape.name]
        return self._measure_peak(item, call)

    def _measure_peak(self, item: Item, call: Callable[[], Any]) -> float | None:
        if not self.with_memory:
            return None
        if self.device == "cuda":
            return measure.cuda_peak_mib(call)
        if item.provider in ("eager compiled", "flex"):
            return None  # a fresh process would measure the compiler
        return memory.cpu_peak_mib(item.provider, item.op.name, tuple(item.shape), DTYPES[self.dtype])

    def _finish(self) -> None:
        """Rows of the group that ended."""
        shown = {
            name: found
            for name, found in self._measured.items()
            if isinstance(found, Measured) and found.seconds
        }
        yardstick = statistics.median(shown[providers.SDPA].seconds) if providers.SDPA in shown else None
        for name, found in shown.items():
            self.rows.append(self._row(name, found, yardstick))
        if self.file:  # after every group, so that a run that is stopped leaves what it measured
            rows.write(self.file, self.rows)
        self._measured = {}
        self._inputs = None  # type: ignore[assignment]

    def _row(self, provider: str, found: Measured, yardstick: float | None) -> Row:
        return rows.timed_row(
            self._op.name, self._shape.size, self.dtype, self.device, provider, found.seconds, work=providers.flops(provider, self._op, self._shape),
            yardstick=yardstick, peak_mib=found.peak_mib, saved_mib=found.saved_mib, unique_fraction=self._unique_fraction,
            hidden=found.hidden, layout=self._layout,
        )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on cuda, fp32 on the CPU")
    parser.add_argument(
        "--op",
        nargs="+",
        metavar="NAME",
        help=f"ops by name or by a part that several share ({', '.join(op.name for op in OPS)})",
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        choices=[shape.name for shape in SHAPES],
        metavar="NAME",
        help=", ".join(map(_describe, SHAPES)),
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"shapes {', '.join(QUICK_SHAPES)}, fewer rounds and peers; two minutes on two cores",
    )
    seconds = "time spent on each provider (default 1, with --quick 0.3; on cuda 0.3 of that)"
    parser.add_argument("--seconds", type=_command_line.positive, metavar="S", help=seconds)
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")


def files(arguments: argparse.Namespace) -> Files:
    return Files(writes=[("--json", arguments.json)] if arguments.json else [])


def _describe(shape: Shape) -> str:
    return f"{shape.name} = {shape.size}".replace(" ", "")


def _asked(name: str, words: list[str] | None) -> bool:
    """A word that is an op's name means that op, any other means all ops that contain it."""
    exact = {op.name for op in OPS}
    return not words or any(word == name or word not in exact and word in name for word in words)


def choose_items(arguments: argparse.Namespace, device: str) -> list[Item]:
    chosen_shapes = arguments.shape or (QUICK_SHAPES if arguments.quick else [shape.name for shape in SHAPES])
    items = []
    for shape in (shape for shape in SHAPES if shape.name in chosen_shapes):
        for op in OPS:
            if not _asked(op.name, arguments.op):
                continue
            brief = shape.sweep or device == "cpu" and (shape.large or arguments.quick and shape.scores > 2e6)
            if brief and not arguments.op and op.name not in providers.MAIN_OPS:
                continue
            for layout in shapes.layouts(op.name, shape) if device == "cuda" else (shapes.PROCESSOR,):
                items += _visits(op, shape, layout, device, arguments.quick)
    if not items:
        raise ValueError(f"--op: expected part of an op's name, got {' '.join(arguments.op)}")
    return items


def _visits(op: Op, shape: Shape, layout: str, device: str, quick: bool) -> list[Item]:
    """Alternate the providers, in the second layout only those that take other kernels in it."""
    order = providers.names(op, shape, device, quick)
    if layout != shapes.PROCESSOR:
        order = [name for name in order if name in ("triton", providers.SDPA)]
    visited_once = SLOW_PEERS if quick else ()
    return [
        Item(op, shape, layout, repeat, provider)
        for repeat in range(REPEATS)
        for provider in (order if repeat % 2 == 0 else order[::-1])
        if repeat == 0 or provider not in visited_once
    ]


def run(arguments: argparse.Namespace) -> int:
    import pytest

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _command_line.require_device(device)
    dtype = arguments.dtype or ("bf16" if device == "cuda" else "fp32")
    seconds = arguments.seconds or (0.3 if arguments.quick else 1.0) * (0.3 if device == "cuda" else 1.0)
    if device == "cuda":
        measure.use_cuda()
    plan = Plan(
        choose_items(arguments, device), dtype, device, seconds, not arguments.no_memory, arguments.json
    )
    with torch.no_grad():
        code = pytest.main(_pytest_arguments(), plugins=[_Named(plan)])
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt(
            f"{len(plan.rows)} rows are kept in {arguments.json}" if arguments.json else ""
        )
    print(table(plan.rows))
    for line in itertools.chain(plan.notes, (f"check failed: {where}" for where in plan.failed)):
        print(line)
    return 1 if plan.failed or code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else 0


class _Named:
    """Registers the plan under the name by which the collected file asks for it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def pytest_configure(self, config: Any) -> None:
        config.pluginmanager.register(self._plan, "qalign-speed")


def _pytest_arguments() -> list[str]:
    return [
        str(Path(__file__).with_name("bench_ops.py")),
        "--override-ini=addopts=",
        "--override-ini=python_functions=bench_*",
        "-qq",
        "--no-header",
        "--no-summary",
        "--show-capture=no",
        "--capture=no",
        "-p",
        "no:cacheprovider",
        "--benchmark-only",
        "--benchmark-quiet",
        "--benchmark-timer=qalign_kernels.bench.measure.stamp",
    ]


COLUMNS = {
    "op": "op",
    "shape": "shape",
    "dtype": "dtype",
    "provider": "provider",
    "p20_ms": "p20 ms",
    "p50_ms": "p50 ms",
    "p80_ms": "p80 ms",
    "tflops": "TFLOP/s",
    "peak_mib": "peak MiB",
    "saved_mib": "saved MiB",
    "ratio_to_sdpa": "x SDPA",
    "unique_fraction": "U/N",
}


def table(measured: list[Row]) -> str:
    """Lay out the rows; a provider is named with its layout, and with what its eager time is bound by."""
    lines = []
    for row in measured:
        provider = row.provider
        provider += f" {row.layout}" if row.layout != shapes.PROCESSOR else ""
        provider += " host-bound" if row.host_bound else ""
        lines.append(rows.cells(row._replace(provider=provider), COLUMNS))
    return measure.aligned([*COLUMNS.values()], lines)
