"""match_counts, compact, take_chosen and take_rows on Triton. B batch rows, G maps (1 or H), N tokens, D channels."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._tile import features, load_rows, open_tile, rows_of, store_channels

COUNT_BLOCK = 1024
COMPACT_BLOCKS = (
    1024,
    4096,
)  # the least and the most tokens at a time, up to 16 a thread: 16 warps spill under Triton 3.6
GATHER_BLOCK_M = 64
GATHER_WIDTH = 128


def match_counts(index: Tensor, num_tokens: int) -> Tensor:
    batch, maps, tokens = index.shape
    counts = torch.zeros((batch, maps, num_tokens), device=index.device, dtype=torch.int32)
    grid = (batch * maps * triton.cdiv(tokens, COUNT_BLOCK),)
    launch(
        _match_counts_kernel,
        grid,
        num_warps=4,
        num_stages=1,
        index_ptr=index,
        index_strides=index.stride(),
        counts_ptr=counts,
        G=maps,
        N_Q=tokens,
        N_K=num_tokens,
        BLOCK=COUNT_BLOCK,
    )
    return counts


class Multiplicity(NamedTuple):
    """The reference tokens that were chosen, and how often; `unique` many of each row's N entries count."""

    order: Tensor  # int32 [B, G, N], ascending, zeros behind
    weights: Tensor  # float32 [B, G, N], the counts in this order, zeros behind
    log_weights: Tensor  # float32 [B, G, N], log2 of the counts, zeros behind
    unique: Tensor  # int32 [B, G]
    headroom: Tensor  # float32 [B, G], log2 of what the largest count exceeds 2^15 by, for fp16
    total: Tensor  # float32 [B, G], the sum of the counts


