"""Stages "kernels" and "tiles": the kernels of one call, other tiles, and the rate of the L2 cache.

It works like `worker`: it writes rows after each step, and a journal of what the next worker leaves out.
"""

import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qalign_kernels._triton import _configs
from qalign_kernels._triton._configs import Tile
from qalign_kernels.bench import measure
from qalign_kernels.bench.ops import SDPA, op_named

from ...suite import providers, shapes
from ...suite.shapes import Shape
from ...tune import trials
from ...tune.sweep import medians
from ..plan import core_shapes
from ..running import arguments
from .ceilings import large_matmul, matmul_tflops
from .kernels import kernels, sdpa_implementation
from .right import DTYPES, ITEMSIZE, tile_calls, tile_key
from .worker import OURS, Files, capture, files

SECONDS_OF_STEP = 3.0
TILE_ROUNDS = 20
L2_MIB = (16, 32)
PROFILED = (("qalign_attention", OURS), ("attention", SDPA))
Row = dict[str, Any]
Step = Callable[[], list[Row]]


def kernel_rows(shape: Shape) -> list[Row]:
    """Time the kernels of one call of ours and of SDPA; kernel names show the implementation of SDPA."""
    inputs = shapes.make_inputs(shape, True, torch.bfloat16, "cuda")
    rows: list[Row] = []
    for name, provider in PROFILED:
        found = kernels(providers.build(provider, op_named(name), inputs))
        implementation = sdpa_implementation([kernel.name for kernel in found]) if provider == SDPA else None
        place = {"what": "kernel", "op": name, "provider": provider, "shape": shape.size}
        for kernel in found:
            figures = {"us": kernel.microseconds, "launches": kernel.launches}
            rows.append({**place, "name": kernel.name[:80], **figures, "implementation": implementation})
    return rows


def tile_rows(shape: Shape, name: str, right: list[Row]) -> list[Row]:
    """Time a trial as graphs, in turn, under the shipped tile and under every candidate that is right."""
    trial = trials.trial_named(name)
    key = tile_key(trial.op, trial.mode, shape, DTYPES[0])
    inputs = shapes.make_inputs(shape, True, torch.bfloat16, "cuda")
    shipped = _configs.look_up(key, ITEMSIZE)
    judged = {
        tuple(row["tile"]): row
        for row in right
        if row["op"] == name and row["shape"] == shape.size and row["tile"]
    }
    chosen = [Tile(*tile) for tile, row in judged.items() if row.get("right") and row.get("same_bits")]
    graphs: dict[Tile, torch.cuda.CUDAGraph] = {}
    problems: list[Row] = []
    place: Row = {"what": "tile", "op": name, "shape": shape.size}
    for tile in dict.fromkeys([shipped, *chosen]):
        try:
            with _configs.trying(key, tile):
                graphs[tile] = capture(lambda: trial.timed.run(inputs, OURS))[0]
        except Exception as error:  # the tile may not fit
            torch.cuda.synchronize()
            problems.append(
                place | {"tile": tile, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            )
    seconds = medians(list(graphs), lambda tile: measure.time_rounds(graphs[tile].replay, 1)[0], TILE_ROUNDS)
    base = seconds.get(shipped)
    rows: list[Row] = []
    for tile, time in seconds.items():
        figures = {"us": round(time * 1e6, 2), "of_shipped": base and round(time / base, 4)}
        rows.append({**place, "tile": tile, "shipped": tile == shipped, **figures})
    return rows + problems


def l2_rows() -> list[Row]:
    """Measure the rate of repeated sums of one buffer, beside the large matmul."""
    rows = []
    for mib in L2_MIB:
        buffer, total = torch.ones(mib << 18, device="cuda"), torch.zeros(1, device="cuda")
        call = functools.partial(torch.sum, buffer, dim=0, keepdim=True, out=total)
        call()
        start = measure.stamp()
        for _ in range(TILE_ROUNDS):
            call()
        seconds = (measure.stamp() - start) / TILE_ROUNDS
        rows.append(
            {"what": "L2", "name": f"sum of {mib} MiB", "value": (mib << 20) / seconds / 1e9, "unit": "GB/s"}
        )
    matmul = statistics.median(measure.time_rounds(large_matmul(), TILE_ROUNDS))
    return [*rows, {"what": "ceiling", "name": "matmul", "value": matmul_tflops(matmul), "unit": "TFLOP/s"}]


def kernel_steps(right: list[Row]) -> dict[str, Step]:
    """List the steps with torch's profiler, which slows down later timings."""
    return {f"kernels {shape.size}": functools.partial(kernel_rows, shape) for shape in core_shapes()}


def tile_steps(right: list[Row]) -> dict[str, Step]:
    """List the timed steps, the most important first."""
    found: dict[str, Step] = {}
    for call in tile_calls():
        found.setdefault(
            f"tiles of {call.name} {call.shape.size}",
            functools.partial(tile_rows, call.shape, call.name, right),
        )
    found["L2"] = l2_rows
    return found


PLANS = {"kernels": kernel_steps, "tiles": tile_steps}


def take(wanted: dict[str, Step], where: Files, clock: arguments.Clock) -> None:
    """Run the steps that no earlier worker finished or failed in."""
    done = {*where.journal.texts("group"), *where.journal.texts("skip")}
    rows = where.read_rows()
    for name, step in wanted.items():
        if name in done:
            continue
        if clock.left() < SECONDS_OF_STEP:
            where.journal.add("note", f"{name}: not measured, no time left")
            continue
        where.journal.add("begin", name)
        try:
            rows += step()
        except Exception as error:  # the next step may work
            rows.append(
                {
                    "what": "error",
                    "name": name,
                    "error": f"{type(error).__name__}: {error}".splitlines()[0][:300],
                }
            )
            torch.cuda.synchronize()  # ends the process where the device is lost
        where.write_rows(rows)
        where.journal.add("end", name)
        where.journal.add("group", name)


def main() -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("--plan", choices=PLANS, required=True)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    measure.use_cuda()
    take(
        PLANS[options.plan](_right(options.out)),
        files(options.out, options.plan),
        arguments.Clock(options.seconds),
    )
    return 0


def _right(folder: Path) -> list[Row]:
    file = folder / "right.json"
    return json.loads(file.read_text()) if file.is_file() else []
