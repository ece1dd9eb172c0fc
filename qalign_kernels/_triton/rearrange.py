"""match_counts, compact and take_rows on Triton. B batch rows, G maps (1 or H), H heads, N tokens, D channels."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._tile import advance, load_rows

COUNT_BLOCK = 1024
COMPACT_BLOCKS = (1024, 4096)  # the least and the most tokens at a time, up to 16 a thread: 16 warps spill under Triton 3.6
GATHER_BLOCK_M = 64
GATHER_WIDTH = 128


def match_counts(index: Tensor, num_tokens: int) -> Tensor:
    batch, maps, tokens = index.shape
    counts = torch.zeros((batch, maps, num_tokens), device=index.device, dtype=torch.int32)
    grid = (batch * maps * triton.cdiv(tokens, COUNT_BLOCK),)
    launch(
        _match_counts_kernel, grid, num_warps=4, num_stages=1, index_ptr=index, counts_ptr=counts, index_stride_b=index.stride(0),
        index_stride_g=index.stride(1), index_stride_n=index.stride(2), G=maps, N_Q=tokens, N_K=num_tokens, BLOCK=COUNT_BLOCK,
    )  # fmt: skip
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
    multiplicity = Multiplicity(*(torch.empty(shape, device=counts.device, dtype=dtype) for shape, dtype in zip(shapes, dtypes)))
    launch(
        _compact_kernel, (batch * maps,), num_warps=max(4, block // 512), num_stages=1, counts_ptr=counts,
        **{f"{name}_ptr": x for name, x in multiplicity._asdict().items()}, counts_stride_b=counts.stride(0), counts_stride_g=counts.stride(1),
        counts_stride_n=counts.stride(2), G=maps, N_K=tokens, BLOCK=block,
    )  # fmt: skip
    return multiplicity


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    (batch, heads, tokens, dim), rows = x.shape, index.shape[2]
    output = torch.empty((batch, heads, rows, dim), device=x.device, dtype=x.dtype)
    pitch_b, pitch_h, pitch_n = (stride * x.element_size() for stride in x.stride()[:3])
    launch(
        _take_rows_kernel, (batch * heads * triton.cdiv(rows, GATHER_BLOCK_M),), num_warps=4, num_stages=1, x_ptr=x, index_ptr=index,
        output_ptr=output, pitch_b=pitch_b, pitch_h=pitch_h, pitch_n=pitch_n, stride_d=x.stride(3), index_stride_b=index.stride(0),
        index_stride_g=index.stride(1) if index.shape[1] > 1 else 0, index_stride_n=index.stride(2), H=heads, N_Q=rows, N_K=tokens, D=dim,
        BLOCK_M=GATHER_BLOCK_M, WIDTH=triton.next_power_of_2(dim),
    )  # fmt: skip
    return output


@triton.jit
def _match_counts_kernel(
    index_ptr, counts_ptr, index_stride_b, index_stride_g, index_stride_n, G, N_Q, N_K, BLOCK: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(N_Q, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    tokens = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    index_ptr += (row // G) * index_stride_b + (row % G) * index_stride_g
    index = tl.load(index_ptr + tokens.to(tl.int64) * index_stride_n, mask=tokens < N_Q, other=-1)
    tl.atomic_add(counts_ptr + row * N_K + index, 1, mask=(index >= 0) & (index < N_K), sem="relaxed")


@triton.jit
def _compact_kernel(
    counts_ptr, order_ptr, weights_ptr, log_weights_ptr, unique_ptr, headroom_ptr, total_ptr, counts_stride_b, counts_stride_g, counts_stride_n, G,
    N_K, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    counts_ptr += (row // G) * counts_stride_b + (row % G) * counts_stride_g
    order_ptr += row * N_K
    weights_ptr += row * N_K
    log_weights_ptr += row * N_K
    unique = 0
    largest = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N_K, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        pointers = counts_ptr + tokens.to(tl.int64) * counts_stride_n
        counts = tl.maximum(tl.load(pointers, mask=tokens < N_K, other=0), 0)
        chosen = (counts > 0).to(tl.int32)
        chosen_before = unique + tl.cumsum(chosen, 0) - chosen
        # chosen tokens fill the row from the front, the zeros of the others from the back
        slot = tl.where(chosen != 0, chosen_before, N_K - 1 - (tokens - chosen_before))
        tl.store(order_ptr + slot, tl.where(chosen != 0, tokens, 0), mask=tokens < N_K)
        tl.store(weights_ptr + slot, counts.to(tl.float32), mask=tokens < N_K)
        tl.store(log_weights_ptr + slot, tl.math.log2(tl.maximum(counts, 1).to(tl.float32)), mask=tokens < N_K)
        unique += tl.sum(chosen, 0)
        largest = tl.maximum(largest, counts)
        total += counts.to(tl.float32)
    tl.store(unique_ptr + row, unique)
    tl.store(headroom_ptr + row, tl.math.log2(tl.maximum(tl.max(largest, 0).to(tl.float32) / 32768.0, 1.0)))
    tl.store(total_ptr + row, tl.sum(total, 0))


@triton.jit
def _take_rows_kernel(
    x_ptr, index_ptr, output_ptr, pitch_b, pitch_h, pitch_n, stride_d, index_stride_b, index_stride_g, index_stride_n, H, N_Q, N_K,
    D: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N_Q, BLOCK_M)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = row // H, row % H
    tokens = ((tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = tokens < N_Q
    index_ptr += batch * index_stride_b + head * index_stride_g
    source = tl.load(index_ptr + tokens * index_stride_n, mask=inside, other=-1).to(tl.int64)
    present = (source >= 0) & (source < N_K)
    tile = load_rows(advance(x_ptr, batch * pitch_b + head * pitch_h), source, present, pitch_n, stride_d, D, 0, WIDTH, True)
    channels = tl.arange(0, WIDTH)
    tl.store(output_ptr + (row * N_Q + tokens)[:, None] * D + channels[None, :], tile, mask=inside[:, None] & (channels < D)[None, :])
