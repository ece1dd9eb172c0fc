"""Stage "gluon": the joint argmax for Hopper, which is written in Gluon, against the kernel that all GPUs have.

For each shape, both give the same matches, and how long each takes; the kernel for Hopper with each of its tiles.
"""

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qalign_kernels import _backends
from qalign_kernels._triton import _configs, _launch
from qalign_kernels._triton._configs import Key, Tile
from qalign_kernels._triton._launch import target_of
from qalign_kernels.bench import measure

from ..shapes import FOLDED_HEAD_DIM, Shape, make_inputs
from . import arguments

ROUNDS = 20
SHAPES = (
    Shape("sdxl", 2, 10, 4096, 64),
    Shape("flux", 1, 24, 4096, 128),
    Shape("sd15-512px", 1, 8, 4096, 40),
    Shape("sdxl-low", 2, 20, 1024, 64),
    Shape("sd15-low", 2, 8, 1024, 80),
    Shape("sd21-1024px", 1, 5, 16384, 64),
)
TILES = (Tile(128, 256, 8, 4), Tile(128, 128, 8, 6))


def key_of(shape: Shape) -> Key:
    """Give the key of the kernel for Hopper at a shape."""
    tokens, triton = _configs.token_bucket(shape.tokens), _configs.triton_minor()
    target = target_of(torch.device("cuda", 0))
    return Key("similarity", "joint hopper", target, triton, "bfloat16", tokens, FOLDED_HEAD_DIM)


def compare(shape: Shape) -> Iterator[dict[str, Any]]:
    """Yield the time of the general kernel, then that of each tile of the other and whether it is right."""
    inputs = make_inputs(shape, True, torch.bfloat16, "cuda")
    module: Any = _backends.implementation("triton", "similarity")

    def call() -> tuple[Tensor, Tensor]:
        return module.similarity_argmax(inputs.query, inputs.ref_query, "cosine", True)

    key = key_of(shape)
    shipped = _configs.tiles().get(key)
    with _configs.trying(key, None):
        wanted = call()
        yield {"shape": shape.size, "tile": None, "right": None, **_times(shape, call, None)}
    for tile in TILES:
        row = {"shape": shape.size, "tile": tile, "shipped": tile == shipped}
        with _configs.trying(key, tile):
            try:
                yield {**row, **_same(wanted, call()), **_times(shape, call, tile)}
            except Exception as error:  # the next tile is worth a try
                problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                yield {**row, "right": False, "error": problem}


def _same(wanted: tuple[Tensor, Tensor], match: tuple[Tensor, Tensor]) -> dict[str, Any]:
    (wanted_index, wanted_score), (index, score) = wanted, match
    error = (score - wanted_score).abs().max().item()
    same = (index == wanted_index).float().mean().item()
    right = error < 1e-4 and same > 0.999 and score.abs().max().item() > 0
    return {"right": right, "largest_error": error, "same_index": same}


def _times(shape: Shape, call: Callable[[], Any], tile: Tile | None) -> dict[str, Any]:
    """Give the µs of the whole op and of its argmax alone."""
    launch = _argmax_launch(call, tile)
    whole, alone = (
        1e6 * statistics.median(measure.time_rounds(one, ROUNDS, flushes=4)) for one in (call, launch)
    )
    work = 2 * shape.batch * shape.tokens**2 * shape.heads * shape.head_dim
    return {"us": round(whole, 2), "kernel_us": round(alone, 2), "tflops": round(work / alone / 1e6, 1)}


def _argmax_launch(call: Callable[[], Any], tile: Tile | None) -> Callable[[], None]:
    """Give the launch of the argmax among those of the op; to repeat it changes nothing.

    What is compiled for Hopper counts the warps that load as well, so the tile says how many there are.
    """
    launched: list[tuple[Any, ...]] = []
    with _launch.watching(lambda *one: launched.append(one)):
        call()
    kernel, grid, settings, compiled = next(one for one in launched if "argmax" in one[0].fn.__name__)
    source = compiled.metadata if tile is None else tile
    how = {"num_warps": source.num_warps, "num_stages": source.num_stages}
    return functools.partial(_launch.launch, kernel, grid, **how, **settings)


def main() -> int:
    options = arguments.parser(__doc__).parse_args()
    clock = arguments.Clock(options.seconds)
    measure.use_cuda()
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        if clock.left() < 4:
            break
        for row in compare(shape):
            rows.append(row)
            arguments.write_json(options.out / "gluon.json", rows)
            print(row, flush=True)
    return 0 if rows and all(row["right"] is not False for row in rows) else 1
