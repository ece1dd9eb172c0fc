"""match_counts, compact, take_chosen and take_rows on Triton.

B batch rows, G maps (1 or H), H heads, N tokens, D channels.

- `match_counts`: every match adds 1 to the count of its token.
- `compact`: one program for each row of counts scans them, block after block, and writes the chosen tokens,
  those with a count above 0, in ascending order.
- `take_chosen`: a program has a block of tokens of one head. It counts the chosen tokens before its block, so
  that it knows where its own go, and copies these from every source.
- `take_rows`: a program copies a tile of rows by their indices.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._tile import features, load_rows, open_tile, read_row, rows_of, store_channels

COUNT_BLOCK = 1024
# the least and the most tokens at a time, up to 16 a thread: 16 warps spill under Triton 3.6
COMPACT_BLOCKS = (1024, 4096)
GATHER_BLOCK_M = 64
CHOSEN_VALUES = 8192  # of a source at a time, 32 a thread
CLEARED = tl.constexpr(128)  # behind the chosen tokens, slots are zero up to a multiple of this number


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
    """The reference tokens that were chosen, and how often. The first `unique` of N entries are valid."""

    order: Tensor | None  # int32 [B, G, N], ascending, zeros behind; None where the tokens were taken
    weights: Tensor  # float32 [B, G, N], the counts in this order, zeros behind
    log_weights: Tensor  # float32 [B, G, N], log2 of the counts, zeros behind
    unique: Tensor  # int32 [B, G]
    headroom: Tensor  # float32 [B, G], log2 of what the largest count exceeds 2^15 by, for fp16
    total: Tensor  # float32 [B, G], the sum of the counts


class CountRow(NamedTuple):
    """The counts of the tokens of one row and map."""

    pointer: Any
    stride: Any


def compact(counts: Tensor) -> Multiplicity:
    """The chosen tokens of counts, int32 [B, G, N] with any strides. Deterministic, no synchronisation."""
    batch, maps, tokens = counts.shape
    block = min(max(triton.next_power_of_2(tokens), COMPACT_BLOCKS[0]), COMPACT_BLOCKS[1])
    order = torch.empty(counts.shape, device=counts.device, dtype=torch.int32)
    multiplicity = _empty_multiplicity(counts)._replace(order=order)
    launch(
        _compact_kernel,
        (batch * maps,),
        num_warps=max(4, block // 512),
        num_stages=1,
        counts_ptr=counts,
        counts_strides=counts.stride(),
        multiplicity=multiplicity,
        G=maps,
        N_K=tokens,
        BLOCK=block,
    )
    return multiplicity


def _empty_multiplicity(counts: Tensor) -> Multiplicity:
    """A multiplicity without an order, whose numbers are not written yet."""
    shapes = [counts.shape] * 2 + [counts.shape[:2]] * 3
    dtypes = (torch.float32, torch.float32, torch.int32, torch.float32, torch.float32)
    return Multiplicity(
        None, *(torch.empty(shape, device=counts.device, dtype=dtype) for shape, dtype in zip(shapes, dtypes))
    )


def take_chosen(
    sources: Sequence[Tensor], counts: Tensor, batch_index: Tensor | None
) -> tuple[list[Tensor], Multiplicity]:
    """Gather the tokens of each source [B, H, N, D] that have a count, in their order, in one launch.

    Walking over gathered tokens is faster than reading every tile of them through an order. Each program
    counts the chosen tokens before its own tokens, so that it does not wait for another program.

    Args:
        counts: int32 [B, G, N], any strides.
        batch_index: int32 [B], the row of the sources that each row of the counts chooses from.

    Returns:
        The taken tokens [B, H, N, D], contiguous, and their multiplicity without an order. Behind the last
        token, slots are zero up to a multiple of CLEARED. Later slots are not written.
    """
    (batch, maps, tokens), heads = counts.shape, sources[0].shape[1]
    widths = [triton.next_power_of_2(x.shape[3]) for x in sources]
    block = min(CHOSEN_VALUES // max(widths), CLEARED.value)
    taken = [x.new_empty((batch, *x.shape[1:])) for x in sources]
    multiplicity = _empty_multiplicity(counts)
    launch(
        _take_chosen_kernel,
        (batch * maps + batch * heads * triton.cdiv(tokens, block),),
        num_warps=8,
        num_stages=1,
        counts_ptr=counts,
        counts_strides=counts.stride(),
        sources=tuple(map(features, sources)),
        taken_ptrs=tuple(taken),
        rows_ptr=batch_index,
        rows_stride=0 if batch_index is None else batch_index.stride(0),
        rows_number=None if batch_index is None else sources[0].shape[0],
        multiplicity=multiplicity,
        H=heads,
        G=maps,
        N=tokens,
        TOTALS=batch * maps,
        SOURCES=len(sources),
        DIMS=tuple(tl.constexpr(x.shape[3]) for x in sources),
        WIDTHS=tuple(map(tl.constexpr, widths)),
        BLOCK=block,
        COUNT_BLOCK=min(max(triton.next_power_of_2(tokens), COMPACT_BLOCKS[0]), COMPACT_BLOCKS[1]),
    )
    return taken, multiplicity


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
    """Count a block of matches of one row."""
    blocks = tl.cdiv(N_Q, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    tokens = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    index_ptr += (row // G) * index_strides[0] + (row % G) * index_strides[1]
    index = tl.load(index_ptr + tokens.to(tl.int64) * index_strides[2], mask=tokens < N_Q, other=-1)
    tl.atomic_add(counts_ptr + row * N_K + index, 1, mask=(index >= 0) & (index < N_K), sem="relaxed")


@triton.jit
def _open_counts(counts_ptr, strides, batch, group):
    """The counts of one row and map."""
    offset = tl.cast(batch, tl.int64) * strides[0] + tl.cast(group, tl.int64) * strides[1]
    return CountRow(counts_ptr + offset, strides[2])


@triton.jit
def _load_counts(counts_row, tokens, last):
    """The counts of a row at some tokens, 0 from `last` on."""
    pointers = counts_row.pointer + tokens.to(tl.int64) * counts_row.stride
    return tl.maximum(tl.load(pointers, mask=tokens < last, other=0), 0)


@triton.jit
def _store_weights(multiplicity, slots, counts, inside):
    """The weights of a row, and their logarithms."""
    tl.store(multiplicity.weights + slots, counts.to(tl.float32), mask=inside)
    log_weights = tl.math.log2(tl.maximum(counts, 1).to(tl.float32))
    tl.store(multiplicity.log_weights + slots, log_weights, mask=inside)


@triton.jit
def _slots(tokens, chosen, chosen_before, N):
    """Where tokens go: chosen tokens fill their row from the front, the others from the back."""
    return tl.where(chosen != 0, chosen_before, N - 1 - (tokens - chosen_before))


@triton.jit
def _store_totals(multiplicity, row, unique, largest, total):
    """Write the numbers of a row. `largest` and `total` come in several parts."""
    headroom = tl.math.log2(tl.maximum(tl.max(largest, 0).to(tl.float32) / 32768.0, 1.0))
    tl.store(multiplicity.unique + row, unique)
    tl.store(multiplicity.headroom + row, headroom)
    tl.store(multiplicity.total + row, tl.sum(total, 0))


@triton.jit
def _compact_kernel(counts_ptr, counts_strides, multiplicity, G, N_K, BLOCK: tl.constexpr):
    """Write the chosen tokens of one row, by a scan of its counts."""
    row = tl.program_id(0).to(tl.int64)
    counts_row = _open_counts(counts_ptr, counts_strides, row // G, row % G)
    unique = 0
    largest = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N_K, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        counts = _load_counts(counts_row, tokens, N_K)
        chosen = (counts > 0).to(tl.int32)
        slots = row * N_K + _slots(tokens, chosen, unique + tl.cumsum(chosen, 0) - chosen, N_K)
        tl.store(multiplicity.order + slots, tl.where(chosen != 0, tokens, 0), mask=tokens < N_K)
        _store_weights(multiplicity, slots, counts, tokens < N_K)
        unique += tl.sum(chosen, 0)
        largest = tl.maximum(largest, counts)
        total += counts.to(tl.float32)
    _store_totals(multiplicity, row, unique, largest, total)


@triton.jit
def _sum_up(counts_row, multiplicity, row, N, BLOCK: tl.constexpr):
    """Write the numbers of a row: how many tokens were chosen, the largest count, the sum."""
    unique = tl.zeros((BLOCK,), tl.int32)
    largest = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        counts = _load_counts(counts_row, start + tl.arange(0, BLOCK), N)
        unique += (counts > 0).to(tl.int32)
        largest = tl.maximum(largest, counts)
        total += counts.to(tl.float32)
    _store_totals(multiplicity, row, tl.sum(unique, 0), largest, total)


@triton.jit
def _count_chosen(counts_row, last, BLOCK: tl.constexpr):
    """How many of the tokens before `last` were chosen."""
    chosen = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, last, BLOCK):
        chosen += (_load_counts(counts_row, start + tl.arange(0, BLOCK), last) > 0).to(tl.int32)
    return tl.sum(chosen, 0)


@triton.jit
def _take_chosen_kernel(
    counts_ptr,
    counts_strides,
    sources,
    taken_ptrs,
    rows_ptr,
    rows_stride,
    rows_number,
    multiplicity,
    H,
    G,
    N,
    TOTALS,
    SOURCES: tl.constexpr,
    DIMS,
    WIDTHS,
    BLOCK: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
):
    """The totals of a row of counts, or a block of tokens of one batch row and head from every source."""
    program = tl.program_id(0)
    if program < TOTALS:
        counts_row = _open_counts(counts_ptr, counts_strides, program // G, program % G)
        _sum_up(counts_row, multiplicity, program, N, COUNT_BLOCK // 4)
    else:
        program -= TOTALS
        blocks = tl.cdiv(N, BLOCK)
        row, first = program // blocks, program % blocks * BLOCK
        batch, head = (row // H).to(tl.int64), (row % H).to(tl.int64)
        row = row.to(tl.int64)
        counts_row = _open_counts(counts_ptr, counts_strides, batch, head % G)
        weights_row = (batch * G + head) * N
        source_row = batch
        if rows_ptr is not None:
            source_row = read_row(rows_ptr, rows_stride, rows_number, batch)
        tokens = first + tl.arange(0, BLOCK)
        counts = _load_counts(counts_row, tokens, N)
        chosen = (counts > 0).to(tl.int32)
        before = _count_chosen(counts_row, first, COUNT_BLOCK)
        tiles = tl.tuple(())  # all loads start before the first store
        for s in tl.static_range(SOURCES):
            rows = rows_of(sources[s], source_row, head)
            tiles += (load_rows(rows, tokens.to(tl.int64), chosen != 0, DIMS[s], 0, WIDTHS[s], True),)
        slots = _slots(tokens, chosen, before + tl.cumsum(chosen, 0) - chosen, N).to(tl.int64)
        if head < G:  # the first head of each map
            _store_weights(multiplicity, weights_row + slots, counts, tokens < N)
        for s in tl.static_range(SOURCES):
            pointers = taken_ptrs[s] + (row * N + slots) * DIMS[s]
            store_channels(pointers, tiles[s], chosen != 0, DIMS[s], 0, WIDTHS[s])
        if first + BLOCK >= N:  # the last block has counted all tokens
            number = before + tl.sum(chosen, 0)
            end = tl.minimum(tl.cdiv(number, CLEARED) * CLEARED, N)
            for start in range(number, end, BLOCK):
                slots = (start + tl.arange(0, BLOCK)).to(tl.int64)
                for s in tl.static_range(SOURCES):
                    pointers = taken_ptrs[s] + (row * N + slots) * DIMS[s]
                    nothing = tl.zeros((BLOCK, WIDTHS[s]), tl.float32)
                    store_channels(pointers, nothing, slots < end, DIMS[s], 0, WIDTHS[s])


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
    """Copy a tile of rows of one batch row and head."""
    row, batch, head, tokens, inside = open_tile(N_Q, H, BLOCK_M)
    index_ptr += batch * index_strides[0] + head * index_strides[1]
    taken = tl.load(index_ptr + tokens * index_strides[2], mask=inside, other=-1).to(tl.int64)
    present = (taken >= 0) & (taken < N_K)
    tile = load_rows(rows_of(source, batch, head), taken, present, D, 0, WIDTH, True)
    store_channels(output_ptr + (row * N_Q + tokens) * D, tile, inside, D, 0, WIDTH)
