"""Stage "gluon": the kernels for Hopper, written in Gluon, against the general kernels.

For each shape of attention (with and without counts) and of the joint argmax, it compares the results of both
kernels and their times. The kernel for Hopper runs with each of its candidate tiles.
"""

import functools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qalign_kernels import Segment, _backends
from qalign_kernels._triton import _configs, _launch
from qalign_kernels._triton._configs import Key, Tile
from qalign_kernels._triton._launch import target_of
from qalign_kernels.bench import measure

from ...suite.rows import write
from ...suite.shapes import FOLDED_HEAD_DIM, Shape, make_inputs, shape_named
from ...tune import candidates
from ..running import arguments, forks

ROUNDS = 20
COMPILE_SECONDS = 20
ATTENTION_SHAPES = ("sdxl", "flux", "sdxl-low", "sd21-1024px")  # names of shapes
JOINT_SHAPES = ("sdxl", "flux", "sd15-512px", "sdxl-low", "sd15-low", "sd21-1024px")


class Trial(NamedTuple):
    """A call whose kernel for Hopper is chosen by `key`.

    Attributes:
        kernel: part of the kernel's name.
        work: floating-point operations of the call.
        partitions: the number of parts among which the warps of a tile are divided.
        same: compares the results of both kernels.
    """

    what: str
    call: Callable[[], Any]
    key: Key
    tiles: Sequence[Tile]
    kernel: str
    work: float
    partitions: int
    same: Callable[[Any, Any], dict[str, Any]]


def key_of(op: str, mode: str, shape: Shape, head_dim: int) -> Key:
    """Give the key of a kernel for Hopper at a shape."""
    tokens, triton = _configs.token_bucket(shape.tokens), _configs.triton_minor()
    return Key(op, mode, target_of(torch.device("cuda", 0)), triton, "bfloat16", tokens, head_dim)


def attention_key(shape: Shape, counted: bool) -> Key:
    mode = "counted softmax hopper" if counted else "softmax hopper"
    return key_of("attention", mode, shape, shape.head_dim)


def attention_trial(shape: Shape, counted: bool) -> Trial:
    inputs = make_inputs(shape, True, torch.bfloat16, "cuda")
    module: Any = _backends.implementation("triton", "attention")
    counts = inputs.counts if counted else None
    present = int((inputs.counts > 0).sum()) if counted else shape.batch * shape.tokens

    def call() -> Tensor:
        segment = Segment(inputs.key, inputs.value, counts=counts)
        scale = shape.head_dim**-0.5
        settings = {"contrast": 1.0, "query_labels": None, "guide": None, "need_lse": False}
        return module.attention(inputs.query, [segment], scale=scale, **settings)[0]

    key = attention_key(shape, counted)
    return Trial(
        "counted attention" if counted else "attention",
        call,
        key,
        candidates.tiles(key),
        "attention",
        4.0 * shape.heads * shape.tokens * present * shape.head_dim,
        2,
        _close,
    )


def joint_trial(shape: Shape) -> Trial:
    inputs = make_inputs(shape, True, torch.bfloat16, "cuda")
    module: Any = _backends.implementation("triton", "similarity")

    def call() -> tuple[Tensor, Tensor]:
        return module.similarity_argmax(inputs.query, inputs.ref_query, "cosine", True)

    key = key_of("similarity", "joint hopper", shape, FOLDED_HEAD_DIM)
    return Trial(
        "joint argmax",
        call,
        key,
        candidates.tiles(key),
        "argmax",
        2.0 * shape.batch * shape.tokens**2 * shape.heads * shape.head_dim,
        1,
        _same,
    )


def compare(trial: Trial, shape: Shape) -> Iterator[dict[str, Any]]:
    """Yield the time of the general kernel, then the time and the correctness of each tile for Hopper."""
    shipped = _configs.tiles().get(trial.key)
    place = {"what": trial.what, "shape": shape.size}
    with _configs.trying(trial.key, None):
        wanted = trial.call()
        yield {**place, "tile": None, "right": None, **_times(trial, None)}
    for tile in trial.tiles:
        row = {**place, "tile": tile, "shipped": tile == shipped}
        with _configs.trying(trial.key, tile):
            try:
                yield {**row, **trial.same(wanted, trial.call()), **_times(trial, tile)}
            except Exception as error:  # the next tile may work
                problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                yield {**row, "right": False, "error": problem}


