"""match_counts, compact and take_rows on Triton. B batch rows, G maps (1 or H), H heads, N tokens, D channels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._tile import advance, load_rows

COUNT_BLOCK = 1024
COMPACT_BLOCK = 2048
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


def compact(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that were chosen: order int32 [B, G, N], ascending with zeros behind, and how many they are, unique int32 [B, G].

    Deterministic, no host synchronisation.
    """
    batch, maps, tokens = counts.shape
    order = torch.empty((batch, maps, tokens), device=counts.device, dtype=torch.int32)
    unique = torch.empty((batch, maps), device=counts.device, dtype=torch.int32)
    launch(
        _compact_kernel, (batch * maps,), num_warps=8, num_stages=1, counts_ptr=counts, order_ptr=order, unique_ptr=unique,
        counts_stride_b=counts.stride(0), counts_stride_g=counts.stride(1), counts_stride_n=counts.stride(2), G=maps, N=tokens,
        BLOCK=COMPACT_BLOCK,
    )  # fmt: skip
    return order, unique


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
    counts_ptr, order_ptr, unique_ptr, counts_stride_b, counts_stride_g, counts_stride_n, G, N, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    counts_ptr += (row // G) * counts_stride_b + (row % G) * counts_stride_g
    order_ptr += row * N
    unique = 0
    for start in range(0, N, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        counts = tl.load(counts_ptr + tokens.to(tl.int64) * counts_stride_n, mask=tokens < N, other=0)
        chosen = (counts > 0).to(tl.int32)
        chosen_before = unique + tl.cumsum(chosen, 0) - chosen
        # chosen tokens fill the row from the front, the zeros of the others from the back
        slot = tl.where(chosen != 0, chosen_before, N - 1 - (tokens - chosen_before))
        tl.store(order_ptr + slot, tl.where(chosen != 0, tokens, 0), mask=tokens < N)
        unique += tl.sum(chosen, 0)
    tl.store(unique_ptr + row, unique)


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
