"""Measure groups in one process, one after the other.

A peer that fails does not stop the others. `measure` says what ends the process.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qalign_kernels.bench import measure as measurement
from qalign_kernels.bench.measure import DTYPES, percentiles, time_rounds
from qalign_kernels.bench.ops import Op, op_named

from ...suite import providers, rows, shapes
from ...suite.rows import Row
from ..must_show import DEFAULT, OURS, Visit
from ..plan import Group, compile_parts, core_groups, must_show_groups, other_groups
from ..running import arguments
from ..running.journal import Journal
from .ceilings import large_matmul, matmul_tflops

DEVICE, DTYPE = "cuda", "bf16"
REPEATS = 3
ROUNDS = 15  # for each visit and mode, or fewer to fit in SECONDS_OF_VISIT
SECONDS_OF_VISIT = 0.05
LEAST_SECONDS_OF_GROUP = 4.0
CHECKED_PEERS = ("fa3", "flex", providers.FLEX_FLASH, *providers.CHANNEL_PEERS, "sageattention")
BROKEN_DEVICE = 3
CEILING_ROUNDS = 5  # of the large matmul, before, between and after the rounds of a group
PLANS = {"core": core_groups, "must_show": must_show_groups, "speed": other_groups}


class BrokenDevice(Exception):
    """The CUDA context is lost, so this process can measure nothing more."""


@dataclass
class Measured:
    """One visit: the call, its graph, and the seconds of both."""

    call: Callable[[], Any]
    graph: torch.cuda.CUDAGraph | None
    rounds: int
    hidden: measurement.Hidden
    peak_mib: float
    output_mib: float
    unique_fraction: float | None
    implementation: str | None
    eager_seconds: list[float] = field(default_factory=list)
    graph_seconds: list[float] = field(default_factory=list)


class Files(NamedTuple):
    """The files of a plan: its rows and its journal."""

    rows: Path
    journal: Journal

    def read_rows(self) -> list[Any]:
        return json.loads(self.rows.read_text()) if self.rows.is_file() else []

    def write_rows(self, found: list[Any]) -> None:
        rows.write(self.rows, found)


def files(folder: Path, plan: str) -> Files:
    return Files(folder / f"{plan}.json", Journal(folder / "logs" / f"{plan}.journal"))


def measure_groups(groups: list[Group], where: Files, clock: arguments.Clock) -> None:
    """Measure all groups that are not in the journal yet, and write the rows after each."""
    done = {*where.journal.texts("group"), *where.journal.texts("skip")}
    kept = rows.parse(where.read_rows())
    for group in groups:
        if group.name in done:
            continue
        if clock.left() < LEAST_SECONDS_OF_GROUP:
            where.journal.add("note", f"{group.name}: not measured, no time left")
            continue
        print(f"{group.name}: {len(group.visits)} visits, {clock.left():.0f} s left", flush=True)
        before = tuple(kept)
        for found in measure(group, where.journal, clock):
            kept = [*before, *found]
            where.write_rows(kept)
        where.journal.add("group", group.name)


def measure(group: Group, journal: Journal, clock: arguments.Clock) -> Iterator[list[Row]]:
    """Yield the rows after each repeat.

    Visits take turns, in reverse order every second time, so that drift cancels in their ratios. The large
    matmul, by which shares are defined, is measured between the repeats.
    """
    _forget_compiled()
    torch.cuda.empty_cache()
    inputs = _inputs(group)
    found: dict[Visit, Measured] = {}
    for visit in group.visits:
        if clock.left() < LEAST_SECONDS_OF_GROUP / 2:
            journal.add("note", f"{_name(visit, group)}: not measured, no time left")
        elif measured := _first_visit(visit, group, inputs, journal):
            found[visit] = measured
    journal.add("begin", group.name)
    ceiling = large_matmul()
    ceiling_seconds: list[float] = []
    ceiling_seconds += time_rounds(ceiling, CEILING_ROUNDS)
    for repeat in range(REPEATS):
        if repeat == 0 or clock.left() > 0:
            _time_all(list(found.values()), reverse=repeat % 2 == 1)
            ceiling_seconds += time_rounds(ceiling, CEILING_ROUNDS)
            yardstick, tflops = found.get(DEFAULT[0]), matmul_tflops(percentiles(ceiling_seconds)[1])
            yield [_row(visit, group, measured, yardstick, tflops) for visit, measured in found.items()]
    journal.add("end", group.name)


def _forget_compiled() -> None:
    """Reset torch.compile where a peer used it. The import takes seconds, so other runs avoid it."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _time_all(order: list[Measured], reverse: bool) -> None:
    for measured in order[::-1] if reverse else order:
        measured.eager_seconds += time_rounds(measured.call, measured.rounds, measured.hidden.flushes)
        if measured.graph:
            measured.graph_seconds += time_rounds(measured.graph.replay, measured.rounds)


def _inputs(group: Group) -> measurement.Inputs:
    dtype = DTYPES[DTYPE]
    if group.asked_fraction is None:
        return shapes.make_inputs(group.shape, False, dtype, DEVICE, layout=group.layout)
    return shapes.make_inputs(
        group.shape, True, dtype, DEVICE, asked_fraction=group.asked_fraction, layout=group.layout
    )


def _name(visit: Visit, group: Group) -> str:
    return f"{visit[0]} {visit[1]} {group.name}"


