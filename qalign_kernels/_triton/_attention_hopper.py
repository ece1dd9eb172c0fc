"""Attention on Hopper, in Gluon: one warp loads, two warp groups multiply, each for its own queries.

N_Q queries, N_K keys, D channels. Tensors are [B, H, N, D]. `_attention_choice.py` says which calls take it.

1. The producer copies the queries once. Then it copies tiles of keys and values into a ring of buffers, with
   the bulk copy engine. What the engine reads beyond the tensor is zero. The last tile of keys comes first:
   no other tile may be incomplete.
2. A consumer multiplies its queries and the next tile of keys before it multiplies the weights and values of
   the current tile. In this way exponentials and products overlap.
3. If FIXED, the largest score of the first tile serves as the maximum of all tiles, which saves the running
   maximum. If it was too far from the true maximum of a query, both consumers walk over all keys again, with
   a running maximum.
4. A consumer divides by the sum of the weights and writes its output through shared memory.

Why this file has more than 400 lines: `tests/gluon_on_cpu.py` runs the kernel on the CPU from the source of
one file, so producer, consumer and what they share stand in it.
"""

from typing import Any, NamedTuple

import triton.language as tl
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
from ._joint_hopper import ELEMENTS, PRODUCER_REGISTERS
from ._tile import unpack_match

CONSUMERS = gl.constexpr(2)
CONSUMER_REGISTERS = gl.constexpr(240)
PARTS = gl.constexpr(8)  # of a row sum: lanes keep them apart and add them after the last tile
FIXED_LIMIT = gl.constexpr(2.0**64)  # of a row sum, and of its inverse, with the maximum of one tile


class Ring(NamedTuple):
    """Shared memory: tiles, barriers that say which are full or empty, and the verdicts of the consumers."""

    query_tiles: Any
    key_tiles: Any
    value_tiles: Any
    queries_full: Any
    keys_full: Any
    keys_empty: Any
    values_full: Any
    values_empty: Any
    verdicts: Any  # of each consumer: whether it must walk over all keys again
    judged: Any


class Place(NamedTuple):
    """The queries of a program, and where their keys and log weights are."""

    row: Any
    batch: Any
    head: Any
    key_batch: Any
    order_row: Any
    first_query: Any
    limit: Any  # how many keys there are
    tiles: Any  # of keys, at least one


class Outputs(NamedTuple):
    """Where results go; None for a tensor that the call does not have. A match may make an output NaN."""

    output_ptr: Any
    lse_ptr: Any
    lse_unit: Any
    match_ptr: Any
    N_Q: Any


class State(NamedTuple):
    """What the queries have gathered: maximum logit, sum of the weights, weighted sum of the values."""

    running_max: Any
    row_sum: Any
    output: Any


class Weighed(NamedTuple):
    """The weights of a tile of scores, the maximum so far, and the factor for earlier sums."""

    weights: Any
    running_max: Any
    rescale: Any


