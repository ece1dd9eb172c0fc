"""attention on Triton. B batch rows, H heads, N_Q queries, N_K keys of a segment, D and D_V channels."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import choose_tile
from ._labels import compared_slots, free_slot, label_class, sort_queries, visible_spans
from ._launch import launch, target_of
from ._segments import (
    LOG2_E,
    SegmentArguments,
    load_query_labels,
    open_segment,
    pitch_arguments,
    query_arguments,
    score_tile,
    segment_arguments,
    walk_arguments,
    width_arguments,
)
from ._tile import advance, load, load_parts, load_rows, open_tile, store_channels, unpack_match
from .attention_backward import attention_backward as attention_backward
from .rearrange import compact

LN_2 = 0.6931471805599453
FIXED_TARGETS = ("sm_90", "interpreter")
FIXED_WIDTHS = {"plain": 128, "counts": 128, "distance": 64}  # head dims up to which the kernel with both loops is known not to spill there
PARTS = tl.constexpr(8)  # of a row sum, which lanes have apart: they meet after the last tile
FIXED_LIMIT = tl.constexpr(2.0**64)  # of a row sum, and of its inverse, whose weights the first tile alone stabilised: beyond it, they may overflow


def attention(query, segments, *, scale, contrast, query_labels, guide, need_lse) -> tuple[Tensor, Tensor | None]:
    query_order = sort_queries(query_labels, [s.labels for s in segments])
    arguments = [
        segment_arguments(
            s.key, s.value, s.logit_scale * scale, s.logit_shift, None if s.counts is None else compact(s.counts), s.labels, s.batch_index,
            None if guide is None else guide.key, query_order is not None,
        )
        for s in segments
    ]  # fmt: skip
    output = torch.empty((*query.shape[:3], segments[0].value.shape[3]), device=query.device, dtype=query.dtype)
    lse = torch.empty(query.shape[:3], device=query.device, dtype=torch.float32) if need_lse else None
    asked: dict[str, Any] = {"query_labels": query_labels, "query_order": query_order, "guide": guide}
    known = None if contrast == 1.0 else log2_sum_exp(query, arguments, **asked)
    launch_attention(query, arguments, output=output, lse=lse, contrast=contrast, known=known, **asked)
    return output, lse


def log2_sum_exp(query: Tensor, segments: Sequence[SegmentArguments], **asked: Any) -> Tensor:
    """log2 of the sum of the exponentials of the logits, fp32 [B, H, N_Q]; no values are read. `asked` as `launch_attention` takes it."""
    lse = torch.empty(query.shape[:3], device=query.device, dtype=torch.float32)
    launch_attention(query, segments, output=None, lse=lse, lse_unit=1.0, **asked)
    return lse


def launch_attention(
    query: Tensor,
    segments: Sequence[SegmentArguments],
    *,
    output: Tensor | None,
    lse: Tensor | None,
    lse_unit: float = LN_2,
    query_labels: Tensor | None = None,
    query_order: Tensor | None = None,
    guide: Any = None,
    contrast: float = 1.0,
    known: Tensor | None = None,
    exact_weights: bool = False,
    match: Tensor | None = None,
    distance: Tensor | None = None,
    signs: Tensor | None = None,
) -> None:
    """One launch: softmax attention, or contrasted where the log2-sum-exp is `known`, or without `output` the log-sum-exp only.

    With a `distance`, float32 [B, H, N_Q], `output` is not written but compared, any strides: the mean of |output - attention| over the
    channels of each query goes there, and where asked for the signs, int8 [B, H, N_Q, D_V], contiguous. `lse` is written in `lse_unit`: ln 2
    for natural logarithms, 1 for base 2. Queries whose `match`, int64 [B, G, N_Q] as `_tile.pack_match` has it and of the maps of the first
    segment's counts, has score NaN give NaN. Tiles take queries by `query_order`, int32 [B or 1, 1, N_Q], where segments are sorted by label.
    """
    (batch, heads, tokens, dim), value_dim = query.shape, 16 if output is None else output.shape[3]
    mode = _tile_mode(segments, output, guide, known, exact_weights, distance)
    tile = choose_tile("attention", mode, target_of(query.device), max(dim, value_dim), query.dtype, tokens)
    launch(
        attention_kernel, (triton.cdiv(tokens, tile.block_m) * batch * heads,), num_warps=tile.num_warps, num_stages=tile.num_stages,
        guide_query_ptr=None if guide is None else guide.query, query_order_ptr=query_order,
        query_order_stride_b=0 if query_order is None or query_order.shape[0] == 1 else tokens, output_ptr=output, lse_ptr=lse, known_ptr=known,
        match_ptr=match, distance_ptr=distance, signs_ptr=signs, lse_unit=lse_unit, contrast=contrast,
        strength=0.0 if guide is None else guide.strength * LOG2_E,
        **query_arguments(query, query_labels), **pitch_arguments("guide_query", None if guide is None else guide.query),
        **pitch_arguments("output", None if distance is None else output), **walk_arguments(segments, tile.block_n, guided=guide is not None),
        FIXED=_fixed(query, segments, output, known, exact_weights, distance), HAS_VALUES=output is not None, KNOWN_LSE=known is not None,
        EXACT_WEIGHTS=exact_weights, **width_arguments(dim, value_dim), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
    )  # fmt: skip


def _tile_mode(
    segments: Sequence[SegmentArguments], output: Tensor | None, guide: Any, known: Tensor | None, exact_weights: bool, distance: Tensor | None
) -> str:
    if guide is not None or exact_weights:
        return "guided" if guide is not None else "exact"
    if output is None:
        return "lse"
    counted = any(s.weights_ptr is not None for s in segments)
    busy = any(s.labels_ptr is not None for s in segments) or (counted and len(segments) > 1) or distance is not None
    if known is not None:
        return "busy contrast" if busy else "contrast"
    return "busy softmax" if busy else "counted softmax" if counted else "softmax"


def _fixed(
    query: Tensor, segments: Sequence[SegmentArguments], output: Tensor | None, known: Tensor | None, exact_weights: bool, distance: Tensor | None
) -> bool:
    """Whether the maximum of the first tile may stabilise all of them: where weights have float32's range, and queries see a key there."""
    if known is not None or exact_weights or query.dtype == torch.float16 or any(s.labels_ptr is not None and s.starts_ptr is None for s in segments):
        return False
    width = FIXED_WIDTHS["distance" if distance is not None else "plain" if segments[0].weights_ptr is None else "counts"]
    fits = output is None or (len(segments) == 1 and max(query.shape[3], output.shape[3]) <= width)
    return fits and target_of(query.device) in FIXED_TARGETS