def compact(counts: Tensor) -> Multiplicity:
    """Deterministic, no host synchronisation; counts int32 [B, G, N], any strides."""
    batch, maps, tokens = counts.shape
    block = min(max(triton.next_power_of_2(tokens), COMPACT_BLOCKS[0]), COMPACT_BLOCKS[1])
    shapes = [counts.shape] * 3 + [counts.shape[:2]] * 3
    dtypes = (torch.int32, torch.float32, torch.float32, torch.int32, torch.float32, torch.float32)
    multiplicity = Multiplicity(
        *(torch.empty(shape, device=counts.device, dtype=dtype) for shape, dtype in zip(shapes, dtypes))
    )
    launch(
        _compact_kernel,
        (batch * maps,),
        num_warps=max(4, block // 512),
        num_stages=1,
        counts_ptr=counts,
        counts_strides=counts.stride(),
        **{f"{name}_ptr": x for name, x in multiplicity._asdict().items()},
        G=maps,
        N_K=tokens,
        BLOCK=block,
    )
    return multiplicity


def take_chosen(
    sources: Sequence[Tensor], multiplicity: Multiplicity, batch_index: Tensor | None
) -> list[Tensor]:
    """Gather the chosen tokens of each source [B, H, N, D] in their order: contiguous, without a value behind.

    Walking over gathered tokens is faster than reading every tile of them through the order.
    """
    order = multiplicity.order
    (heads, tokens), (rows, maps) = sources[0].shape[1:3], order.shape[:2]
    batch = sources[0].shape[0] if batch_index is None else batch_index.shape[0]
    taken = [x.new_empty((batch, *x.shape[1:])) for x in sources]
    launch(
        _take_chosen_kernel,
        (batch * heads * triton.cdiv(tokens, GATHER_BLOCK_M),),
        num_warps=4,
        num_stages=1,
        sources=tuple(map(features, sources)),
        taken_ptrs=tuple(taken),
        rows_ptr=batch_index,
        rows_stride=0 if batch_index is None else batch_index.stride(0),
        order_ptr=order,
        order_stride_b=maps if rows > 1 else 0,
        unique_ptr=multiplicity.unique,
        H=heads,
        MAPS=maps,
        N=tokens,
        SOURCES=len(sources),
        DIMS=tuple(tl.constexpr(x.shape[3]) for x in sources),
        WIDTHS=tuple(tl.constexpr(triton.next_power_of_2(x.shape[3])) for x in sources),
        BLOCK=GATHER_BLOCK_M,
    )
    return taken


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    (batch, heads, tokens, dim), rows = x.shape, index.shape[2]
    output = torch.empty((batch, heads, rows, dim), device=x.device, dtype=x.dtype)
    index_stride_b, index_stride_g, index_stride_n = index.stride()
    launch(
        _take_rows_kernel,
        (batch * heads * triton.cdiv(rows, GATHER_BLOCK_M),),
        num_warps=4,
        num_stages=1,
        source=features(x),
        index_ptr=index,
        index_strides=(index_stride_b, index_stride_g if index.shape[1] > 1 else 0, index_stride_n),
        output_ptr=output,
        H=heads,
        N_Q=rows,
        N_K=tokens,
        D=dim,
        BLOCK_M=GATHER_BLOCK_M,
        WIDTH=triton.next_power_of_2(dim),
    )
    return output


@triton.jit
def _match_counts_kernel(index_ptr, counts_ptr, index_strides, G, N_Q, N_K, BLOCK: tl.constexpr):
    """A block of matches of one row."""
    blocks = tl.cdiv(N_Q, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    tokens = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    index_ptr += (row // G) * index_strides[0] + (row % G) * index_strides[1]
    index = tl.load(index_ptr + tokens.to(tl.int64) * index_strides[2], mask=tokens < N_Q, other=-1)
    tl.atomic_add(counts_ptr + row * N_K + index, 1, mask=(index >= 0) & (index < N_K), sem="relaxed")


@triton.jit
def _compact_kernel(
    counts_ptr,
    counts_strides,
    order_ptr,
    weights_ptr,
    log_weights_ptr,
    unique_ptr,
    headroom_ptr,
    total_ptr,
    G,
    N_K,
    BLOCK: tl.constexpr,
):
    """One row: a scan of its counts."""
    row = tl.program_id(0).to(tl.int64)
    counts_ptr += (row // G) * counts_strides[0] + (row % G) * counts_strides[1]
    order_ptr += row * N_K
    weights_ptr += row * N_K
    log_weights_ptr += row * N_K
    unique = 0
    largest = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N_K, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        pointers = counts_ptr + tokens.to(tl.int64) * counts_strides[2]
        counts = tl.maximum(tl.load(pointers, mask=tokens < N_K, other=0), 0)
        chosen = (counts > 0).to(tl.int32)
        chosen_before = unique + tl.cumsum(chosen, 0) - chosen
        # chosen tokens fill the row from the front, the zeros of the others from the back
        slot = tl.where(chosen != 0, chosen_before, N_K - 1 - (tokens - chosen_before))
        tl.store(order_ptr + slot, tl.where(chosen != 0, tokens, 0), mask=tokens < N_K)
        tl.store(weights_ptr + slot, counts.to(tl.float32), mask=tokens < N_K)
        tl.store(
            log_weights_ptr + slot, tl.math.log2(tl.maximum(counts, 1).to(tl.float32)), mask=tokens < N_K
        )
        unique += tl.sum(chosen, 0)
        largest = tl.maximum(largest, counts)
        total += counts.to(tl.float32)
    tl.store(unique_ptr + row, unique)
    tl.store(headroom_ptr + row, tl.math.log2(tl.maximum(tl.max(largest, 0).to(tl.float32) / 32768.0, 1.0)))
    tl.store(total_ptr + row, tl.sum(total, 0))


@triton.jit
def _take_chosen_kernel(
    sources,
    taken_ptrs,
    rows_ptr,
    rows_stride,
    order_ptr,
    order_stride_b,
    unique_ptr,
    H,
    MAPS,
    N,
    SOURCES: tl.constexpr,
    DIMS,
    WIDTHS,
    BLOCK: tl.constexpr,
):
    """A tile of chosen tokens of one batch row and head, of every source."""
    row, batch, head, slots, inside = open_tile(N, H, BLOCK)
    order_row = batch * order_stride_b + head % MAPS
    chosen = inside & (slots < tl.load(unique_ptr + order_row))
    if tl.max(chosen.to(tl.int32), 0) > 0:
        source_row = batch
        if rows_ptr is not None:
            source_row = tl.load(rows_ptr + batch * rows_stride).to(tl.int64)
        tokens = tl.load(order_ptr + order_row * N + slots, mask=chosen, other=0).to(tl.int64)
        for s in tl.static_range(SOURCES):
            rows = rows_of(sources[s], source_row, head)
            tile = load_rows(rows, tokens, chosen, DIMS[s], 0, WIDTHS[s], True)
            pointers = taken_ptrs[s] + (row * N + slots) * DIMS[s]
            store_channels(pointers, tile, chosen, DIMS[s], 0, WIDTHS[s])


@triton.jit
def _take_rows_kernel(
    source,
    index_ptr,
    index_strides,
    output_ptr,
    H,
    N_Q,
    N_K,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A tile of taken rows of one batch row and head."""
    row, batch, head, tokens, inside = open_tile(N_Q, H, BLOCK_M)
    index_ptr += batch * index_strides[0] + head * index_strides[1]
    taken = tl.load(index_ptr + tokens * index_strides[2], mask=inside, other=-1).to(tl.int64)
    present = (taken >= 0) & (taken < N_K)
    tile = load_rows(rows_of(source, batch, head), taken, present, D, 0, WIDTH, True)
    store_channels(output_ptr + (row * N_Q + tokens) * D, tile, inside, D, 0, WIDTH)
