"""attention on Triton. B batch rows, H heads, N_Q queries, N_K keys of a segment, D and D_V channels.

A program has one tile of queries. It walks over the keys of all segments, tile after tile (online softmax):

1. `attention_kernel` loads the queries, their labels and the settings of the contrast.
2. `_attend_keys` walks over all keys. If FIXED, it tries the largest logit of the first key tile as the
   maximum of all tiles, which saves the rescaling. It walks again with a running maximum where this
   overflowed.
3. `_attend` takes one segment after the other, `_attend_segment` one tile of its keys after the other, and
   `_attend_tile` (in `_attend_tile.py`) makes weights of the scores and adds the weighted values.
4. `attention_kernel` divides by the sum of the weights and writes the output and the log-sum-exp.

`_attention_choice.py` says which calls take which kernel.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attend_tile import (
    PARTS,
    Contrast,
    State,
    Variant,
    _attend_last_tile,
    _attend_tile,
    _empty_state,
    _tile_max,
)
from ._attention_choice import AttentionCall, choose, launch_hopper
from ._comparison import _compare_parts
from ._labels import compared_slots, free_slot, label_class, sort_queries, visible_spans
from ._launch import launch
from ._mend import mend_output
from ._segments import (
    LOG2_E,
    KeyTile,
    QueryTile,
    SegmentArguments,
    load_query_labels,
    open_segment,
    opposite,
    query_arguments,
    segment_arguments,
    walked,
)
from ._tile import features, load_parts, open_tile, rows_of, store_parts, unpack_match, width
from .attention_backward import attention_backward as attention_backward

ONCE_STAGES = tl.constexpr(2)  # of a loop that runs at most once: the smallest number that is pipelined
# of a row sum and of its inverse, with the maximum of the first tile: beyond it, weights may overflow
FIXED_LIMIT = tl.constexpr(2.0**64)


def attention(
    query, segments, *, scale, contrast, query_labels, guide, need_lse
) -> tuple[Tensor, Tensor | None]:
    query_order = sort_queries(query_labels, [s.labels for s in segments])
    arguments = [
        segment_arguments(
            s.key,
            s.value,
            s.logit_scale * scale,
            s.logit_shift,
            s.counts,
            s.labels,
            s.batch_index,
            None if guide is None else guide.key,
            query_order is not None,
        )
        for s in segments
    ]
    output = torch.empty(
        (*query.shape[:3], segments[0].value.shape[3]), device=query.device, dtype=query.dtype
    )
    lse = torch.empty(query.shape[:3], device=query.device, dtype=torch.float32) if need_lse else None
    shared: dict[str, Any] = {"query_labels": query_labels, "query_order": query_order, "guide": guide}
    known = None if contrast == 1.0 else log2_sum_exp(query, arguments, **shared)
    call = AttentionCall(query, arguments, output, lse, contrast=contrast, known=known, **shared)
    launch_attention(call)
    if any(s.labels is not None for s in segments):
        mend_output(call, segments, [s.logit_scale * scale for s in segments])
    return output, lse


def log2_sum_exp(query: Tensor, segments: Sequence[SegmentArguments], **settings: Any) -> Tensor:
    """log2 of the sum of the exponentials of the logits, fp32 [B, H, N_Q]; `settings` of `AttentionCall`."""
    lse = torch.empty(query.shape[:3], device=query.device, dtype=torch.float32)
    launch_attention(AttentionCall(query, segments, lse=lse, lse_unit=1.0, **settings))
    return lse


def launch_attention(call: AttentionCall) -> None:
    choice = choose(call)
    if choice.hopper:
        launch_hopper(call, choice)
        return
    (batch, heads, tokens, dim), tile, output = call.query.shape, choice.tile, call.output
    order, guide, compared = call.query_order, call.guide, call.distance is not None
    launch(
        attention_kernel,
        (triton.cdiv(tokens, tile.block_m) * batch * heads,),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **query_arguments(call.query, call.query_labels),
        query_order_ptr=order,
        query_order_stride_b=0 if order is None or order.shape[0] == 1 else tokens,
        guide_query=None if guide is None else features(guide.query),
        guide_strength=0.0 if guide is None else guide.strength * LOG2_E.value,
        segments=walked(call.segments, tile.block_n),
        output_ptr=None if compared else output,
        lse_ptr=call.lse,
        lse_unit=call.lse_unit,
        known_ptr=call.known,
        contrast=call.contrast,
        match_ptr=call.match,
        compared=features(output) if compared and output is not None else None,
        distance_ptr=call.distance,
        signs_ptr=call.signs,
        SEGMENTS=len(call.segments),
        FIXED=choice.fixed,
        HAS_VALUES=output is not None,
        KNOWN_LSE=call.known is not None,
        EXACT_WEIGHTS=call.exact_weights,
        KEY_WIDTH=width(dim),
        VALUE_WIDTH=width(call.value_dim),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        LOOP_ONCE=choice.loop_once,
    )


@triton.jit
def _attend_segment(state, query, segment, batch, head, common_max, contrast, variant, FIXED: tl.constexpr):
    """One query tile meets the keys of a segment: first whole tiles of keys, then the rest."""
    BLOCK_N: tl.constexpr = variant.BLOCK_N
    SORTED: tl.constexpr = segment.starts_ptr is not None
    COMPARED: tl.constexpr = segment.labels is not None and segment.starts_ptr is None
    row = open_segment(segment, batch, head)
    if SORTED:
        spans = visible_spans(row.starts_ptr, query.lowest_class, query.highest_class, BLOCK_N)
        whole = spans.whole
    else:
        whole = row.limit // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N):
        slot = start
        if SORTED:
            slot = free_slot(start, spans)
        columns = slot + tl.arange(0, BLOCK_N)
        keys = KeyTile(start, columns, columns < row.limit)
        state = _attend_tile(
            state, query, segment, row, keys, common_max, contrast, variant, FIXED, False, COMPARED
        )
    if SORTED:
        for start in tl.range(0, spans.compared, BLOCK_N):
            positions = start + tl.arange(0, BLOCK_N)
            keys = KeyTile(start, compared_slots(positions, spans), positions < spans.compared)
            state = _attend_tile(
                state, query, segment, row, keys, common_max, contrast, variant, FIXED, True, True
            )
    elif segment.RAGGED:
        if variant.LOOP_ONCE:
            for start in tl.range(whole, row.limit, BLOCK_N, num_stages=ONCE_STAGES):
                state = _attend_last_tile(
                    state, query, segment, row, start, common_max, contrast, variant, FIXED, COMPARED
                )
        elif whole < row.limit:
            state = _attend_last_tile(
                state, query, segment, row, whole, common_max, contrast, variant, FIXED, COMPARED
            )
    return state


@triton.jit
def _attend(state, query, segments, batch, head, contrast, variant, FIXED: tl.constexpr):
    """One query tile meets every key of every segment. If FIXED, the row sum has PARTS."""
    common_max = tl.max(state.running_max, 0)
    for s in tl.static_range(variant.SEGMENTS):
        state = _attend_segment(
            state,
            opposite(query) if segments[s].NEGATIVE else query,
            segments[s],
            batch,
            head,
            common_max,
            contrast,
            variant,
            FIXED,
        )
    return state


@triton.jit
def _has_first_tile(query, segment, batch, head, BLOCK_N: tl.constexpr):
    """Whether every query of a tile sees a whole first tile of keys. Without labels it sees all keys."""
    if segment.starts_ptr is None:
        return True
    else:
        row = open_segment(segment, batch, head)
        return visible_spans(row.starts_ptr, query.lowest_class, query.highest_class, BLOCK_N).whole > 0


@triton.jit
def _first_max(query, segment, batch, head, variant):
    """The largest logit of each query among the first tile of keys: [BLOCK_M]."""
    row = open_segment(segment, batch, head)
    if variant.LOOP_ONCE:
        first_max = tl.full((variant.BLOCK_M,), float("-inf"), tl.float32)
        for start in tl.range(0, tl.minimum(row.limit, 1), num_stages=ONCE_STAGES):
            first_max = tl.maximum(first_max, _tile_max(query, segment, row, start, variant))
        return first_max
    else:
        return _tile_max(query, segment, row, 0, variant)


@triton.jit
def _attend_fixed(query, segments, batch, head, contrast, variant):
    """One query tile meets every key, with the maximum of the first key tile, if there is one.

    Without it row sums are inf, so that the caller starts again with a running maximum.
    """
    empty = _empty_state(variant)
    if _has_first_tile(query, segments[0], batch, head, variant.BLOCK_N):
        first_query = opposite(query) if segments[0].NEGATIVE else query
        first_max = _first_max(first_query, segments[0], batch, head, variant)
        for s in tl.static_range(variant.SEGMENTS):
            if segments[s].weights_ptr is not None:
                first_max = tl.zeros((variant.BLOCK_M,), tl.float32) + tl.max(first_max, 0)
        state = State(first_max, tl.zeros((variant.BLOCK_M, PARTS), tl.float32), empty.output)
        state = _attend(state, query, segments, batch, head, contrast, variant, True)
    else:
        row_parts = tl.full((variant.BLOCK_M, PARTS), float("inf"), tl.float32)
        state = State(empty.running_max, row_parts, empty.output)
    return State(state.running_max, tl.sum(state.row_sum, 1), state.output)


@triton.jit
def _may_have_overflowed(row_sum, inside):
    """Whether, for some query, the maximum of the first tile was too far from the true one, or NaN."""
    least = tl.min(tl.where(inside, row_sum, 1.0), 0)
    return not ((tl.max(row_sum, 0) < FIXED_LIMIT) & (least > 1 / FIXED_LIMIT))


@triton.jit
def _attend_keys(query, segments, batch, head, inside, contrast, variant, FIXED: tl.constexpr):
    """One query tile meets every key: if FIXED, first with one maximum for all tiles."""
    state = _empty_state(variant)
    if FIXED:
        state = _attend_fixed(query, segments, batch, head, contrast, variant)
    if not FIXED or _may_have_overflowed(state.row_sum, inside):
        state = _attend(_empty_state(variant), query, segments, batch, head, contrast, variant, False)
    return state


@triton.jit
def attention_kernel(
    query,
    query_labels,
    query_order_ptr,
    query_order_stride_b,
    guide_query,
    guide_strength,
    segments,
    output_ptr,
    lse_ptr,
    lse_unit,
    known_ptr,
    contrast,
    match_ptr,
    compared,
    distance_ptr,
    signs_ptr,
    H,
    N_Q,
    SEGMENTS: tl.constexpr,
    FIXED: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    KNOWN_LSE: tl.constexpr,
    EXACT_WEIGHTS: tl.constexpr,
    KEY_WIDTH,
    VALUE_WIDTH,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOOP_ONCE: tl.constexpr,
):
    """One tile of queries of one batch row and head against every key of every segment.

    It is long because it holds both ends of the algorithm: all that is loaded before the walk over the keys,
    and all that is written after it.
    """
    row, batch, head, queries, inside = open_tile(N_Q, H, BLOCK_M)
    if query_order_ptr is not None:  # beyond the end comes the last query again, for its class
        order_ptr = query_order_ptr + batch * query_order_stride_b
        queries = tl.load(order_ptr + tl.minimum(queries, N_Q - 1)).to(tl.int64)
    channels = load_parts(rows_of(query, batch, head), queries, inside, KEY_WIDTH, True)
    guide = channels
    if guide_query is not None:
        guide = load_parts(rows_of(guide_query, batch, head), queries, inside, KEY_WIDTH, True)
    labels = load_query_labels(query_labels, batch, queries, queries < N_Q)
    lowest_class, highest_class = 0, 0
    if query_order_ptr is not None:
        classes = label_class(labels)
        lowest_class, highest_class = tl.min(classes, 0), tl.max(classes, 0)

    lse, known, floor = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32), 0.0
    if KNOWN_LSE:
        lse = tl.load(known_ptr + row * N_Q + queries, mask=inside, other=0.0)
        known = tl.where(lse == float("-inf"), float("inf"), lse)
        total = 0.0
        for s in tl.static_range(SEGMENTS):
            if segments[s].weights_ptr is None:
                total += segments[s].N_K
            else:
                total += tl.load(segments[s].total_ptr + batch * segments[s].maps + head % segments[s].maps)
        floor = (1.0 - contrast) / tl.maximum(total, 1.0)

    state = _attend_keys(
        QueryTile(channels, guide, guide_strength, labels, lowest_class, highest_class),
        segments,
        batch,
        head,
        inside,
        Contrast(known, contrast, floor),
        Variant(
            SEGMENTS,
            HAS_VALUES,
            KNOWN_LSE,
            EXACT_WEIGHTS,
            KEY_WIDTH,
            VALUE_WIDTH,
            BLOCK_M,
            BLOCK_N,
            LOOP_ONCE,
        ),
        FIXED,
    )

    if KNOWN_LSE:
        factor = tl.where(known == known, 1.0, float("nan"))  # the clamp made a number of NaN
    else:
        empty = state.row_sum == 0.0
        row_sum = tl.where(empty, 1.0, state.row_sum)
        factor = tl.where(empty, 0.0, 1.0 / row_sum)
        lse = tl.where(empty, float("-inf"), state.running_max + tl.math.log2(row_sum))
    if match_ptr is not None:
        match_row = batch * segments[0].maps + head % segments[0].maps
        match = tl.load(match_ptr + match_row * N_Q + queries, mask=inside, other=0)
        match_score, match_index = unpack_match(match)
        factor = tl.where(match_score == match_score, factor, float("nan"))
    if lse_ptr is not None:
        tl.store(lse_ptr + row * N_Q + queries, lse * lse_unit, mask=inside)
    if distance_ptr is not None:
        compared_rows = rows_of(compared, batch, head)
        if signs_ptr is not None:
            signs_ptr += (row * N_Q + queries) * VALUE_WIDTH.D
        total = _compare_parts(
            compared_rows, signs_ptr, state.output, factor[:, None], queries, inside, VALUE_WIDTH
        )
        tl.store(distance_ptr + row * N_Q + queries, total / VALUE_WIDTH.D, mask=inside)
    elif HAS_VALUES:
        output_ptrs = output_ptr + (row * N_Q + queries) * VALUE_WIDTH.D
        store_parts(output_ptrs, state.output, inside, VALUE_WIDTH, factor[:, None])
