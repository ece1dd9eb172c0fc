"""Queries and segments of keys as kernels read them, and the scores of one tile of both.

N_K keys of a segment, D and D_V channels.

1. The host makes `SegmentArguments` of each segment: keys with counts are gathered, keys with labels sorted.
2. A kernel opens one batch row and head of it: `SegmentRow`.
3. It takes BLOCK_N of its keys at a time, `KeyTile`, and computes their scores, `ScoreTile`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._labels import CLASSES, Labels, label_arguments, sort_tokens
from ._tile import Features, Parts, Rows, features, load, read_row, rows_of, skip, split_scores
from .rearrange import compact, take_chosen

LOG2_E = tl.constexpr(1.4426950408889634)
TINY = 1e-37  # replaces a scale of 0


class SegmentArguments(NamedTuple):
    """One segment as a kernel reads it. A field is None if the segment has no such tensor.

    With counts, a kernel reads only the `unique` keys whose count is above zero. They were gathered before,
    or are read through `order`. Their weights are the counts, and `log_weights` the log2 of these. Keys that
    are sorted by label are read through `order` as well; their classes begin at `starts`.
    """

    key: Features
    value: Features | None
    guide: Features | None
    N_K: int
    scale: float
    shift: float
    rows_ptr: Tensor | None
    rows_stride: int
    rows_number: int | None
    labels: Labels | None
    order_ptr: Tensor | None
    weights_ptr: Tensor | None
    log_weights_ptr: Tensor | None
    unique_ptr: Tensor | None
    headroom_ptr: Tensor | None
    total_ptr: Tensor | None
    starts_ptr: Tensor | None
    maps: int
    order_stride_b: int
    NEGATIVE: Any = tl.constexpr(False)  # whether queries are negated, because `scale` is always above 0
    RAGGED: Any = tl.constexpr(True)  # whether its last tile of keys may be incomplete


class QueryTile(NamedTuple):
    """Queries: their channels, those of the guide, their label sets, and the range of their classes."""

    channels: Parts
    guide: Parts
    guide_strength: Any
    labels: Any
    lowest_class: Any
    highest_class: Any


class SegmentRow(NamedTuple):
    """One batch row and head of a segment. A pointer is arbitrary if the segment has no such tensor."""

    key: Rows
    value: Rows
    guide: Rows
    labels_ptr: Any
    order_ptr: Any
    weights_ptr: Any
    log_weights_ptr: Any
    starts_ptr: Any
    limit: Any  # how many keys there are
    headroom: Any  # log2 of what the largest count exceeds 2^15 by, for fp16


class KeyTile(NamedTuple):
    """BLOCK_N keys: `columns` of the order if the segment has one, else the keys from `start` on."""

    start: Any
    columns: Any
    present: Any


class ScoreTile(NamedTuple):
    """Scores [BLOCK_M, BLOCK_N] of the keys at `tokens`, -inf if unseen. Times `factor` they are logits."""

    scores: Any
    factor: Any
    seen: Any
    tokens: Any
    key: Rows
    value: Rows


def segment_arguments(
    key: Tensor,
    value: Tensor | None,
    scale: float,
    shift: float = 0.0,
    counts: Tensor | None = None,
    labels: Tensor | None = None,
    batch_index: Tensor | None = None,
    guide_key: Tensor | None = None,
    by_label: bool = False,
) -> SegmentArguments:
    """One segment as a kernel reads it.

    Counts cost one more launch: the counted keys are gathered, or with labels listed in an order. Sorting
    keys with labels, `by_label`, costs one more launch, too.
    """
    rows, maps = (0, 0) if counts is None else counts.shape[:2]
    multiplicity, starts = None, None
    if counts is not None and labels is None:
        sources = [x for x in (key, value, guide_key) if x is not None]
        gathered, multiplicity = take_chosen(sources, counts, batch_index)
        taken = iter(gathered)
        key = next(taken)
        value, guide_key = (None if x is None else next(taken) for x in (value, guide_key))
        batch_index = None
    elif counts is not None:
        multiplicity = compact(counts)
    order, weights, log_weights, unique, headroom, total = multiplicity or (None,) * 6
    if by_label and labels is not None:
        order, weights, log_weights, starts = sort_tokens(labels, multiplicity)
        rows, maps = order.shape[:2]
    return SegmentArguments(
        key=features(key),
        value=None if value is None else features(value),
        guide=None if guide_key is None else features(guide_key),
        N_K=key.shape[2],
        scale=scale * LOG2_E.value,
        shift=shift * LOG2_E.value,
        rows_ptr=batch_index,
        rows_stride=0 if batch_index is None else batch_index.stride(0),
        rows_number=None if batch_index is None else key.shape[0],
        labels=label_arguments(labels),
        order_ptr=order,
        weights_ptr=weights,
        log_weights_ptr=log_weights,
        unique_ptr=unique,
        headroom_ptr=headroom,
        total_ptr=total,
        starts_ptr=starts,
        maps=maps,
        order_stride_b=maps if rows > 1 else 0,
    )


def unsigned(segment: SegmentArguments) -> SegmentArguments:
    """The segment with a positive scale; NEGATIVE says that the queries carry its sign.

    A scale of 0 becomes tiny, so that -inf times the scale stays -inf.
    """
    return segment._replace(scale=max(abs(segment.scale), TINY), NEGATIVE=tl.constexpr(segment.scale < 0))


def walked(segments: Sequence[SegmentArguments], block_n: int) -> tuple[SegmentArguments, ...]:
    """The segments for a kernel that walks over all of their keys, `block_n` at a time."""
    return tuple(_walked(s if s.guide is not None else unsigned(s), block_n) for s in segments)


def _walked(segment: SegmentArguments, block_n: int) -> SegmentArguments:
    if segment.order_ptr is None:
        whole = segment.unique_ptr is None and segment.N_K % block_n == 0
        return segment._replace(RAGGED=tl.constexpr(not whole))
    # if the compiler knows the pitch, the address of a gathered key is one multiply-add
    known = {
        name: tensor._replace(pitch_n=tl.constexpr(tensor.pitch_n))
        for name in ("key", "value", "guide")
        if (tensor := getattr(segment, name)) is not None
    }
    return segment._replace(RAGGED=tl.constexpr(True), **known)


def query_arguments(query: Tensor, labels: Tensor | None) -> dict[str, Any]:
    """The queries and their labels, by the names of the kernels' arguments."""
    return {
        "query": features(query),
        "query_labels": label_arguments(labels),
        "H": query.shape[1],
        "N_Q": query.shape[2],
    }