@gluon.jit
def _copy_tiles(key, value, ring, place, step):
    """Copy all tiles of keys and values, the last one first. Returns the number of the next step."""
    BUFFERS: gl.constexpr = ring.key_tiles.shape[0]
    BLOCK_N: gl.constexpr = key.block_type.shape[2]
    for done in range(place.tiles):
        start = (place.tiles - 1 - done) * BLOCK_N
        slot, parity = step % BUFFERS, ((step // BUFFERS) & 1) ^ 1
        full = ring.keys_full.index(slot)
        mbarrier.wait(ring.keys_empty.index(slot), parity)
        mbarrier.expect(full, key.block_type.nbytes)
        place_of_tile = [place.key_batch, place.head, start, 0]
        tma.async_copy_global_to_shared(key, place_of_tile, full, ring.key_tiles.index(slot))
        full = ring.values_full.index(slot)
        mbarrier.wait(ring.values_empty.index(slot), parity)
        mbarrier.expect(full, value.block_type.nbytes)
        tma.async_copy_global_to_shared(value, place_of_tile, full, ring.value_tiles.index(slot))
        step += 1
    return step


@gluon.jit
def _produce(query, key, value, ring, place, FIXED: gl.constexpr):
    """Copy queries, keys and values. Copy keys and values again if a consumer must walk over them again."""
    ROWS: gl.constexpr = query.block_type.shape[2]
    full = ring.queries_full.index(0)
    mbarrier.expect(full, CONSUMERS * query.block_type.nbytes)
    for part in gl.static_range(CONSUMERS):
        first = place.first_query + part * ROWS
        tma.async_copy_global_to_shared(
            query, [place.batch, place.head, first, 0], full, ring.query_tiles.index(part)
        )
    step = _copy_tiles(key, value, ring, place, gl.to_tensor(0))
    if FIXED:
        if _refused(ring):
            _copy_tiles(key, value, ring, place, step)


@gluon.jit
def _refused(ring):
    """Whether the maximum of the first tile failed for one of the consumers."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(ring.judged.index(0), 0)
    refused = ring.verdicts.index(0).load(LANES)
    for part in gl.static_range(1, CONSUMERS):
        refused |= ring.verdicts.index(part).load(LANES)
    return gl.max(refused, 0) > 0


@gluon.jit
def _judge(ring, row_sum, inside, PART: gl.constexpr):
    """Tell the others whether a row sum is out of bounds or NaN. Returns whether any consumer's is."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    good = (row_sum < FIXED_LIMIT) & (row_sum > 1 / FIXED_LIMIT)
    bad = gl.max((inside & ~good).to(gl.int32), 0)
    ring.verdicts.index(PART).store(gl.full([1], 0, gl.int32, LANES) + bad)
    tl.debug_barrier()
    mbarrier.arrive(ring.judged.index(0), count=1)
    return _refused(ring)


@gluon.jit
def _start_scores(ring, step, PART: gl.constexpr, LAYOUT: gl.constexpr):
    """Start to multiply the queries and the next tile of keys."""
    ROWS: gl.constexpr = ring.query_tiles.shape[3]
    BLOCK_N: gl.constexpr = ring.key_tiles.shape[3]
    D: gl.constexpr = ring.key_tiles.shape[4]
    _await(ring.keys_full, step)
    queries = ring.query_tiles.index(PART).reshape([ROWS, D])
    keys = ring.key_tiles.index(step % ring.key_tiles.shape[0]).reshape([BLOCK_N, D]).permute((1, 0))
    empty = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    return warpgroup_mma(queries, keys, empty, use_acc=False, is_async=True)


@gluon.jit
def _start_output(ring, step, weights, output):
    """Start to add the weighted values of a tile to the output."""
    BLOCK_N: gl.constexpr = ring.value_tiles.shape[3]
    D: gl.constexpr = ring.value_tiles.shape[4]
    values = ring.value_tiles.index(step % ring.value_tiles.shape[0]).reshape([BLOCK_N, D])
    return warpgroup_mma(weights, values, output, is_async=True)


@gluon.jit
def _await(full, step):
    """Wait until the producer has filled the buffer of a step."""
    mbarrier.wait(full.index(step % full.shape[0]), (step // full.shape[0]) & 1)


@gluon.jit
def _release(empty, step):
    """Give a buffer back to the producer."""
    mbarrier.arrive(empty.index(step % empty.shape[0]), count=1)


@gluon.jit
def _factor(segment):
    """The factor from scores to logits. The scale of a segment is above 0; NEGATIVE gives the sign."""
    if segment.NEGATIVE:
        return -segment.scale
    else:
        return segment.scale


@gluon.jit
def _largest(scores, segment):
    """The largest logit of each row, without the shift."""
    if segment.NEGATIVE:
        return gl.min(scores, 1) * _factor(segment)
    else:
        return gl.max(scores, 1) * _factor(segment)


@gluon.jit
def _weigh(scores, log_weights, running_max, segment, FIXED: gl.constexpr, MASKED: gl.constexpr):
    """The weights of a tile of scores. With counts, all queries have the same FIXED maximum."""
    factor = _factor(segment)
    rescale = running_max
    if FIXED:
        if log_weights is None:
            weights = gl.exp2(scores * factor + (segment.shift - running_max)[:, None])
        else:
            weights = gl.exp2(scores * factor + log_weights[None, :])
    else:
        if log_weights is None:
            largest = _largest(scores, segment) + segment.shift
        else:
            scores = scores * factor + log_weights[None, :]
            largest = gl.max(scores, 1) + segment.shift
        new_max = gl.maximum(running_max, largest)
        stabiliser = new_max
        if MASKED:
            stabiliser = gl.where(new_max == float("-inf"), 0.0, new_max)
        if log_weights is None:
            weights = gl.exp2(scores * factor + (segment.shift - stabiliser)[:, None])
        else:
            weights = gl.exp2(scores + (segment.shift - stabiliser)[:, None])
        rescale = gl.exp2(running_max - stabiliser)
        running_max = new_max
    return Weighed(weights, running_max, rescale)


@gluon.jit
def _sum(weights, FIXED: gl.constexpr):
    """The sum of each row. If FIXED, it stays in PARTS."""
    if FIXED:
        parts = gl.reshape(weights, [weights.shape[0], weights.shape[1] // PARTS, PARTS])
        return gl.sum(parts, 1)
    else:
        return gl.sum(weights, 1)


@gluon.jit
def _attend(ring, segment, place, step, PART: gl.constexpr, FIXED: gl.constexpr, LAYOUT: gl.constexpr):
    """The queries of a consumer meet all keys. If FIXED, the maximum is that of the first tile.

    It stays in one piece because a product starts in one pass of the loop and is awaited in the next.
    """
    ROWS: gl.constexpr = ring.query_tiles.shape[3]
    BLOCK_N: gl.constexpr = ring.key_tiles.shape[3]
    D: gl.constexpr = ring.value_tiles.shape[4]
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    ELEMENT: gl.constexpr = ring.key_tiles.dtype
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    log_weights = None
    start = (place.tiles - 1) * BLOCK_N
    present = start + columns < place.limit
    if segment.log_weights_ptr is not None:
        log_weights_ptr = segment.log_weights_ptr + place.order_row * segment.N_K
        log_weights = gl.load(log_weights_ptr + start + columns, mask=present, other=0.0)

    scores = warpgroup_mma_wait(0, (_start_scores(ring, step, PART, LAYOUT),))
    _release(ring.keys_empty, step)
    absent = float("inf") if segment.NEGATIVE else float("-inf")
    scores = gl.where(present[None, :], scores, absent)
    common_max = 0.0
    if FIXED:
        running_max = _largest(scores, segment) + segment.shift
        if segment.log_weights_ptr is not None:
            common_max = gl.max(running_max, 0)
            running_max = gl.zeros_like(running_max) + common_max
            log_weights += segment.shift - common_max
    else:
        running_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
    weighed = _weigh(scores, log_weights, running_max, segment, FIXED, True)
    running_max, row_sum = weighed.running_max, _sum(weighed.weights, FIXED)
    weights = gl.convert_layout(weighed.weights.to(ELEMENT), WEIGHTS)
    output = gl.zeros([ROWS, D], gl.float32, OUTPUT)
    _await(ring.values_full, step)
    for _ in range(1, place.tiles):
        start -= BLOCK_N
        if segment.log_weights_ptr is not None:  # before the products, which take longer than the load
            log_weights = gl.load(log_weights_ptr + start + columns)
        pending_scores = _start_scores(ring, step + 1, PART, LAYOUT)
        pending_output = _start_output(ring, step, weights, output)
        scores = warpgroup_mma_wait(1, (pending_scores,))
        if FIXED and segment.log_weights_ptr is not None:
            log_weights += segment.shift - common_max
        weighed = _weigh(scores, log_weights, running_max, segment, FIXED, False)
        running_max = weighed.running_max
        if FIXED:
            row_sum += _sum(weighed.weights, FIXED)
        else:
            row_sum = row_sum * weighed.rescale + _sum(weighed.weights, FIXED)
        later_weights = gl.convert_layout(weighed.weights.to(ELEMENT), WEIGHTS)
        # this wait keeps the compiler from moving the computation of the weights behind the next wait
        _await(ring.values_full, step + 1)
        output, weights = warpgroup_mma_wait(0, (pending_output, weights))
        _release(ring.keys_empty, step + 1)
        _release(ring.values_empty, step)
        if not FIXED:
            output *= gl.convert_layout(weighed.rescale, gl.SliceLayout(1, OUTPUT))[:, None]
        weights = later_weights
        step += 1
    pending_output = _start_output(ring, step, weights, output)
    output, weights = warpgroup_mma_wait(0, (pending_output, weights))
    _release(ring.values_empty, step)
    if FIXED:
        row_sum = gl.convert_layout(gl.sum(row_sum, 1), gl.SliceLayout(1, LAYOUT))
    return State(running_max, row_sum, output)


@gluon.jit
def _consume(segment, outputs, ring, place, PART: gl.constexpr, FIXED: gl.constexpr):
    """Write the attention of a part of the queries."""
    ROWS: gl.constexpr = ring.query_tiles.shape[3]
    BLOCK_N: gl.constexpr = ring.key_tiles.shape[3]
    D: gl.constexpr = ring.value_tiles.shape[4]
    WARPS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    queries = place.first_query + PART * ROWS + gl.arange(0, ROWS, ROW)
    inside = queries < outputs.N_Q
    mbarrier.wait(ring.queries_full.index(0), 0)
    state = _attend(ring, segment, place, gl.to_tensor(0), PART, FIXED, LAYOUT)
    if FIXED:
        if _judge(ring, state.row_sum, inside, PART):
            state = _attend(ring, segment, place, place.tiles, PART, False, LAYOUT)

    empty = state.row_sum == 0.0
    row_sum = gl.where(empty, 1.0, state.row_sum)
    factor = gl.where(empty, 0.0, 1.0 / row_sum)
    if outputs.match_ptr is not None:
        match_row = place.batch.to(gl.int64) * segment.maps + place.head % segment.maps
        match = gl.load(outputs.match_ptr + match_row * outputs.N_Q + queries, mask=inside, other=0)
        match_score, match_index = unpack_match(match)
        factor = gl.where(match_score == match_score, factor, float("nan"))
    if outputs.lse_ptr is not None:
        lse = gl.where(empty, float("-inf"), state.running_max + gl.log2(row_sum))
        gl.store(outputs.lse_ptr + place.row * outputs.N_Q + queries, lse * outputs.lse_unit, mask=inside)

    # through the shared memory of the queries, which have met all keys: wide stores
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    # without keys, values were not written
    output = gl.where(gl.convert_layout(empty, gl.SliceLayout(1, OUTPUT))[:, None], 0.0, state.output)
    scaled = output * gl.convert_layout(factor, gl.SliceLayout(1, OUTPUT))[:, None]
    room = ring.query_tiles.index(PART).reshape([ROWS, D])
    room.store(scaled.to(ring.query_tiles.dtype))
    rows = place.first_query + PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
    channels = gl.arange(0, D, gl.SliceLayout(0, WIDE))
    pointers = outputs.output_ptr + (place.row * outputs.N_Q + rows)[:, None] * D + channels[None, :]
    gl.store(pointers, room.load(WIDE), mask=(rows < outputs.N_Q)[:, None])


@gluon.jit
def attention_hopper_kernel(
    query,
    key,
    value,
    segment,
    output_ptr,
    lse_ptr,
    lse_unit,
    match_ptr,
    H,
    N_Q,
    FIXED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """BLOCK_M queries for each consumer, of one batch row and head, against every key.

    It is long because all shared memory and all barriers of the partitions are made here.
    """
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    D: gl.constexpr = query.block_type.shape[3]
    ring = Ring(
        gl.allocate_shared_memory(query.dtype, [CONSUMERS, 1, 1, BLOCK_M, D], query.layout),
        gl.allocate_shared_memory(query.dtype, [BUFFERS, 1, 1, BLOCK_N, D], key.layout),
        gl.allocate_shared_memory(query.dtype, [BUFFERS, 1, 1, BLOCK_N, D], value.layout),
        gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER),
        gl.allocate_shared_memory(gl.int32, [CONSUMERS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER),
    )
    mbarrier.init(ring.queries_full.index(0), count=1)
    mbarrier.init(ring.judged.index(0), count=CONSUMERS)
    for slot in gl.static_range(BUFFERS):
        mbarrier.init(ring.keys_full.index(slot), count=1)
        mbarrier.init(ring.keys_empty.index(slot), count=CONSUMERS)
        mbarrier.init(ring.values_full.index(slot), count=1)
        mbarrier.init(ring.values_empty.index(slot), count=CONSUMERS)
    blocks = gl.cdiv(N_Q, CONSUMERS * BLOCK_M)
    row = gl.program_id(0) // blocks
    batch, head, key_batch = row // H, row % H, row // H
    limit, order_row = segment.N_K, batch
    if segment.rows_ptr is not None:
        key_batch = gl.load(segment.rows_ptr + batch * segment.rows_stride).to(gl.int32)
        key_batch = gl.minimum(gl.maximum(key_batch, 0), segment.rows_number - 1)
    if segment.unique_ptr is not None:
        order_row = batch * segment.order_stride_b + head % segment.maps
        limit = gl.load(segment.unique_ptr + order_row)
    place = Place(
        row.to(gl.int64),
        batch,
        head,
        key_batch,
        order_row.to(gl.int64),
        (gl.program_id(0) % blocks) * (CONSUMERS * BLOCK_M),
        limit,
        gl.maximum(gl.cdiv(limit, BLOCK_N), 1),
    )
    outputs = Outputs(output_ptr, lse_ptr, lse_unit, match_ptr, N_Q)
    gl.warp_specialize(
        [
            (_consume, (segment, outputs, ring, place, gl.constexpr(0), FIXED)),
            (_consume, (segment, outputs, ring, place, gl.constexpr(1), FIXED)),
            (_produce, (query, key, value, ring, place, FIXED)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Features [B, H, N, D] as the bulk copy engine reads them, `rows` tokens of a head at a time."""
    block = [1, 1, rows, x.shape[3]]
    # the stride of a dimension of one is any number
    strides = [stride if size > 1 else x.shape[3] for stride, size in zip(x.stride()[:3], x.shape)]
    layout = gl.NVMMASharedLayout.get_default_for(block, ELEMENTS[x.dtype])
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)


def arguments(query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> dict[str, Any]:
    """The arguments that only this kernel takes."""
    rows = tile.block_m // CONSUMERS.value
    return {
        "query": descriptor(query, rows),
        "key": descriptor(key, tile.block_n),
        "value": descriptor(value, tile.block_n),
        "BLOCK_M": rows,
        "BLOCK_N": tile.block_n,
        "BUFFERS": tile.num_stages,
    }