@triton.jit
def _attend_tile(
    state, start, columns, present, query, segment, pointers, headroom, common_max, known, floor, contrast, strength, KEY_PITCH: tl.constexpr,
    VALUE_PITCH: tl.constexpr, GUIDE_PITCH: tl.constexpr, MASKED: tl.constexpr, COMPARED: tl.constexpr, FIXED: tl.constexpr, HAS_VALUES: tl.constexpr,
    KNOWN_LSE: tl.constexpr, EXACT_WEIGHTS: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, D_V: tl.constexpr,
    V_MAIN: tl.constexpr, V_TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query tile meets the keys of a segment in `columns`; MASKED where some are not `present`, COMPARED where labels may differ, FIXED where the
    maximum stays, which is the same one, `common_max`, for all queries where there are counts: both then cost an addition for a key, not one for a
    score.
    """
    running_max, row_sum, acc_main, acc_tail = state
    scores, factor, seen, rows, present, key_ptr, key_pitch_n, value_ptr, value_pitch_n = score_tile(
        start, columns, present, query, segment, pointers, strength, KEY_PITCH, VALUE_PITCH, GUIDE_PITCH, MASKED, COMPARED, D, D_MAIN, D_TAIL, BLOCK_N
    )
    if KNOWN_LSE:
        weights = tl.math.exp2(tl.fma(scores, factor, (segment.shift - known)[:, None]))
        weights = tl.clamp(tl.fma(weights, contrast, floor), 0.0, 1.0)
        if MASKED or COMPARED:
            weights = tl.where(seen, weights, 0.0)
    elif FIXED:
        if segment.weights_ptr is None:
            shift = (segment.shift - running_max)[:, None]
        else:
            log_weights = load(pointers[6] + columns, present, MASKED)
            shift = (log_weights + (segment.shift - common_max))[None, :]
        weights = tl.math.exp2(tl.fma(scores, factor, shift))
    else:
        new_max = tl.maximum(running_max, tl.max(scores, 1) * factor + (segment.shift + headroom))
        stabiliser = new_max
        if MASKED or COMPARED:
            stabiliser = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.math.exp2(tl.fma(scores, factor, (segment.shift - stabiliser)[:, None]))
        rescale = tl.math.exp2(running_max - stabiliser)
        running_max = new_max
    if segment.weights_ptr is not None and not FIXED:
        weights *= load(pointers[5] + columns, present, MASKED)[None, :]

    if FIXED:
        row_sum += tl.sum(tl.reshape(weights, (weights.shape[0], BLOCK_N // PARTS, PARTS)), 1)
    elif not KNOWN_LSE:
        row_sum = tl.fma(row_sum, rescale, tl.sum(weights, 1))
        if HAS_VALUES:
            acc_main *= rescale[:, None]
            if V_TAIL > 0:
                acc_tail *= rescale[:, None]
    if HAS_VALUES:
        value = load_rows(value_ptr, rows, present, value_pitch_n, segment.value_stride_d, D_V, 0, V_MAIN, MASKED)
        if EXACT_WEIGHTS:  # three bfloat16 parts hold the 24 bits; V_TAIL is 0
            for _ in tl.static_range(3):
                part = weights.to(value.dtype)
                acc_main = tl.dot(part, value, acc_main)
                weights -= part.to(tl.float32)
        else:
            rounded = weights.to(value.dtype)
            acc_main = tl.dot(rounded, value, acc_main, input_precision="ieee")
            if V_TAIL > 0:
                tail = load_rows(value_ptr, rows, present, value_pitch_n, segment.value_stride_d, D_V, V_MAIN, V_TAIL, MASKED)
                acc_tail = tl.dot(rounded, tail, acc_tail, input_precision="ieee")
    return running_max, row_sum, acc_main, acc_tail


@triton.jit
def _attend_segment(
    state, segment, query, classes, batch, head, common_max, known, floor, contrast, strength, RAGGED: tl.constexpr, KEY_PITCH: tl.constexpr,
    VALUE_PITCH: tl.constexpr, GUIDE_PITCH: tl.constexpr, FIXED: tl.constexpr, HAS_VALUES: tl.constexpr, KNOWN_LSE: tl.constexpr,
    EXACT_WEIGHTS: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, D_V: tl.constexpr, V_MAIN: tl.constexpr,
    V_TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query tile, of the `classes` from the first to the second, meets the keys of a segment: whole tiles of them, then the others."""
    running_max, row_sum, acc_main, acc_tail = state
    SORTED: tl.constexpr = segment.starts_ptr is not None
    COMPARED: tl.constexpr = segment.labels_ptr is not None and segment.starts_ptr is None
    pointers, limit, headroom = open_segment(segment, batch, head, HAS_VALUES)
    if SORTED:
        whole, compared, spans = visible_spans(pointers[7], classes[0], classes[1], BLOCK_N)
    else:
        whole = limit // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N):
        slot = start
        if SORTED:
            slot = free_slot(start, spans)
        columns = slot + tl.arange(0, BLOCK_N)
        running_max, row_sum, acc_main, acc_tail = _attend_tile(
            (running_max, row_sum, acc_main, acc_tail), start, columns, columns < limit, query, segment, pointers, headroom, common_max, known, floor,
            contrast, strength, KEY_PITCH, VALUE_PITCH, GUIDE_PITCH, False, COMPARED, FIXED, HAS_VALUES, KNOWN_LSE, EXACT_WEIGHTS, D, D_MAIN, D_TAIL,
            D_V, V_MAIN, V_TAIL, BLOCK_N,
        )  # fmt: skip
    if SORTED:
        for start in tl.range(0, compared, BLOCK_N):
            positions = start + tl.arange(0, BLOCK_N)
            running_max, row_sum, acc_main, acc_tail = _attend_tile(
                (running_max, row_sum, acc_main, acc_tail), start, compared_slots(positions, spans), positions < compared, query, segment, pointers,
                headroom, common_max, known, floor, contrast, strength, KEY_PITCH, VALUE_PITCH, GUIDE_PITCH, True, True, FIXED, HAS_VALUES, KNOWN_LSE,
                EXACT_WEIGHTS, D, D_MAIN, D_TAIL, D_V, V_MAIN, V_TAIL, BLOCK_N,
            )  # fmt: skip
    elif RAGGED:
        if whole < limit:
            columns = whole + tl.arange(0, BLOCK_N)
            running_max, row_sum, acc_main, acc_tail = _attend_tile(
                (running_max, row_sum, acc_main, acc_tail), whole, columns, columns < limit, query, segment, pointers, headroom, common_max, known,
                floor, contrast, strength, KEY_PITCH, VALUE_PITCH, GUIDE_PITCH, True, COMPARED, FIXED, HAS_VALUES, KNOWN_LSE, EXACT_WEIGHTS, D,
                D_MAIN, D_TAIL, D_V, V_MAIN, V_TAIL, BLOCK_N,
            )  # fmt: skip
    return running_max, row_sum, acc_main, acc_tail


@triton.jit
def _attend(
    state, segments, query, opposite, classes, batch, head, known, floor, contrast, strength, SEGMENTS: tl.constexpr, NEGATIVE: tl.constexpr,
    RAGGED: tl.constexpr, PITCHES: tl.constexpr, FIXED: tl.constexpr, HAS_VALUES: tl.constexpr, KNOWN_LSE: tl.constexpr,
    EXACT_WEIGHTS: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, D_V: tl.constexpr, V_MAIN: tl.constexpr,
    V_TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query tile meets every key of every segment. Where FIXED, the row sum comes and goes in PARTS."""
    running_max, row_sum, acc_main, acc_tail = state
    common_max = tl.max(running_max, 0)
    for s in tl.static_range(SEGMENTS):
        running_max, row_sum, acc_main, acc_tail = _attend_segment(
            (running_max, row_sum, acc_main, acc_tail), segments[s], opposite if NEGATIVE[s] else query, classes, batch, head, common_max, known,
            floor, contrast, strength, RAGGED[s], PITCHES[3 * s], PITCHES[3 * s + 1], PITCHES[3 * s + 2], FIXED, HAS_VALUES, KNOWN_LSE, EXACT_WEIGHTS,
            D, D_MAIN, D_TAIL, D_V, V_MAIN, V_TAIL, BLOCK_N,
        )  # fmt: skip
    return running_max, row_sum, acc_main, acc_tail


@triton.jit
def _has_first_tile(segment, classes, batch, head, BLOCK_N: tl.constexpr):
    """Whether every query of a tile sees a whole tile of keys, which then comes first. Without labels it does, or sees all keys there are."""
    if segment.starts_ptr is None:
        return True
    else:
        pointers, limit, headroom = open_segment(segment, batch, head, False)
        whole, compared, spans = visible_spans(pointers[7], classes[0], classes[1], BLOCK_N)
        return whole > 0


@triton.jit
def _first_max(
    segment, query, classes, batch, head, strength, RAGGED: tl.constexpr, KEY_PITCH: tl.constexpr, GUIDE_PITCH: tl.constexpr, D: tl.constexpr,
    D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The largest logit of each query among the first tile of keys: [BLOCK_M]."""
    pointers, limit, headroom = open_segment(segment, batch, head, False)
    columns = tl.arange(0, BLOCK_N)
    present = columns < limit
    if segment.starts_ptr is not None:
        whole, compared, spans = visible_spans(pointers[7], classes[0], classes[1], BLOCK_N)
        columns += free_slot(0, spans)
    scores, factor, seen, rows, present, key_ptr, key_pitch_n, value_ptr, value_pitch_n = score_tile(
        0, columns, present, query, segment, pointers, strength, KEY_PITCH, 0, GUIDE_PITCH, RAGGED, False, D, D_MAIN, D_TAIL, BLOCK_N
    )
    return tl.max(scores, 1) * factor + segment.shift


@triton.jit
def _compare_channels(output_ptr, signs_ptrs, ideal, queries, inside, pitch_n, stride_d, D_V: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Sum of |output - ideal| over some channels of each query, the ideal rounded as the output is; the signs are stored where asked for."""
    output = load_rows(output_ptr, queries, inside, pitch_n, stride_d, D_V, FIRST, WIDTH, True)
    difference = output.to(tl.float32) - ideal.to(output.dtype).to(tl.float32)
    if signs_ptrs is not None:
        channels = FIRST + tl.arange(0, WIDTH)
        sign = (difference > 0).to(tl.int8) - (difference < 0).to(tl.int8)
        tl.store(signs_ptrs[:, None] + channels[None, :], sign, mask=inside[:, None] & (channels < D_V)[None, :])
    return tl.sum(tl.abs(difference), 1)


@triton.jit
def attention_kernel(
    query_ptr, guide_query_ptr, query_labels_ptr, query_order_ptr, output_ptr, lse_ptr, known_ptr, match_ptr, distance_ptr, signs_ptr,
    segments, query_pitch_b, query_pitch_h, query_pitch_n, query_stride_d, output_pitch_b, output_pitch_h, output_pitch_n, output_stride_d,
    guide_query_pitch_b, guide_query_pitch_h, guide_query_pitch_n, guide_query_stride_d, query_labels_stride_b, query_labels_stride_n,
    query_order_stride_b, H, N_Q, lse_unit, contrast, strength, SEGMENTS: tl.constexpr, NEGATIVE: tl.constexpr, RAGGED: tl.constexpr,
    PITCHES: tl.constexpr, FIXED: tl.constexpr, HAS_VALUES: tl.constexpr, KNOWN_LSE: tl.constexpr, EXACT_WEIGHTS: tl.constexpr, D: tl.constexpr,
    D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, D_V: tl.constexpr, V_MAIN: tl.constexpr, V_TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, batch, head, queries, inside = open_tile(N_Q, H, BLOCK_M)
    if query_order_ptr is not None:  # beyond the end the last query, for its class
        queries = tl.load(query_order_ptr + batch * query_order_stride_b + tl.minimum(queries, N_Q - 1)).to(tl.int64)
    query_main, query_tail = load_parts(
        query_ptr, batch, head, queries, inside, query_pitch_b, query_pitch_h, query_pitch_n, query_stride_d, D, D_MAIN, D_TAIL
    )  # fmt: skip
    guide_main, guide_tail = query_main, query_tail
    if guide_query_ptr is not None:
        guide_main, guide_tail = load_parts(
            guide_query_ptr, batch, head, queries, inside, guide_query_pitch_b, guide_query_pitch_h, guide_query_pitch_n, guide_query_stride_d, D,
            D_MAIN, D_TAIL,
        )  # fmt: skip
    query_labels = load_query_labels(query_labels_ptr, batch, queries, queries < N_Q, query_labels_stride_b, query_labels_stride_n)
    classes = (0, 0)
    if query_order_ptr is not None:
        of_queries = label_class(query_labels)
        classes = (tl.min(of_queries, 0), tl.max(of_queries, 0))

    running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc_main = tl.zeros((BLOCK_M, V_MAIN), tl.float32)
    acc_tail = tl.zeros((BLOCK_M, V_TAIL if V_TAIL > 0 else 1), tl.float32)
    known = row_sum
    floor = 0.0
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

    query = (query_main, query_tail, guide_main, guide_tail, query_labels)
    opposite = (-query_main, -query_tail, guide_main, guide_tail, query_labels)
    if FIXED:
        row_parts = tl.zeros((BLOCK_M, PARTS), tl.float32)
        if _has_first_tile(segments[0], classes, batch, head, BLOCK_N):
            running_max = _first_max(
                segments[0], opposite if NEGATIVE[0] else query, classes, batch, head, strength, RAGGED[0], PITCHES[0], PITCHES[2], D, D_MAIN,
                D_TAIL, BLOCK_N,
            )  # fmt: skip
            for s in tl.static_range(SEGMENTS):
                if segments[s].weights_ptr is not None:
                    running_max = tl.zeros((BLOCK_M,), tl.float32) + tl.max(running_max, 0)
            running_max, row_parts, acc_main, acc_tail = _attend(
                (running_max, row_parts, acc_main, acc_tail), segments, query, opposite, classes, batch, head, known, floor, contrast, strength,
                SEGMENTS, NEGATIVE, RAGGED, PITCHES, True, HAS_VALUES, KNOWN_LSE, EXACT_WEIGHTS, D, D_MAIN, D_TAIL, D_V, V_MAIN, V_TAIL, BLOCK_N,
            )  # fmt: skip
        else:
            row_parts = tl.full((BLOCK_M, PARTS), float("inf"), tl.float32)
        row_sum = tl.sum(row_parts, 1)
        least = tl.min(tl.where(inside, row_sum, 1.0), 0)
        if not ((tl.max(row_sum, 0) < FIXED_LIMIT) & (least > 1 / FIXED_LIMIT)):
            running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            row_sum = tl.zeros((BLOCK_M,), tl.float32)
            acc_main = tl.zeros((BLOCK_M, V_MAIN), tl.float32)
            acc_tail = tl.zeros((BLOCK_M, V_TAIL if V_TAIL > 0 else 1), tl.float32)
            running_max, row_sum, acc_main, acc_tail = _attend(
                (running_max, row_sum, acc_main, acc_tail), segments, query, opposite, classes, batch, head, known, floor, contrast, strength,
                SEGMENTS, NEGATIVE, RAGGED, PITCHES, False, HAS_VALUES, KNOWN_LSE, EXACT_WEIGHTS, D, D_MAIN, D_TAIL, D_V, V_MAIN, V_TAIL, BLOCK_N,
            )  # fmt: skip
    else:
        running_max, row_sum, acc_main, acc_tail = _attend(
            (running_max, row_sum, acc_main, acc_tail), segments, query, opposite, classes, batch, head, known, floor, contrast, strength, SEGMENTS,
            NEGATIVE, RAGGED, PITCHES, False, HAS_VALUES, KNOWN_LSE, EXACT_WEIGHTS, D, D_MAIN, D_TAIL, D_V, V_MAIN, V_TAIL, BLOCK_N,
        )  # fmt: skip

    if KNOWN_LSE:
        factor = tl.where(known == known, 1.0, float("nan"))  # the clamp made a number of NaN
    else:
        empty = row_sum == 0.0
        row_sum = tl.where(empty, 1.0, row_sum)
        factor = tl.where(empty, 0.0, 1.0 / row_sum)
        lse = tl.where(empty, float("-inf"), running_max + tl.math.log2(row_sum))
    if match_ptr is not None:
        match_row = batch * segments[0].maps + head % segments[0].maps
        match_score, match_index = unpack_match(tl.load(match_ptr + match_row * N_Q + queries, mask=inside, other=0))
        factor = tl.where(match_score == match_score, factor, float("nan"))
    if lse_ptr is not None:
        tl.store(lse_ptr + row * N_Q + queries, lse * lse_unit, mask=inside)
    if distance_ptr is not None:
        output_ptr = advance(output_ptr, batch * output_pitch_b + head * output_pitch_h)
        if signs_ptr is not None:
            signs_ptr += (row * N_Q + queries) * D_V
        total = _compare_channels(
            output_ptr, signs_ptr, acc_main * factor[:, None], queries, inside, output_pitch_n, output_stride_d, D_V, 0, V_MAIN
        )  # fmt: skip
        if V_TAIL > 0:
            total += _compare_channels(
                output_ptr, signs_ptr, acc_tail * factor[:, None], queries, inside, output_pitch_n, output_stride_d, D_V, V_MAIN, V_TAIL
            )  # fmt: skip
        tl.store(distance_ptr + row * N_Q + queries, total / D_V, mask=inside)
    elif HAS_VALUES:
        output_ptrs = output_ptr + (row * N_Q + queries) * D_V
        store_channels(output_ptrs, acc_main * factor[:, None], inside, D_V, 0, V_MAIN)
        if V_TAIL > 0:
            store_channels(output_ptrs, acc_tail * factor[:, None], inside, D_V, V_MAIN, V_TAIL)
