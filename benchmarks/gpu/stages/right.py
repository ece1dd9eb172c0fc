"""Stage "right": is every op and every candidate tile right, and does it repeat bit by bit?

Processes take call after call, in parallel. After a failed call its process is replaced, so that a broken
device does not affect the other calls. The calls also compile what the next stages time.
"""

import contextlib
import json
import os
import queue
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qalign_kernels import testing
from qalign_kernels._triton import _configs
from qalign_kernels._triton._configs import Key, Tile
from qalign_kernels._triton._launch import target_of
from qalign_kernels.bench.ops import OPS, op_named

from ...suite import shapes
from ...suite.rows import write
from ...suite.shapes import CONTIGUOUS, FOLDED_HEAD_DIM, PROCESSOR, Shape
from ...tune import candidates, trials
from ..plan import CORE_OPS, core_shapes
from ..running import arguments, forks
from .joint_calls import JOINT_CALLS

SECONDS_OF_CALL = 90.0
SECONDS_TO_START = 5.0
DTYPES = ("bfloat16", "float16")
ITEMSIZE = 2
MOST_TILE_SHAPES = 3
USUAL = (Shape("", 2, 10, 1024, 64), Shape("", 1, 8, 4096, 40), Shape("", 1, 4, 1024, 128))
JOINT = (Shape("", 2, 10, 1000, 64), Shape("", 1, 8, 4100, 40))  # heads in a row; no tile divides the tokens
RAGGED = (Shape("", 1, 2, 1000, 64), Shape("", 1, 8, 1000, 40))


class Call(NamedTuple):
    """One judged call: an op, one of JOINT_CALLS, or the timed call of a trial under a tile."""

    name: str
    shape: Shape
    layout: str
    dtype: str
    tile: Tile | None = None

    def row(self) -> dict[str, Any]:
        """Describe the call."""
        return {
            "op": self.name,
            "shape": self.shape.size,
            "layout": self.layout,
            "dtype": self.dtype,
            "tile": self.tile,
        }


def calls() -> list[Call]:
    """List the calls: what the next stages time, core ops, tiles, then the rest; bfloat16 first."""
    timed = [Call(op, shape, PROCESSOR, DTYPES[0]) for shape in core_shapes() for op in CORE_OPS]
    others = [op.name for op in OPS if op.name not in CORE_OPS and not op.correlated]
    core, half = (_everywhere(CORE_OPS, dtype) for dtype in DTYPES)
    return [
        *timed,
        *core,
        *joint_calls(),
        *tile_calls(),
        *half,
        *(call for dtype in DTYPES for call in _everywhere(others, dtype)),
    ]


def _everywhere(names: Sequence[str], dtype: str) -> list[Call]:
    """List the ops at every shape and layout."""
    places = [*((shape, PROCESSOR) for shape in USUAL), *((shape, CONTIGUOUS) for shape in RAGGED)]
    return [Call(name, *place, dtype) for place in places for name in names]


def joint_calls() -> list[Call]:
    """List the joint matches at shapes that store the heads in a row, JOINT_CALLS among them."""
    names = ("similarity_argmax", *JOINT_CALLS)
    return [Call(name, shape, PROCESSOR, dtype) for dtype in DTYPES for shape in JOINT for name in names]


def tile_calls() -> list[Call]:
    """List the candidate tiles at the core shapes with most tokens, without the shipped tiles.

    The stage "gluon" tries the tiles of the kernels in Gluon.
    """
    found = []
    for shape in tile_shapes():
        for trial in (trial for trial in trials.TRIALS if not trial.listed):
            key = tile_key(trial.op, trial.mode, shape, DTYPES[0])
            tiles = [tile for tile in candidates.tiles(key) if tile != _configs.look_up(key, ITEMSIZE)]
            found += [Call(trial.name, shape, PROCESSOR, DTYPES[0], tile) for tile in tiles]
    return found


def tile_shapes() -> list[Shape]:
    """List the shapes for the candidates."""
    return core_shapes()[:MOST_TILE_SHAPES]


def tile_key(op: str, mode: str, shape: Shape, dtype: str) -> Key:
    """Give the key of a launch on inputs in the layout of attention processors."""
    folded = mode in ("joint", "topk") and shape.heads * shape.head_dim % FOLDED_HEAD_DIM == 0
    head_dim = FOLDED_HEAD_DIM if folded else shape.head_dim
    tokens, triton = _configs.token_bucket(shape.tokens), _configs.triton_minor()
    return Key(op, mode, target_of(torch.device("cuda", 0)), triton, dtype, tokens, head_dim)


def judge(call: Call) -> dict[str, Any]:
    """Run the call three times, first on poisoned memory, and compare it with float64.

    The third call replays the launches of the second (`_triton/_replay.py`). All three must agree bit by bit.
    """
    start = time.monotonic()
    inputs = shapes.make_inputs(call.shape, True, getattr(torch, call.dtype), "cuda", layout=call.layout)
    op = _subject(call)
    with torch.no_grad(), _trying(call):
        with testing.poisoned_memory():
            first = op.run(inputs, "triton")
        later = [op.run(inputs, "triton") for _ in range(2)]
        same = all(_same_bits(a, b) for again in later for a, b in zip(_parts(first), _parts(again)))
        right = bool(op.check(inputs, first, "triton"))
    return {"right": right, "same_bits": same, "seconds": round(time.monotonic() - start, 2)}


def _subject(call: Call) -> Any:
    if call.tile is not None:
        return trials.trial_named(call.name).timed
    return JOINT_CALLS.get(call.name) or op_named(call.name)


def _trying(call: Call) -> contextlib.AbstractContextManager[None]:
    if call.tile is None:
        return contextlib.nullcontext()
    trial = trials.trial_named(call.name)
    return _configs.trying(tile_key(trial.op, trial.mode, call.shape, call.dtype), call.tile)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two results agree bit by bit, NaN included."""
    return torch.equal(
        a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8)
    )


def _parts(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def answers(chosen: list[Call], folder: Path, clock: arguments.Clock) -> Iterator[dict[str, Any]]:
    """Yield a row for each finished call, and a row with an error for each call without time."""
    forks.preload()
    free: queue.SimpleQueue[forks.Worker] = queue.SimpleQueue()
    workers = [forks.Worker() for _ in range(max(1, os.cpu_count() or 1))]
    for worker in workers:
        free.put(worker)

    def run(call: Call) -> dict[str, Any]:
        seconds = min(SECONDS_OF_CALL, clock.left())
        if seconds < SECONDS_TO_START:
            return call.row() | {"error": "not started, no time left"}
        worker, log = free.get(), folder / "logs" / f"right-{call.name.replace(' ', '_')}.log"
        answer = worker.ask(judge, call, log=log, seconds=seconds)
        free.put(worker)
        return call.row() | (answer.value or {"error": answer.error})

    try:
        with ThreadPoolExecutor(len(workers)) as pool:
            waiting = [pool.submit(run, call) for call in chosen]
            for future in as_completed(waiting):
                yield future.result()
    finally:
        for worker in workers:
            worker.end()


def main() -> int:
    options = arguments.parser(__doc__).parse_args()
    clock = arguments.Clock(options.seconds)
    rows: list[dict[str, Any]] = []
    for row in answers(calls(), options.out, clock):
        rows.append(row)
        write(options.out / "right.json", rows)
        print(json.dumps(row), flush=True)
    wrong = [row for row in rows if not (row.get("right") and row.get("same_bits"))]
    print(f"{len(rows)} calls, {len(wrong)} not shown to be right")
    return 1 if wrong else 0