def _same(wanted: tuple[Tensor, Tensor], match: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Compare matches. A few may have another index with an almost equal score."""
    (wanted_index, wanted_score), (index, score) = wanted, match
    error = (score - wanted_score).abs().max().item()
    same = (index == wanted_index).float().mean().item()
    right = error < 1e-4 and same > 0.999 and score.abs().max().item() > 0
    return {"right": right, "largest_error": error, "same_index": same}


def _close(wanted: Tensor, output: Tensor) -> dict[str, Any]:
    """Compare outputs whose weights were rounded with different maxima."""
    wanted, output = wanted.float(), output.float()
    largest = wanted.abs().max().item()
    error = (output - wanted).abs().max().item()
    mean_error = ((output - wanted).norm() / wanted.norm()).item()
    return {
        "right": 0 < largest and error < 0.02 * largest and mean_error < 5e-3,
        "largest_error": error,
        "mean_error": mean_error,
    }


def _times(trial: Trial, tile: Tile | None) -> dict[str, Any]:
    """Measure the whole op and its kernel alone, in µs."""
    alone = _kernel_launch(trial, tile)
    whole_us, kernel_us = (
        1e6 * statistics.median(measure.time_rounds(one, ROUNDS, flushes=4)) for one in (trial.call, alone)
    )
    return {
        "us": round(whole_us, 2),
        "kernel_us": round(kernel_us, 2),
        "tflops": round(trial.work / kernel_us / 1e6, 1),
    }


def _kernel_launch(trial: Trial, tile: Tile | None) -> Callable[[], None]:
    """Find the kernel's launch among those of the op. Repeating it changes nothing.

    Compiled kernels for Hopper count the loading warps too, so the tile gives their number of warps.
    """
    launched: list[tuple[Any, ...]] = []
    with _launch.watching(lambda *one: launched.append(one)):
        trial.call()
    kernel, grid, settings, compiled = next(one for one in launched if trial.kernel in one[0].fn.__name__)
    warps = compiled.metadata.num_warps if tile is None else tile.num_warps // trial.partitions
    how = {"num_warps": warps, "num_stages": compiled.metadata.num_stages}
    return functools.partial(_launch.launch, kernel, grid, **how, **settings)


def trials() -> Iterator[tuple[Shape, Callable[[], Trial]]]:
    """List the comparisons, the newest kernel first."""
    for shape in map(shape_named, ATTENTION_SHAPES):
        for counted in (False, True):
            yield shape, functools.partial(attention_trial, shape, counted)
    for shape in map(shape_named, JOINT_SHAPES):
        yield shape, functools.partial(joint_trial, shape)


def compile_attention(folder: Path) -> None:
    """Compile the kernels of attention in parallel processes; later stages report the failures."""
    log = folder / "logs" / "gluon-compile.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    jobs: list[tuple[Shape, bool, Tile | None]] = []
    for shape in map(shape_named, ATTENTION_SHAPES):
        for counted in (False, True):
            tiles = [] if shape.head_dim in seen else candidates.tiles(attention_key(shape, counted))
            jobs += [(shape, counted, tile) for tile in (*tiles, None)]
        seen.add(shape.head_dim)
    forks.preload()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ask = functools.partial(forks.ask, attend_once, log=log, seconds=COMPILE_SECONDS)
        for answer in pool.map(lambda job: ask(*job), jobs):
            if answer.error:
                print(answer.error, flush=True)


def attend_once(shape: Shape, counted: bool, tile: Tile | None) -> None:
    """Compile and run the kernel of a tile, or the general one."""
    trial = attention_trial(shape, counted)
    with _configs.trying(trial.key, tile):
        trial.call()
    torch.cuda.synchronize()


def main() -> int:
    options = arguments.parser(__doc__).parse_args()
    clock = arguments.Clock(options.seconds)
    compile_attention(options.out)
    measure.use_cuda()
    rows: list[dict[str, Any]] = []
    for shape, trial in trials():
        if clock.left() < 4:
            break
        for row in compare(trial(), shape):
            rows.append(row)
            write(options.out / "gluon.json", rows)
            print(row, flush=True)
    return 0 if rows and all(row["right"] is not False for row in rows) else 1
