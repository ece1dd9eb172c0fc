"""Time and memory of every op beside its peers, in one process, by pytest-benchmark."""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch

from qalign_kernels import _command_line
from qalign_kernels._files import Files
from qalign_kernels.bench import measure
from qalign_kernels.bench.measure import DTYPES
from qalign_kernels.bench.ops import OPS, Op

from ..suite import providers, rows, shapes
from ..suite.rows import Row
from ..suite.shapes import QUICK_SHAPES, SHAPES, Shape
from .plan import REPEATS, Item, Plan

SLOW_PEERS = ("reference",)


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
    """Whether the words choose an op; a word that is no op's name chooses all ops that contain it."""
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
    """Let the providers take turns; the second layout has only providers that use other kernels in it."""
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
    """Registers the plan under the name that the collected file looks up."""

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
    """Lay out the rows; a provider is named with an unusual layout, and with host-bound times."""
    lines = []
    for row in measured:
        provider = row.provider
        provider += f" {row.layout}" if row.layout != shapes.PROCESSOR else ""
        provider += " host-bound" if row.host_bound else ""
        lines.append(rows.cells(row._replace(provider=provider), COLUMNS))
    return measure.aligned([*COLUMNS.values()], lines)
