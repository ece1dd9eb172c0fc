"""The joint argmax on Hopper, in Gluon: one warp loads, eight warps multiply.

B batch rows, N_Q and N_K tokens, C channels of all heads. `similarity._hopper_tile` says which calls take it.

1. The producer copies tiles of queries and keys into a ring of buffers, BLOCK_K channels at a time, with the
   bulk copy engine. Rows of queries beyond the end belong to the next batch row, or are zero.
2. The consumers multiply buffer after buffer and sum the scores of one tile of keys.
3. They keep the best score of every query and its index.
4. They write the matches of the queries that exist.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._configs import Tile
from ._matches import Best, KeyRange, Outputs, best_column, better, reference_row, store_best

BLOCK_K = 64  # channels of a buffer: 128 bytes, the widest swizzle
PRODUCER_REGISTERS = gl.constexpr(24)
ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


class Ring(NamedTuple):
    """Buffers of queries and keys in shared memory, and barriers that say which are full or empty."""

    queries: Any
    keys: Any
    full: Any
    empty: Any


class Place(NamedTuple):
    """The first rows of the queries and keys of a program in their matrices, and its tiles of keys."""

    query: Any
    keys: Any
    tiles: KeyRange


@gluon.jit
def _produce(query, reference, ring, place, channels):
    """Copy the channels of the queries with those of one tile of keys after the other."""
    BUFFERS: gl.constexpr = ring.full.shape[0]
    BLOCK_N: gl.constexpr = reference.block_type.shape[0]
    BLOCK_K: gl.constexpr = reference.block_type.shape[1]
    step = 0
    for tile in range(place.tiles.first, place.tiles.last):
        keys = place.keys + gl.minimum(tile * BLOCK_N, place.tiles.last_start)
        for channel in range(0, channels, BLOCK_K):
            slot = step % BUFFERS
            full = ring.full.index(slot)
            mbarrier.wait(ring.empty.index(slot), ((step // BUFFERS) & 1) ^ 1)
            mbarrier.expect(full, query.block_type.nbytes + reference.block_type.nbytes)
            tma.async_copy_global_to_shared(query, [place.query, channel], full, ring.queries.index(slot))
            tma.async_copy_global_to_shared(reference, [keys, channel], full, ring.keys.index(slot))
            step += 1


@gluon.jit
def _multiply(ring, step, steps, LAYOUT: gl.constexpr):
    """The scores of `steps` buffers, from number `step` on: fp32 [BLOCK_M, BLOCK_N]."""
    BUFFERS: gl.constexpr = ring.full.shape[0]
    BLOCK_M: gl.constexpr = ring.queries.shape[1]
    BLOCK_N: gl.constexpr = ring.keys.shape[1]
    scores = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, LAYOUT)
    for done in range(steps):
        slot = step % BUFFERS
        mbarrier.wait(ring.full.index(slot), (step // BUFFERS) & 1)
        keys = ring.keys.index(slot).permute((1, 0))
        scores = warpgroup_mma(ring.queries.index(slot), keys, scores, use_acc=done > 0, is_async=True)
        scores = warpgroup_mma_wait(1, (scores,))
        if done > 0:  # the product before this one has read its buffer
            mbarrier.arrive(ring.empty.index((step + BUFFERS - 1) % BUFFERS), count=1)
        step += 1
    scores = warpgroup_mma_wait(0, (scores,))
    mbarrier.arrive(ring.empty.index((step + BUFFERS - 1) % BUFFERS), count=1)
    return scores


@gluon.jit
def _consume(pair, outputs, ring, tiles, row, reference_batch, row_tile, LAYOUT: gl.constexpr):
    """Write the best score of each query and the lowest index with this score."""
    BLOCK_M: gl.constexpr = ring.queries.shape[1]
    BLOCK_N: gl.constexpr = ring.keys.shape[1]
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    best = Best(gl.full([BLOCK_M], float("-inf"), gl.float32, ROWS), gl.full([BLOCK_M], -1, gl.int32, ROWS))
    step = 0
    for tile in range(tiles.first, tiles.last):
        start = gl.minimum(tile * BLOCK_N, tiles.last_start)
        if pair.reference_norm_ptr is not None:  # before the products, which take longer than the load
            norms = gl.load(pair.reference_norm_ptr + reference_batch * pair.N_K + start + columns)
        scores = _multiply(ring, step, pair.H, LAYOUT)
        step += pair.H
        if pair.reference_norm_ptr is not None:
            scores *= norms[None, :]
        best = better(best, best_column(scores, (start + columns)[None, :]))
    tokens = row_tile * BLOCK_M + gl.arange(0, BLOCK_M, ROWS)
    store_best(pair, outputs, row, tokens, best)


@gluon.jit
def joint_argmax_hopper_kernel(
    query,
    reference,
    pair,
    index_ptr,
    score_ptr,
    match_ptr,
    counts_ptr,
    SPLITS,
    TILES_PER_SPLIT,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """A tile of queries against its split of the keys. Descriptors are those of matrices [B·N, C]."""
    BLOCK_K: gl.constexpr = query.block_type.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_N, 16]
    )
    ring = Ring(
        gl.allocate_shared_memory(query.dtype, [BUFFERS, BLOCK_M, BLOCK_K], query.layout),
        gl.allocate_shared_memory(query.dtype, [BUFFERS, BLOCK_N, BLOCK_K], reference.layout),
        gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout()),
    )
    for slot in gl.static_range(BUFFERS):
        mbarrier.init(ring.full.index(slot), count=1)
        mbarrier.init(ring.empty.index(slot), count=1)
    row_tiles = gl.cdiv(pair.N_Q, BLOCK_M)
    row_tile, split = gl.program_id(0) % row_tiles, (gl.program_id(0) // row_tiles) % SPLITS
    row = (gl.program_id(0) // row_tiles // SPLITS).to(gl.int64)
    reference_batch = reference_row(pair, row)
    first = split * TILES_PER_SPLIT
    last = gl.minimum(first + TILES_PER_SPLIT, gl.cdiv(pair.N_K, BLOCK_N))
    tiles = KeyRange(first, last, pair.N_K - BLOCK_N)
    first_query = row * (pair.query.pitch_b // pair.query.pitch_n) + row_tile * BLOCK_M
    first_key = reference_batch * (pair.reference.pitch_b // pair.reference.pitch_n)
    place = Place(first_query.to(gl.int32), first_key.to(gl.int32), tiles)
    outputs = Outputs(index_ptr, score_ptr, match_ptr, counts_ptr)
    gl.warp_specialize(
        [
            (_consume, (pair, outputs, ring, tiles, row, reference_batch, row_tile, LAYOUT)),
            (_produce, (query, reference, ring, place, pair.H * BLOCK_K)),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Features [B, H, N, D] with heads side by side as a matrix [B·N, C], read `rows` tokens at a time."""
    batch, heads, tokens, dim = x.shape
    pitch, block = x.stride(2), [rows, BLOCK_K]
    height = (batch - 1) * (x.stride(0) // pitch) + tokens
    layout = gl.NVMMASharedLayout.get_default_for(block, ELEMENTS[x.dtype])
    return TensorDescriptor(x, [height, heads * dim], [pitch, 1], block, layout)


def arguments(query: Tensor, reference: Tensor, tile: Tile) -> dict[str, Any]:
    """The arguments that only this kernel takes."""
    return {
        "query": descriptor(query, tile.block_m),
        "reference": descriptor(reference, tile.block_n),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BUFFERS": tile.num_stages,
    }
