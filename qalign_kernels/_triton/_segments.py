"""What kernels read of queries and of segments of keys, and how a tile of queries meets them. N_K keys of a segment, D and D_V channels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._configs import split_head_dim
from ._labels import CLASSES, label_strides, sort_tokens
from ._tile import advance, load, split_scores
from .rearrange import Multiplicity

LOG2_E = 1.4426950408889634
TINY = 1e-37  # in the place of a scale of 0


class SegmentArguments(NamedTuple):
    """What the kernel reads of one segment; None where the segment has none.

    A pitch is a stride in bytes: that of a head is then a multiple of 16 also at head dim 40, and the loads stay wide.

    A segment with counts is read through `order`, its keys with a count above zero, which are `unique` many and weigh `weights`, 2^`log_weights`.
    One whose keys are sorted by their labels is read through it too; its classes begin at `starts`.
    """

    key_ptr: Tensor
    key_pitch_b: int
    key_pitch_h: int
    key_pitch_n: int
    key_stride_d: int
    value_ptr: Tensor | None
    value_pitch_b: int
    value_pitch_h: int
    value_pitch_n: int
    value_stride_d: int
    guide_ptr: Tensor | None
    guide_pitch_b: int
    guide_pitch_h: int
    guide_pitch_n: int
    guide_stride_d: int
    N_K: int
    scale: float
    shift: float
    rows_ptr: Tensor | None
    rows_stride: int
    labels_ptr: Tensor | None
    labels_stride_b: int
    labels_stride_n: int
    order_ptr: Tensor | None
    weights_ptr: Tensor | None
    log_weights_ptr: Tensor | None
    unique_ptr: Tensor | None
    headroom_ptr: Tensor | None
    total_ptr: Tensor | None
    starts_ptr: Tensor | None
    maps: int
    order_stride_b: int


def segment_arguments(
    key: Tensor,
    value: Tensor | None,
    scale: float,
    shift: float = 0.0,
    multiplicity: Multiplicity | None = None,
    labels: Tensor | None = None,
    batch_index: Tensor | None = None,
    guide_key: Tensor | None = None,
    by_label: bool = False,
) -> SegmentArguments:
    """One segment as the kernel takes it, its keys sorted `by_label` where it has labels: a launch more."""
    order, weights, log_weights, unique, headroom, total = (None,) * 6 if multiplicity is None else multiplicity
    starts = None
    if by_label and labels is not None:
        order, weights, log_weights, starts = sort_tokens(labels, multiplicity)
    rows, maps = (0, 0) if order is None else order.shape[:2]
    return SegmentArguments(
        key, *pitches(key), value, *pitches(value), guide_key, *pitches(guide_key), key.shape[2], scale * LOG2_E, shift * LOG2_E,
        batch_index, 0 if batch_index is None else batch_index.stride(0), labels, *label_strides(labels), order, weights, log_weights, unique,
        headroom, total, starts, maps, maps if rows > 1 else 0,
    )  # fmt: skip


def query_arguments(query: Tensor, labels: Tensor | None) -> dict[str, Any]:
    """The queries and their labels as every kernel names them."""
    strides = dict(zip(("query_labels_stride_b", "query_labels_stride_n"), label_strides(labels)))
    sizes = {"H": query.shape[1], "N_Q": query.shape[2]}
    return {"query_ptr": query, "query_labels_ptr": labels, **pitch_arguments("query", query), **strides, **sizes}


def walk_arguments(segments: Sequence[SegmentArguments], block_n: int, guided: bool = False) -> dict[str, Any]:
    """The segments as kernels take them that walk over all of them.

    Without a guide a negative scale moves into the query; 0 becomes tiny, because -inf times it must stay -inf.
    """
    return {
        "segments": tuple(s if guided else s._replace(scale=max(abs(s.scale), TINY)) for s in segments),
        "SEGMENTS": len(segments),
        "NEGATIVE": tuple(not guided and s.scale < 0 for s in segments),
        "RAGGED": tuple(s.order_ptr is not None or s.N_K % block_n != 0 for s in segments),
        "PITCHES": sum(((0, 0, 0) if s.order_ptr is None else (s.key_pitch_n, s.value_pitch_n, s.guide_pitch_n) for s in segments), ()),
    }


def pitches(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """Strides of batch, head and token in bytes, the stride of the channels."""
    if tensor is None:
        return 0, 0, 0, 0
    batch, head, token = (stride * tensor.element_size() for stride in tensor.stride()[:3])
    return batch, head, token, tensor.stride(3)


def pitch_arguments(name: str, tensor: Tensor | None) -> dict[str, int]:
    """The pitches of the tensor that kernels call `name`."""
    return dict(zip((f"{name}_pitch_b", f"{name}_pitch_h", f"{name}_pitch_n", f"{name}_stride_d"), pitches(tensor)))


def width_arguments(dim: int, value_dim: int) -> dict[str, int]:
    """The channels of queries and keys, and of values, whole and in their two parts."""
    names = ("D", "D_MAIN", "D_TAIL", "D_V", "V_MAIN", "V_TAIL")
    return dict(zip(names, (dim, *split_head_dim(dim), value_dim, *split_head_dim(value_dim))))


@triton.jit
def load_query_labels(query_labels_ptr, batch, queries, inside, stride_b, stride_n):
    """The bit sets of a tile of queries; the queries themselves, which nobody reads then, where there are none."""
    query_labels = queries
    if query_labels_ptr is not None:
        query_labels = tl.load(query_labels_ptr + batch * stride_b + queries * stride_n, mask=inside, other=-1)
    return query_labels


@triton.jit
def score_tile(
    start, columns, present, query, segment, pointers, strength, KEY_PITCH: tl.constexpr, VALUE_PITCH: tl.constexpr, GUIDE_PITCH: tl.constexpr,
    MASKED: tl.constexpr, COMPARED: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_M, BLOCK_N] of the keys in `columns`, which in a segment without an order begin at `start`, -inf where unseen: not `present`
    if MASKED, of other labels if COMPARED. Also what makes logits of them, and where keys and values are."""
    query_main, query_tail, guide_main, guide_tail, query_labels = query
    key_ptr, value_ptr, guide_ptr, labels_ptr, order_ptr, weights_ptr, log_weights_ptr, starts_ptr = pointers
    if segment.order_ptr is None:
        # the offsets inside a tile stay as they are from tile to tile, only the base moves
        rows = tl.arange(0, BLOCK_N).to(tl.int64)
        key_pitch_n, value_pitch_n, guide_pitch_n = segment.key_pitch_n, segment.value_pitch_n, segment.guide_pitch_n
        first = tl.cast(start, tl.int64)
        key_ptr = advance(key_ptr, first * key_pitch_n)
        value_ptr = advance(value_ptr, first * value_pitch_n)
        guide_ptr = advance(guide_ptr, first * guide_pitch_n)
        labels_ptr += first * segment.labels_stride_n
    else:
        # a pitch known to the compiler makes an address one multiply-add
        key_pitch_n, value_pitch_n, guide_pitch_n = KEY_PITCH, VALUE_PITCH, GUIDE_PITCH
        rows = load(order_ptr + columns, present, MASKED).to(tl.int64)

    scores = split_scores(query_main, query_tail, key_ptr, rows, present, key_pitch_n, segment.key_stride_d, D, D_MAIN, D_TAIL, MASKED)
    factor = segment.scale
    if segment.guide_ptr is not None:
        guided = split_scores(guide_main, guide_tail, guide_ptr, rows, present, guide_pitch_n, segment.guide_stride_d, D, D_MAIN, D_TAIL, MASKED)
        scores = tl.fma(scores, segment.scale, guided * strength)
        factor = 1.0
    seen = present[None, :]
    if COMPARED:
        key_labels = load(labels_ptr + rows * segment.labels_stride_n, present, MASKED)
        seen = (query_labels[:, None] & key_labels[None, :]) != 0  # 0 where not present
        scores = tl.where(seen, scores, float("-inf"))
    elif MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    return scores, factor, seen, rows, present, key_ptr, key_pitch_n, value_ptr, value_pitch_n


