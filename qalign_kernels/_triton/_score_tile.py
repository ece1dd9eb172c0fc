"""One tile of queries against one tile of reference tokens: what all similarity kernels begin with.

1. `_open_tile` finds the queries of a program, their labels, and the batch row of the reference.
2. `_score_tile` multiplies them with a tile of reference tokens, divides by the norms of these, and sets
   pairs whose labels do not meet to -inf.
3. In a joint map the score is a sum over the heads, head after head: the channels of all heads are too many
   to hold.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._matches import reference_row
from ._tile import Parts, Rows, advance, load_parts, load_rows, rows_of, skip, split_scores


class Opened(NamedTuple):
    """A tile of queries and where their keys are; 0 for what is absent. A joint map holds no channels."""

    tokens: Any
    channels: Parts
    labels: Any
    query: Rows
    reference: Rows
    norm_ptr: Any
    labels_ptr: Any


class Variant(NamedTuple):
    """The constexpr settings of a kernel. SHORT if the reference has fewer than BLOCK_N tokens."""

    JOINT: Any
    SHORT: Any
    WIDTH: Any
    BLOCK_M: Any
    BLOCK_N: Any


@triton.jit
def _open_tile(pair, row, row_tile, variant):
    """The queries of a tile and their keys. Beyond the end, the last query stands again."""
    tokens = tl.minimum(row_tile * variant.BLOCK_M + tl.arange(0, variant.BLOCK_M), pair.N_Q - 1).to(tl.int64)
    maps = 1 if variant.JOINT else pair.H
    batch, head = row // maps, row % maps
    reference_batch = reference_row(pair, batch)
    query, reference = rows_of(pair.query, batch, head), rows_of(pair.reference, reference_batch, head)
    channels, labels, norm_ptr, labels_ptr = Parts(0, 0), 0, 0, 0
    if not variant.JOINT:
        channels = load_parts(query, tokens, tokens, variant.WIDTH, False)
    if pair.reference_norm_ptr is not None:
        norm_ptr = pair.reference_norm_ptr + (reference_batch * maps + head) * pair.N_K
    if pair.reference_labels is not None:
        pointers = pair.query_labels.pointer + batch * pair.query_labels.stride_b
        labels = tl.load(pointers + tokens * pair.query_labels.stride_n)
        labels_ptr = pair.reference_labels.pointer + batch * pair.reference_labels.stride_b
    return Opened(tokens, channels, labels, query, reference, norm_ptr, labels_ptr)


@triton.jit
def _score_tile(pair, opened, start, variant):
    """Scores of the keys from `start` on, -inf if unseen, without the query's norm: [BLOCK_M, BLOCK_N]."""
    columns = tl.arange(0, variant.BLOCK_N)
    if variant.SHORT:
        columns = tl.minimum(columns, pair.N_K - 1)
    keys = skip(opened.reference, start.to(tl.int64))
    tokens = columns.to(tl.int64)
    if variant.JOINT:
        scores = _sum_of_heads(pair, opened, keys, tokens, variant)
    else:
        scores = split_scores(opened.channels, keys, tokens, tokens, variant.WIDTH, False)
    if pair.reference_norm_ptr is not None:
        scores *= tl.load(opened.norm_ptr + start + columns)[None, :]
    if pair.reference_labels is not None:
        offsets = (start + columns).to(tl.int64) * pair.reference_labels.stride_n
        labels = tl.load(opened.labels_ptr + offsets)
        scores = tl.where((opened.labels[:, None] & labels[None, :]) != 0, scores, float("-inf"))
    return scores


@triton.jit
def _sum_of_heads(pair, opened, keys, tokens, variant):
    """The sum of the scores of all heads, head after head: fp32 [BLOCK_M, BLOCK_N]."""
    query_ptr, key_ptr = opened.query.pointer, keys.pointer
    scores = tl.zeros([variant.BLOCK_M, variant.BLOCK_N], tl.float32)
    for _ in range(pair.H):
        query = Rows(query_ptr, pair.query.pitch_n, pair.query.stride_d)
        key = Rows(key_ptr, pair.reference.pitch_n, pair.reference.stride_d)
        scores = _add_head(scores, query, key, opened.tokens, tokens, variant.WIDTH.D, 0, variant.WIDTH.MAIN)
        if variant.WIDTH.TAIL > 0:
            scores = _add_head(
                scores,
                query,
                key,
                opened.tokens,
                tokens,
                variant.WIDTH.D,
                variant.WIDTH.MAIN,
                variant.WIDTH.TAIL,
            )
        query_ptr = advance(query_ptr, pair.query.pitch_h)
        key_ptr = advance(key_ptr, pair.reference.pitch_h)
    return scores


@triton.jit
def _add_head(
    scores, query, key, query_tokens, key_tokens, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr
):
    """The scores plus those over some channels of one head."""
    part = load_rows(query, query_tokens, query_tokens, D, FIRST, WIDTH, False)
    keys = load_rows(key, key_tokens, key_tokens, D, FIRST, WIDTH, False)
    return tl.dot(part, keys.T, scores, input_precision="ieee")