@triton.jit
def load_query_labels(query_labels, batch, queries, inside):
    """The label sets of a tile of queries. Without labels the result is arbitrary, and no kernel reads it."""
    labels = queries
    if query_labels is not None:
        pointers = query_labels.pointer + batch * query_labels.stride_b + queries * query_labels.stride_n
        labels = tl.load(pointers, mask=inside, other=-1)
    return labels


@triton.jit
def opposite(query):
    """The query tile with the opposite sign; the guide keeps its sign."""
    channels = Parts(-query.channels.main, -query.channels.tail)
    return QueryTile(
        channels, query.guide, query.guide_strength, query.labels, query.lowest_class, query.highest_class
    )


@triton.jit
def open_segment(segment, batch, head):
    """Where the keys of one batch row and head are, and how many there are."""
    key_row = batch
    if segment.rows_ptr is not None:
        key_row = read_row(segment.rows_ptr, segment.rows_stride, segment.rows_number, batch)
    key = rows_of(segment.key, key_row, head)
    value, guide = key, key
    labels_ptr, order_ptr, weights_ptr = key.pointer, key.pointer, key.pointer
    log_weights_ptr, starts_ptr = key.pointer, key.pointer
    limit, headroom = segment.N_K, 0.0
    if segment.value is not None:
        value = rows_of(segment.value, key_row, head)
    if segment.guide is not None:
        guide = rows_of(segment.guide, key_row, head)
    if segment.labels is not None:
        labels_ptr = segment.labels.pointer + batch * segment.labels.stride_b
    order_row = batch * segment.order_stride_b + head % tl.maximum(segment.maps, 1)
    if segment.order_ptr is not None:
        order_ptr = segment.order_ptr + order_row * segment.N_K
    if segment.weights_ptr is not None:
        weights_ptr = segment.weights_ptr + order_row * segment.N_K
        log_weights_ptr = segment.log_weights_ptr + order_row * segment.N_K
        headroom = tl.load(segment.headroom_ptr + order_row)
        limit = tl.load(segment.unique_ptr + order_row)
    if segment.starts_ptr is not None:
        starts_ptr = segment.starts_ptr + order_row * (CLASSES + 1)
    return SegmentRow(
        key, value, guide, labels_ptr, order_ptr, weights_ptr, log_weights_ptr, starts_ptr, limit, headroom
    )


@triton.jit
def score_tile(
    query, segment, row, keys, width, MASKED: tl.constexpr, COMPARED: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Scores of a tile of queries against a tile of keys.

    MASKED where some keys may not be present, COMPARED where labels may differ.
    """
    key, value, guide, labels_ptr = row.key, row.value, row.guide, row.labels_ptr
    if segment.order_ptr is None:
        # offsets inside a tile are the same for all tiles: only the base moves
        tokens = tl.arange(0, BLOCK_N).to(tl.int64)
        first = tl.cast(keys.start, tl.int64)
        key = skip(key, first)
        value = skip(value, first)
        guide = skip(guide, first)
        if segment.labels is not None:
            labels_ptr += first * segment.labels.stride_n
    else:
        tokens = load(row.order_ptr + keys.columns, keys.present, MASKED).to(tl.int64)

    scores = split_scores(query.channels, key, tokens, keys.present, width, MASKED)
    factor = segment.scale
    if segment.guide is not None:
        guided = split_scores(query.guide, guide, tokens, keys.present, width, MASKED)
        scores = tl.fma(scores, segment.scale, guided * query.guide_strength)
        factor = 1.0
    seen = keys.present[None, :]
    if COMPARED:
        key_labels = load(labels_ptr + tokens * segment.labels.stride_n, keys.present, MASKED)
        seen = (query.labels[:, None] & key_labels[None, :]) != 0  # 0 where not present
        scores = tl.where(seen, scores, float("-inf"))
    elif MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    return ScoreTile(scores, factor, seen, tokens, key, value)
