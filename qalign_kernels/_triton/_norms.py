"""Inverse norms, empty matches and counts of 0, which the similarity kernels need when they start.

One launch writes all of it. Its first programs have a block of queries each, the others a block of reference
tokens:

1. Sum the squares of the channels of each token, over one head or over all heads of a joint map.
2. Write 1 / max(norm, 1e-12).
3. For queries also write "no match", and the counts of 0 of a share of the reference tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._matches import Matching, Pair
from ._tile import NOTHING, Rows, advance, features, load_rows

PREPARED_ROWS = 64  # tokens times heads that are loaded at once, so that few loads wait for one another
PREPARED_HEADS = 16  # the most heads of one token among them


def per_token(x: Tensor, maps: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor with a number for each map and token of `x`: [B, G, N]."""
    return x.new_empty((x.shape[0], maps, x.shape[2]), dtype=dtype)


def with_norms(pair: Pair, matching: Matching, counted: bool = False) -> Pair:
    """The pair with room for the inverse norms of the cosine; counts need no norms of the queries."""
    if matching.similarity != "cosine":
        return pair
    query, reference, maps = matching.query, matching.reference, matching.maps
    return pair._replace(
        query_norm_ptr=None if counted else per_token(query, maps, torch.float32),
        reference_norm_ptr=per_token(reference, maps, torch.float32),
    )


def prepare(
    pair: Pair, matching: Matching, match: Tensor | None = None, counts: Tensor | None = None
) -> None:
    """Write what the other kernels begin with, in one launch or none.

    Args:
        pair: Its norm pointers say which inverse norms are written, float32 [B, G, N].
        matching: The features.
        match: int64 [B, G, N_Q], becomes "no match" everywhere.
        counts: int32 [B, G, N_K], becomes 0 everywhere.
    """
    normed = pair.reference_norm_ptr is not None
    if not normed and match is None:
        return
    query, reference, maps = matching.query, matching.reference, matching.maps
    heads, dim = query.shape[1], query.shape[3]
    heads_at_once = min(triton.next_power_of_2(heads // maps), PREPARED_HEADS)
    block = PREPARED_ROWS // heads_at_once
    query_programs, reference_programs = (
        x.shape[0] * maps * triton.cdiv(x.shape[2], block) for x in (query, reference)
    )
    channels = triton.next_power_of_2(dim)
    launch(
        _prepare_kernel,
        (query_programs + (reference_programs if normed else 0),),
        num_warps=max(4, channels // 16),
        num_stages=1,
        query=features(query),
        reference=features(reference),
        query_norm_ptr=pair.query_norm_ptr,
        reference_norm_ptr=pair.reference_norm_ptr,
        match_ptr=match,
        counts_ptr=counts,
        QUERY_PROGRAMS=query_programs,
        MAPS=maps,
        HEADS_PER_MAP=heads // maps,
        N_Q=query.shape[2],
        N_K=reference.shape[2],
        D=dim,
        WIDTH=channels,
        HEADS=heads_at_once,
        BLOCK=block,
    )


@triton.jit
def _store_inverse_norms(
    source,
    norm_ptr,
    program,
    MAPS,
    HEADS_PER_MAP,
    N,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the inverse norms of a block of tokens of one map, from HEADS of its heads at once."""
    blocks = tl.cdiv(N, BLOCK)
    row, start = (program // blocks).to(tl.int64), (program % blocks) * BLOCK
    first_head = (row // MAPS) * source.pitch_b + (row % MAPS) * HEADS_PER_MAP * source.pitch_h
    source_ptr = advance(source.pointer, first_head)
    places = tl.arange(0, BLOCK * HEADS)
    tokens, heads = start + places // HEADS, places % HEADS
    offsets = tokens.to(tl.int64) * source.pitch_n + heads.to(tl.int64) * source.pitch_h
    total = tl.zeros([BLOCK * HEADS], tl.float32)
    for head in range(0, HEADS_PER_MAP, HEADS):
        present = (tokens < N) & (heads < HEADS_PER_MAP - head)
        tile = load_rows(Rows(source_ptr, 1, source.stride_d), offsets, present, D, 0, WIDTH, True)
        total += tl.sum(tile.to(tl.float32) * tile.to(tl.float32), 1)
        source_ptr = advance(source_ptr, HEADS * tl.cast(source.pitch_h, tl.int64))
    norm = tl.sqrt_rn(tl.sum(tl.reshape(total, (BLOCK, HEADS)), 1))
    norm = tl.maximum(norm, 1e-12, propagate_nan=tl.PropagateNan.ALL)
    tokens = start + tl.arange(0, BLOCK)
    tl.store(norm_ptr + row * N + tokens, 1.0 / norm, mask=tokens < N)


@triton.jit
def _clear_matches(match_ptr, counts_ptr, program, N_Q, N_K, BLOCK: tl.constexpr):
    """Write "no match" for a block of queries, and counts of 0 for its share of the reference tokens."""
    blocks = tl.cdiv(N_Q, BLOCK)
    row, block = (program // blocks).to(tl.int64), program % blocks
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(match_ptr + row * N_Q + tokens, tl.full((BLOCK,), NOTHING, tl.int64) << 32, mask=tokens < N_Q)
    if counts_ptr is not None:
        for start in range(block * BLOCK, N_K, blocks * BLOCK):
            keys = start + tl.arange(0, BLOCK)
            tl.store(counts_ptr + row * N_K + keys, tl.zeros((BLOCK,), tl.int32), mask=keys < N_K)


@triton.jit
def _prepare_kernel(
    query,
    reference,
    query_norm_ptr,
    reference_norm_ptr,
    match_ptr,
    counts_ptr,
    QUERY_PROGRAMS,
    MAPS,
    HEADS_PER_MAP,
    N_Q,
    N_K,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of queries, or of reference tokens. The programs of the queries come first."""
    program = tl.program_id(0)
    if program < QUERY_PROGRAMS:
        if match_ptr is not None:
            _clear_matches(match_ptr, counts_ptr, program, N_Q, N_K, BLOCK)
        if query_norm_ptr is not None:
            _store_inverse_norms(
                query, query_norm_ptr, program, MAPS, HEADS_PER_MAP, N_Q, D, WIDTH, HEADS, BLOCK
            )
    elif reference_norm_ptr is not None:
        program -= QUERY_PROGRAMS
        _store_inverse_norms(
            reference, reference_norm_ptr, program, MAPS, HEADS_PER_MAP, N_K, D, WIDTH, HEADS, BLOCK
        )
