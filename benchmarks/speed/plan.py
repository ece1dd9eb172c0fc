"""The pytest plugin of the speed command. It checks each op before its first round."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qalign_kernels.bench import measure
from qalign_kernels.bench.measure import DTYPES
from qalign_kernels.bench.ops import Op

from ..suite import progress, providers, rows, shapes
from ..suite.rows import Row
from ..suite.shapes import Shape
from . import memory

REPEATS = 3

MAX_ROUNDS = 100


class Item(NamedTuple):
    """One timed visit. Providers take turns, in reverse every second repeat, so that drift cancels."""

    op: Op
    shape: Shape
    layout: str
    repeat: int
    provider: str


@dataclass
class Measured:
    """The measurements of one provider for one op and shape."""

    call: Callable[[], Any]
    rounds: int
    hidden: measure.Hidden
    peak_mib: float | None
    saved_mib: float | None
    seconds: list[float] = field(default_factory=list)


class Plan:
    """The pytest plugin: the visits, their checks before the first round, and the rows after the last."""

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
        """Give what is timed now; skip the visit where the provider shows no figure."""
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
        return "", "", ""  # the plan shows its own progress

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
        """Build and check the provider, estimate its time, and measure its memory.

        Returns:
            The measurement, or the reason why the provider shows no figure.
        """
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
        except Exception as error:  # a failing peer is a note, a failure of ours an error
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
        if item.provider == providers.SDPA:  # one call for all ops
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
        """Make the rows of the group that ended, and write all rows so far."""
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
            self._op.name,
            self._shape.size,
            self.dtype,
            self.device,
            provider,
            found.seconds,
            work=providers.flops(provider, self._op, self._shape),
            yardstick=yardstick,
            peak_mib=found.peak_mib,
            saved_mib=found.saved_mib,
            unique_fraction=self._unique_fraction,
            hidden=found.hidden,
            layout=self._layout,
        )
