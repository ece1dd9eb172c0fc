"""match_counts, compact and rearrange_kv on Triton. B batch rows, G maps (1 or H), H heads, N tokens, D and D_v channels."""

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


def rearrange_kv(key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    (batch, heads, tokens, dim), value_dim, rows = key.shape, value.shape[3], index.shape[2]
    out_key, out_value = (torch.empty((batch, heads, rows, d), device=key.device, dtype=key.dtype) for d in (dim, value_dim))
    maps_stride = index.stride(1) if index.shape[1] > 1 else 0
    grid = (batch * heads * triton.cdiv(rows, GATHER_BLOCK_M),)
    launch(
        _rearrange_kv_kernel, grid, num_warps=4, num_stages=1, key_ptr=key, value_ptr=value, index_ptr=index, out_key_ptr=out_key,
        out_value_ptr=out_value,
        **{
            f"{name}_pitch_{axis}": x.stride(i) * x.element_size()
            for name, x in (("key", key), ("value", value))
            for i, axis in enumerate("bhn")
        },
        key_stride_d=key.stride(3), value_stride_d=value.stride(3), index_stride_b=index.stride(0), index_stride_g=maps_stride,
        index_stride_n=index.stride(2), H=heads, N_Q=rows, N_K=tokens, D=dim, KEY_WIDTH=_width(dim), D_V=value_dim,
        VALUE_WIDTH=_width(value_dim), BLOCK_M=GATHER_BLOCK_M,
    )  # fmt: skip
    return out_key, out_value


def _width(dim: int) -> int:
    return max(16, min(GATHER_WIDTH, triton.next_power_of_2(dim)))


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
def _copy_rows(source_ptr, pitch, stride_d, rows, present, out_ptr, out_rows, inside, D: tl.constexpr, WIDTH: tl.constexpr):
    """out[out_rows] = source[rows] where `present`, else zeros."""
    for first in tl.static_range(0, D, WIDTH):
        channels = first + tl.arange(0, WIDTH)
        tile = load_rows(source_ptr, rows, present, pitch, stride_d, D, first, WIDTH, True)
        tl.store(out_ptr + out_rows[:, None] * D + channels[None, :], tile, mask=inside[:, None] & (channels < D)[None, :])


@triton.jit
def _rearrange_kv_kernel(
    key_ptr, value_ptr, index_ptr, out_key_ptr, out_value_ptr, key_pitch_b, key_pitch_h, key_pitch_n, value_pitch_b, value_pitch_h,
    value_pitch_n, key_stride_d, value_stride_d, index_stride_b, index_stride_g, index_stride_n, H, N_Q, N_K, D: tl.constexpr,
    KEY_WIDTH: tl.constexpr, D_V: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N_Q, BLOCK_M)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = row // H, row % H
    tokens = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tokens < N_Q
    index_ptr += batch * index_stride_b + head * index_stride_g
    source = tl.load(index_ptr + tokens.to(tl.int64) * index_stride_n, mask=inside, other=-1).to(tl.int64)
    present = (source >= 0) & (source < N_K)
    out_rows = row * N_Q + tokens.to(tl.int64)
    key_ptr = advance(key_ptr, batch * key_pitch_b + head * key_pitch_h)
    value_ptr = advance(value_ptr, batch * value_pitch_b + head * value_pitch_h)
    _copy_rows(key_ptr, key_pitch_n, key_stride_d, source, present, out_key_ptr, out_rows, inside, D, KEY_WIDTH)
    _copy_rows(value_ptr, value_pitch_n, value_stride_d, source, present, out_value_ptr, out_rows, inside, D_V, VALUE_WIDTH)
