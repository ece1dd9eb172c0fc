"""Measure the time that the host takes for one eager call of an op, over the stub driver."""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from qalign_kernels import Segment, _command_line, attention, qalign_attention, similarity_argmax
from qalign_kernels._files import Files
from qalign_kernels.bench import measure as measurement

from ..suite import rows
from .stub_driver import stub_driver

SHAPES = ((2, 10, 4096, 64), (1, 8, 4096, 40))
BURST = 25  # calls
OPS: dict[str, Callable[..., Any]] = {
    "qalign_attention": lambda q, r, k, v: qalign_attention(q, r, k, v, backend="triton"),
    "attention": lambda q, r, k, v: attention(q, Segment(k, v), backend="triton"),
    "similarity_argmax": lambda q, r, k, v: similarity_argmax(q, r, backend="triton"),
}
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), help="default: all")
    help_text = "bursts of calls for each figure (default: %(default)s)"
    parser.add_argument("--rounds", type=_command_line.count, default=30, metavar="N", help=help_text)
    parser.add_argument(
        "--stub", type=Path, metavar="DIR", help="keep the driver and the compiled kernels there"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")


def files(arguments: argparse.Namespace) -> Files:
    return Files(
        writes=[("--json", arguments.json)] if arguments.json else [],
        folders=[("--stub", arguments.stub)] if arguments.stub else [],
    )


def run(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        measured = measure(arguments.op, arguments.rounds, arguments.stub or Path(temporary))
    if arguments.json:
        rows.write(arguments.json, measured)
    print(table(measured))
    return 0


def measure(ops: list[str], rounds: int, folder: Path) -> list[Row]:
    """Measure each op at each shape: launches by Triton and replayed launches take turns."""
    measured = []
    with stub_driver(folder), torch.no_grad():
        from qalign_kernels._triton import _replay

        for op in ops:
            for batch, heads, tokens, dim in SHAPES:
                stored = torch.zeros(4, batch, tokens, heads, dim, dtype=torch.bfloat16)
                tensors = [x.transpose(1, 2) for x in stored]  # the layout of attention processors

                def call(op: str = op, tensors: list[torch.Tensor] = tensors) -> None:
                    OPS[op](*tensors)

                for _ in range(3):
                    call()
                bursts: dict[str, list[float]] = {"ordinary": [], "replayed": []}
                for _ in range(rounds):
                    with _replay.ordinary():
                        bursts["ordinary"].append(burst(call))
                    bursts["replayed"].append(burst(call))
                with _replay.ordinary():
                    kernels = {"ordinary": kernel_times(call)}
                kernels["replayed"] = kernel_times(call)
                for launches, figures in bursts.items():
                    measured.append(
                        _row(op, [batch, heads, tokens, dim], launches, figures, kernels[launches])
                    )
    return measured


def burst(call: Callable[[], None]) -> float:
    """Measure the median time of BURST calls, in µs."""
    times = []
    for _ in range(BURST):
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.median(times)


def kernel_times(call: Callable[[], None]) -> dict[str, float]:
    """Measure the median time of each kernel launch in a call, in µs; the timing itself takes time too."""
    with _timed_launches() as times:
        for _ in range(4 * BURST):
            call()
    return {name: round(statistics.median(each), 1) for name, each in times.items()}


@contextmanager
def _timed_launches() -> Iterator[dict[str, list[float]]]:
    from triton.runtime.jit import JITFunction

    from qalign_kernels._triton import _replay

    times: dict[str, list[float]] = defaultdict(list)
    own_run, replayed_run = JITFunction.run, _replay._run

    def note(name: str, run: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        start = time.perf_counter_ns()
        result = run(*arguments, **settings)
        times[name].append((time.perf_counter_ns() - start) / 1e3)
        return result

    def ordinary(kernel: Any, *arguments: Any, **settings: Any) -> Any:
        if settings["warmup"]:  # compiled, not launched
            return own_run(kernel, *arguments, **settings)
        return note(kernel.fn.__name__, own_run, kernel, *arguments, **settings)

    def replayed(steps: Any, stream: int, pointers: list[int]) -> None:
        for step in steps:
            note(step.compiled.metadata.name, replayed_run, [step], stream, pointers)

    with mock.patch.object(JITFunction, "run", ordinary), mock.patch.object(_replay, "_run", replayed):
        yield times


def _row(op: str, shape: list[int], launches: str, figures: list[float], kernels: dict[str, float]) -> Row:
    import triton

    p20, _, _, p80 = statistics.quantiles(figures, n=5)
    p50 = statistics.median(figures)
    return {
        "device": measurement.device_name("cpu"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "op": op,
        "shape": shape,
        "dtype": "bf16",
        "launches": launches,
        "p20_us": round(p20, 1),
        "p50_us": round(p50, 1),
        "p80_us": round(p80, 1),
        "kernels_us": kernels,
        "rest_us": round(p50 - sum(kernels.values()), 1),
        "commit": rows.commit(),
    }


def table(measured: list[Row]) -> str:
    columns = ("op", "shape", "launches", "p20_us", "p50_us", "p80_us", "rest_us")
    return measurement.markdown(columns, [[row[column] for column in columns] for row in measured])