def _first_visit(visit: Visit, group: Group, inputs: shapes.Inputs, journal: Journal) -> Measured | None:
    """Build, check and capture a call; None where it gives no figure, with the reason in the journal."""
    name, (op_name, provider) = _name(visit, group), visit
    if name in journal.texts("skip"):
        return None
    journal.add("begin", name)
    measured = None
    try:
        op = op_named(op_name)
        if reason := providers.refusal(provider, op, inputs):
            journal.add("note", f"{name}: not run, {reason}")
        else:
            measured = _prepare(op, provider, inputs, name, journal)
    except Exception as error:  # a failing peer is a note, a failure of ours an error
        journal.add(
            "failure" if provider == OURS else "note",
            f"{name}: {type(error).__name__}: {error}".splitlines()[0][:300],
        )
        _require_device()
    journal.add("end", name)
    return measured


def _require_device() -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise BrokenDevice(str(error).splitlines()[0]) from None


def _prepare(op: Op, provider: str, inputs: shapes.Inputs, name: str, journal: Journal) -> Measured | None:
    call = providers.build(provider, op, inputs)
    result = call()
    torch.cuda.synchronize()
    if provider == OURS and not op.check(inputs, result, provider):
        journal.add("failure", f"{name}: check failed")
        return None
    if provider in CHECKED_PEERS and not op.check(inputs, result, "reference"):
        journal.add("note", f"{name}: its result is outside our error budget")
    fraction = None
    if provider == OURS and op.match_map:
        fraction = measurement.unique_fraction(op.match_map(inputs, result, provider))
    output_mib = sum(part.nbytes for part in _tensors(result)) / measurement.MIB
    peak_mib = measurement.cuda_peak_mib(call)
    graph = _captured(call, result, provider, name, journal)
    del result
    seconds = time_rounds(call, 2)[-1]
    rounds = max(2, min(ROUNDS, int(SECONDS_OF_VISIT / max(seconds, 1e-6))))
    hidden = measurement.hide_host(call)
    implementation = providers.sdpa_implementation(provider, inputs)
    return Measured(call, graph, rounds, hidden, peak_mib, output_mib, fraction, implementation)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple) else (result,)


def _captured(
    call: Callable[[], Any], result: Any, provider: str, name: str, journal: Journal
) -> torch.cuda.CUDAGraph | None:
    """Capture the call as a graph; where the call is ours, the replay must give the same bits."""
    try:
        graph, replayed = capture(call)
    except Exception as error:  # calls that synchronise cannot be captured
        journal.add("note", f"{name}: no CUDA graph, {type(error).__name__}: {error}".splitlines()[0][:300])
        _require_device()
        return None
    if provider == OURS and not all(torch.equal(a, b) for a, b in zip(_tensors(result), _tensors(replayed))):
        journal.add("failure", f"{name}: the CUDA graph's replay differs in bits")
        return None
    return graph


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture one call as a graph; give the graph and the result of its first replay."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    graph.replay()
    torch.cuda.synchronize()
    return graph, result


def _row(visit: Visit, group: Group, measured: Measured, yardstick: Measured | None, ceiling: float) -> Row:
    op, provider = op_named(visit[0]), visit[1]
    work = providers.flops(provider, op, group.shape)
    row = rows.timed_row(
        op.name,
        group.shape.size,
        DTYPE,
        DEVICE,
        provider,
        measured.eager_seconds,
        work=work,
        yardstick=percentiles(yardstick.eager_seconds)[1] if yardstick else None,
        peak_mib=measured.peak_mib,
        unique_fraction=measured.unique_fraction,
        hidden=measured.hidden,
        layout=group.layout,
    )
    return row._replace(
        **_graph_times(measured.graph_seconds, work),
        ceiling_tflops=float(f"{ceiling:.4g}"),
        implementation=measured.implementation,
        output_mib=round(measured.output_mib, 3),
        asked_fraction=group.asked_fraction,
    )


def _graph_times(seconds: list[float], work: float | None) -> dict[str, Any]:
    """Give the fields of a row about replays of the graph; none where the capture failed."""
    if not seconds:
        return {}
    p20, p50, p80 = percentiles(seconds)
    times = {"graph_p20_ms": p20, "graph_p50_ms": p50, "graph_p80_ms": p80}
    tflops = None if work is None else float(f"{work / p50 / 1e12:.4g}")
    return {**{name: round(value * 1e3, 5) for name, value in times.items()}, "graph_tflops": tflops}


def call_once(groups: list[Group], clock: arguments.Clock) -> None:
    """Make every call once, so that everything is compiled. Failures are reported by later stages."""
    for group in groups:
        _forget_compiled()
        inputs = _inputs(group)
        for op_name, provider in group.visits:
            if clock.left() < 0:
                return
            try:
                providers.build(provider, op_named(op_name), inputs)()
                torch.cuda.synchronize()
                print(f"called {op_name} {provider} {group.name}", flush=True)
            except Exception as error:  # the stage that measures it reports the failure
                print(
                    f"{op_name} {provider} {group.name}: {type(error).__name__}: {error}".splitlines()[0],
                    flush=True,
                )


def main() -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("--plan", choices=PLANS, default="speed")
    parser.add_argument("--compile-part", type=int, metavar="N")
    options = parser.parse_args()
    clock = arguments.Clock(options.seconds)
    torch.set_grad_enabled(False)
    if options.compile_part is not None:
        call_once(compile_parts()[options.compile_part], clock)
        return 0
    measurement.use_cuda()
    where = files(options.out, options.plan)
    try:
        measure_groups(PLANS[options.plan](), where, clock)
    except BrokenDevice as error:
        print(f"the CUDA context is lost: {error}")
        return BROKEN_DEVICE
    return 0
