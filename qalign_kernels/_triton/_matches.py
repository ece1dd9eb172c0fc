"""What the kernels of similarity_argmax share.

Their inputs, the best score of a tile, and how matches are written.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._labels import Labels
from ._tile import FAR, Features, pack_match, read_row, unpack_match


class Matching(NamedTuple):
    """The features [B, H, N, D] that are matched, and the settings.

    Label sets are int32 [B or 1, N]. The batch index, int32 [B], names the row of the reference of each query
    row.
    """

    query: Tensor
    reference: Tensor
    similarity: str
    joint: bool
    query_labels: Tensor | None = None
    reference_labels: Tensor | None = None
    batch_index: Tensor | None = None

    @property
    def maps(self) -> int:
        """G, the number of maps of a batch row: one for all heads, or one for each."""
        return 1 if self.joint else self.query.shape[1]


class Pair(NamedTuple):
    """Queries and reference as kernels read them; None for a tensor that the call does not have."""

    query: Features
    reference: Features
    query_norm_ptr: Tensor | None
    reference_norm_ptr: Tensor | None
    query_labels: Labels | None
    reference_labels: Labels | None
    rows_ptr: Tensor | None
    rows_stride: int
    rows_number: int | None
    H: int
    N_Q: int
    N_K: int


class KeyRange(NamedTuple):
    """The tiles of keys from `first` to `last`, `last` excluded; none begins after `last_start`."""

    first: Any
    last: Any
    last_start: Any


class Best(NamedTuple):
    """The best score of each query and its index."""

    score: Any
    index: Any


class Outputs(NamedTuple):
    """Where matches go: to index and score, or to packed matches, which may be counted.

    None for a tensor that the call does not have.
    """

    index_ptr: Any
    score_ptr: Any
    match_ptr: Any
    counts_ptr: Any


@triton.jit
def reference_row(pair, batch):
    """The batch row of the reference that a batch row of queries is matched with."""
    if pair.rows_ptr is not None:
        return read_row(pair.rows_ptr, pair.rows_stride, pair.rows_number, batch)
    else:
        return batch


@triton.jit
def _maximum(left, right):
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def best_column(scores, columns):
    """The largest score of each row and the lowest column with it. NaN is the largest, at any column."""
    score = tl.reduce(scores, 1, _maximum)
    return Best(score, tl.min(tl.where(scores == score[:, None], columns, FAR), 1))


@triton.jit
def better(best, later):
    """The better of two matches; `later` has the later tokens. The earlier wins a tie, NaN wins always."""
    index = tl.where(later.score > best.score, later.index, best.index)
    return Best(_maximum(best.score, later.score), index)


@triton.jit
def store_best(pair, outputs, row, tokens, best):
    """Write the best matches of the tokens that exist, and apply the norms of the queries."""
    inside = tokens < pair.N_Q
    out = row * pair.N_Q + tokens
    score = best.score
    found = score != float("-inf")
    if pair.query_norm_ptr is not None:
        score *= tl.load(pair.query_norm_ptr + out, mask=inside, other=1.0)
    elif pair.reference_norm_ptr is not None:  # the cosine of an infinite query
        score = tl.where(score == float("inf"), float("nan"), score)
    score = tl.where(found, score, float("-inf"))
    index = tl.where(score != score, 0, tl.where(found, tl.minimum(best.index, pair.N_K - 1), -1))
    if outputs.match_ptr is None:
        tl.store(outputs.index_ptr + out, index, mask=inside)
        tl.store(outputs.score_ptr + out, score, mask=inside)
    else:
        match = pack_match(score, index)
        before = tl.atomic_max(outputs.match_ptr + out, match, mask=inside, sem="relaxed")
        if outputs.counts_ptr is not None:
            # the splits may come in any order: each takes the count from the match that it beats
            counts_ptr = outputs.counts_ptr + row * pair.N_K
            won = inside & (match > before)
            lost_score, lost = unpack_match(before)
            tl.atomic_add(counts_ptr + index, won.to(tl.int32), mask=won, sem="relaxed")
            tl.atomic_add(counts_ptr + lost, -won.to(tl.int32), mask=won & (lost >= 0), sem="relaxed")