@triton.jit
def open_segment(segment, batch, head, HAS_VALUES: tl.constexpr):
    """Pointers to a segment's (keys, values, guide, labels, order, weights, log_weights, starts) for one row, how many keys there are, and the
    headroom."""
    key_row = batch
    if segment.rows_ptr is not None:
        key_row = tl.load(segment.rows_ptr + batch * segment.rows_stride).to(tl.int64)
    key_ptr = advance(segment.key_ptr, key_row * segment.key_pitch_b + head * segment.key_pitch_h)
    value_ptr, guide_ptr, labels_ptr, order_ptr = key_ptr, key_ptr, key_ptr, key_ptr
    weights_ptr, log_weights_ptr, starts_ptr = key_ptr, key_ptr, key_ptr
    limit, headroom = segment.N_K, 0.0
    if HAS_VALUES:
        value_ptr = advance(segment.value_ptr, key_row * segment.value_pitch_b + head * segment.value_pitch_h)
    if segment.guide_ptr is not None:
        guide_ptr = advance(segment.guide_ptr, key_row * segment.guide_pitch_b + head * segment.guide_pitch_h)
    if segment.labels_ptr is not None:
        labels_ptr = segment.labels_ptr + batch * segment.labels_stride_b
    if segment.order_ptr is not None:
        order_row = batch * segment.order_stride_b + head % segment.maps
        order_ptr = segment.order_ptr + order_row * segment.N_K
        if segment.weights_ptr is not None:
            weights_ptr = segment.weights_ptr + order_row * segment.N_K
            log_weights_ptr = segment.log_weights_ptr + order_row * segment.N_K
            headroom = tl.load(segment.headroom_ptr + order_row)
            limit = tl.load(segment.unique_ptr + order_row)
        if segment.starts_ptr is not None:
            starts_ptr = segment.starts_ptr + order_row * (CLASSES + 1)
    return (key_ptr, value_ptr, guide_ptr, labels_ptr, order_ptr, weights_ptr, log_weights_ptr, starts_ptr), limit, headroom
