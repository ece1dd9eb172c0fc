"""Toy kernels for the static gate: a good one, one that spills, and one that wants too much shared memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.static.cases import Case
from qalign_kernels._triton._launch import launch


@triton.jit
def toy_row_max_kernel(
    query_ptr,
    key_ptr,
    out_ptr,
    tokens,
    stride_token,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COPIES: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, HEAD_DIM)
    query = tl.load(query_ptr + rows[:, None] * stride_token + channels[None, :])
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, tokens, BLOCK_N):
        key = tl.load(key_ptr + (start + columns)[:, None] * stride_token + channels[None, :])
        scores = tl.dot(query, tl.trans(key))
        best = tl.maximum(best, tl.max(scores, 1))
        if COPIES:
            total += scores
    if COPIES:
        best += tl.max(total, 1)
    tl.store(out_ptr + rows, best)


def _run(
    head_dim: int,
    dtype: torch.dtype,
    tokens: int,
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
    copies: bool = False,
) -> None:
    query, key = (torch.empty(tokens, head_dim, dtype=dtype, device="meta") for _ in range(2))
    out: Tensor = torch.empty(tokens, device="meta")
    launch(
        toy_row_max_kernel,
        (tokens // block_m,),
        num_warps=num_warps,
        num_stages=num_stages,
        query_ptr=query,
        key_ptr=key,
        out_ptr=out,
        tokens=tokens,
        stride_token=head_dim,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        HEAD_DIM=head_dim,
        COPIES=copies,
    )


def good(head_dim: int, dtype: torch.dtype, tokens: int) -> None:
    _run(head_dim, dtype, tokens, 64, 64, 4, 2)


def spilling(head_dim: int, dtype: torch.dtype, tokens: int) -> None:
    _run(head_dim, dtype, tokens, 256, 128, 2, 2, copies=True)


def greedy(head_dim: int, dtype: torch.dtype, tokens: int) -> None:
    _run(head_dim, dtype, tokens, 64, 256, 4, 8)


CASES = [Case("toy_good", good), Case("toy_spilling", spilling), Case("toy_greedy", greedy)]
