"""Stage "gluon": a prototype of the joint argmax for Hopper. One warp loads, eight multiply. It has never run.

Triton's Gluon gives each warp its role. A producer copies tiles of queries and reference with the bulk copy
engine into a ring of buffers; the consumers multiply each buffer and keep the best score and its index for every
query. Each program takes a part of the reference tokens; the parts meet in PyTorch. It may hang: it comes last.
"""

import statistics
from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qalign_kernels.bench import measure

from . import arguments

BLOCK_K = 64
WARPS = 8
PRODUCER_REGISTERS = gl.constexpr(24)
ROUNDS = 20
FAR = gl.constexpr(0x7FFFFFFF)


class Tile(NamedTuple):
    """Rows of queries, columns of reference tokens, buffers of the ring, parts of the reference."""

    block_m: int
    block_n: int
    buffers: int
    parts: int


SIZES = ((4096, 640), (4096, 3072), (4096, 320))  # tokens, channels of all heads: sdxl, flux, sd15
TILES = (Tile(128, 256, 4, 4), Tile(128, 256, 3, 4), Tile(128, 128, 4, 4), Tile(128, 128, 6, 4))


@gluon.jit
def _produce(
    query,
    reference,
    query_ring,
    reference_ring,
    full,
    empty,
    row,
    first,
    tiles,
    channels,
    BUFFERS: gl.constexpr,
):
    """Copy the channels of the queries and of one reference tile after the other."""
    BLOCK_K: gl.constexpr = query.block_type.shape[1]
    BLOCK_N: gl.constexpr = reference.block_type.shape[0]
    step = 0
    for tile in range(tiles):
        for channel in range(0, channels, BLOCK_K):
            slot = step % BUFFERS
            mbarrier.wait(empty.index(slot), ((step // BUFFERS) & 1) ^ 1)
            mbarrier.expect(full.index(slot), query.block_type.nbytes + reference.block_type.nbytes)
            tma.async_copy_global_to_shared(query, [row, channel], full.index(slot), query_ring.index(slot))
            start = (first + tile) * BLOCK_N
            tma.async_copy_global_to_shared(
                reference, [start, channel], full.index(slot), reference_ring.index(slot)
            )
            step += 1


@gluon.jit
def _consume(
    query_ring,
    reference_ring,
    full,
    empty,
    norm_ptr,
    score_ptr,
    index_ptr,
    row,
    out,
    first,
    tiles,
    channels,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BUFFERS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Keep the best score of each query and the lowest index that has it."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_N, 16]
    )
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    best = gl.full([BLOCK_M], float("-inf"), gl.float32, ROWS)
    best_index = gl.full([BLOCK_M], -1, gl.int32, ROWS)
    step = 0
    for tile in range(tiles):
        scores = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, LAYOUT)
        for channel in range(0, channels, BLOCK_K):
            slot = step % BUFFERS
            mbarrier.wait(full.index(slot), (step // BUFFERS) & 1)
            keys = reference_ring.index(slot).permute((1, 0))
            scores = warpgroup_mma(query_ring.index(slot), keys, scores, use_acc=channel > 0, is_async=True)
            scores = warpgroup_mma_wait(1, (scores,))
            if channel > 0:  # the product before this one has been read
                mbarrier.arrive(empty.index((step + BUFFERS - 1) % BUFFERS), count=1)
            step += 1
        scores = warpgroup_mma_wait(0, (scores,))
        mbarrier.arrive(empty.index((step + BUFFERS - 1) % BUFFERS), count=1)
        columns = (first + tile) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        scores = scores * gl.load(norm_ptr + columns)[None, :]
        tile_best = gl.max(scores, 1)
        tile_index = gl.min(gl.where(scores == tile_best[:, None], columns[None, :], FAR), 1)
        best_index = gl.where(tile_best > best, tile_index, best_index)
        best = gl.maximum(best, tile_best)
    places = out + row + gl.arange(0, BLOCK_M, ROWS)
    gl.store(score_ptr + places, best)
    gl.store(index_ptr + places, best_index)


@gluon.jit
def joint_kernel(
    query,
    reference,
    norm_ptr,
    score_ptr,
    index_ptr,
    tokens,
    tiles,
    channels,
    BUFFERS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Descriptors of bf16 [N, C] queries and reference, their tiles as blocks; fp32 and int32 [parts, N]."""
    BLOCK_M: gl.constexpr = query.block_type.shape[0]
    BLOCK_K: gl.constexpr = query.block_type.shape[1]
    BLOCK_N: gl.constexpr = reference.block_type.shape[0]
    query_ring = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, BLOCK_M, BLOCK_K], query.layout)
    reference_ring = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, BLOCK_N, BLOCK_K], reference.layout)
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(BUFFERS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    row, part = gl.program_id(0) * BLOCK_M, gl.program_id(1)
    first, out = part * tiles, part * tokens
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    query_ring,
                    reference_ring,
                    full,
                    empty,
                    norm_ptr,
                    score_ptr,
                    index_ptr,
                    row,
                    out,
                    first,
                    tiles,
                    channels,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    BUFFERS,
                    WARPS,
                ),
            ),
            (
                _produce,
                (
                    query,
                    reference,
                    query_ring,
                    reference_ring,
                    full,
                    empty,
                    row,
                    first,
                    tiles,
                    channels,
                    BUFFERS,
                ),
            ),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )


class Joint(NamedTuple):
    """Inputs and results of the prototype, and how it is launched."""

    query: torch.Tensor
    reference: torch.Tensor
    norm: torch.Tensor
    score: torch.Tensor
    match: torch.Tensor
    tile: Tile

    def launch(self) -> Any:
        """Run the kernel; returns what was compiled."""
        tile, (tokens, channels) = self.tile, self.query.shape
        query, reference = (
            _descriptor(x, rows) for x, rows in ((self.query, tile.block_m), (self.reference, tile.block_n))
        )
        grid = tokens // tile.block_m, tile.parts
        tiles = tokens // tile.block_n // tile.parts
        return joint_kernel[grid](
            query,
            reference,
            self.norm,
            self.score,
            self.match,
            tokens,
            tiles,
            channels,
            BUFFERS=tile.buffers,
            WARPS=WARPS,
            num_warps=WARPS,
        )

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Let the parts meet: the best score and its index, of equal ones the lowest."""
        score, part = self.score.max(0)
        return score, self.match.gather(0, part[None])[0]


def _descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    block = [rows, BLOCK_K]
    return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))


def joint(tokens: int, channels: int, tile: Tile) -> Joint:
    """Draw the inputs of a launch."""
    query, reference = (torch.randn(tokens, channels, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    norm = 1 / reference.float().norm(dim=1)
    score = torch.full((tile.parts, tokens), float("nan"), device="cuda")
    index = torch.full((tile.parts, tokens), -1, device="cuda", dtype=torch.int32)
    return Joint(query, reference, norm, score, index, tile)


def try_tile(tokens: int, channels: int, tile: Tile) -> dict[str, Any]:
    """Hold one launch against PyTorch in fp32, then time it."""
    case = joint(tokens, channels, tile)
    case.launch()
    torch.cuda.synchronize()
    score, index = case.result()
    truth = ((case.query.float() @ case.reference.float().T) * case.norm).max(1)
    error = (truth.values - score).abs().max().item()
    same = (truth.indices == index).float().mean().item()
    seconds = statistics.median(measure.time_rounds(case.launch, ROUNDS, flushes=4))
    work = 2 * tokens * tokens * channels
    return {
        "right": error < 1e-3 * truth.values.abs().max().item() and same > 0.999,
        "error": None,
        "largest_error": error,
        "same_index": same,
        "us": round(seconds * 1e6, 2),
        "tflops": round(work / seconds / 1e12, 1),
    }


def main() -> int:
    options = arguments.parser(__doc__).parse_args()
    clock = arguments.Clock(options.seconds)
    measure.use_cuda()
    rows: list[dict[str, Any]] = []
    for tokens, channels in SIZES:
        for tile in TILES:
            if clock.left() < 2:
                break
            row = {"tokens": tokens, "channels": channels, "tile": tile}
            try:
                row |= try_tile(tokens, channels, tile)
            except Exception as error:  # the next tile is worth a try
                row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            rows.append(row)
            arguments.write_json(options.out / "gluon.json", rows)
            print(row, flush=True)
    return 0 if rows and all(row.get("right") for row in rows) else 1
