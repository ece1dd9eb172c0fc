"""attention on Triton. B batch rows, H heads, N_Q queries, N_K keys of a segment, D and D_V channels."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import choose_tile
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
from ._tile import advance, load, load_parts, load_rows, open_tile, store_channels
from .attention_backward import attention_backward as attention_backward
from .rearrange import compact

LN_2 = 0.6931471805599453
FIXED_TARGETS = ("sm_90", "interpreter")
FIXED_WIDTHS = {"plain": 128, "counts": 64, "distance": 64}  # head dims up to which the kernel with both loops is known not to spill there
PARTS = tl.constexpr(8)  # of a row sum, which lanes have apart: they meet after the last tile
FIXED_LIMIT = tl.constexpr(2.0**64)  # of a row sum, and of its inverse, whose weights the first tile alone stabilised: beyond it, they may overflow


def attention(query, segments, *, scale, contrast, query_labels, guide, need_lse) -> tuple[Tensor, Tensor | None]:
    arguments = [
        segment_arguments(
            s.key, s.value, s.logit_scale * scale, s.logit_shift, None if s.counts is None else compact(s.counts), s.labels, s.batch_index,
            None if guide is None else guide.key,
        )
        for s in segments
    ]  # fmt: skip
    output = torch.empty((*query.shape[:3], segments[0].value.shape[3]), device=query.device, dtype=query.dtype)
    lse = torch.empty(query.shape[:3], device=query.device, dtype=torch.float32) if need_lse else None
    known = None if contrast == 1.0 else log2_sum_exp(query, arguments, query_labels, guide)
    launch_attention(query, arguments, output=output, lse=lse, query_labels=query_labels, guide=guide, contrast=contrast, known=known)
    return output, lse


def log2_sum_exp(query: Tensor, segments: Sequence[SegmentArguments], query_labels: Tensor | None = None, guide: Any = None) -> Tensor:
    """log2 of the sum of the exponentials of the logits, fp32 [B, H, N_Q]; no values are read."""
    lse = torch.empty(query.shape[:3], device=query.device, dtype=torch.float32)
    launch_attention(query, segments, output=None, lse=lse, lse_unit=1.0, query_labels=query_labels, guide=guide)
    return lse


def launch_attention(
    query: Tensor,
    segments: Sequence[SegmentArguments],
    *,
    output: Tensor | None,
    lse: Tensor | None,
    lse_unit: float = LN_2,
    query_labels: Tensor | None = None,
    guide: Any = None,
    contrast: float = 1.0,
    known: Tensor | None = None,
    exact_weights: bool = False,
    match_score: Tensor | None = None,
    distance: Tensor | None = None,
    signs: Tensor | None = None,
) -> None:
    """One launch: softmax attention, or contrasted where the log2-sum-exp is `known`, or without `output` the log-sum-exp only.

    With a `distance`, float32 [B, H, N_Q], `output` is not written but compared, any strides: the mean of |output - attention| over the
    channels of each query goes there, and where asked for the signs, int8 [B, H, N_Q, D_V], contiguous. `lse` is written in `lse_unit`: ln 2
    for natural logarithms, 1 for base 2. Queries whose `match_score` [B, G, N_Q], of the maps of the first segment's counts, is NaN give NaN.
    """
    (batch, heads, tokens, dim), value_dim = query.shape, 16 if output is None else output.shape[3]
    mode = _tile_mode(segments, output, guide, known, exact_weights, distance)
    tile = choose_tile("attention", mode, target_of(query.device), max(dim, value_dim), query.dtype, tokens)
    launch(
        attention_kernel, (triton.cdiv(tokens, tile.block_m) * batch * heads,), num_warps=tile.num_warps, num_stages=tile.num_stages,
        guide_query_ptr=None if guide is None else guide.query, output_ptr=output, lse_ptr=lse, known_ptr=known, match_score_ptr=match_score,
        distance_ptr=distance, signs_ptr=signs, lse_unit=lse_unit, contrast=contrast, strength=0.0 if guide is None else guide.strength * LOG2_E,
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
    counted = any(s.order_ptr is not None for s in segments)
    busy = any(s.labels_ptr is not None for s in segments) or (counted and len(segments) > 1) or distance is not None
    return ("busy " if busy else "") + ("softmax" if known is None else "contrast")


def _fixed(
    query: Tensor, segments: Sequence[SegmentArguments], output: Tensor | None, known: Tensor | None, exact_weights: bool, distance: Tensor | None
) -> bool:
    """Whether the maximum of the first tile may stabilise all of them: where weights have float32's range, and every query sees a key there."""
    if known is not None or exact_weights or query.dtype == torch.float16 or any(s.labels_ptr is not None for s in segments):
        return False
    width = FIXED_WIDTHS["distance" if distance is not None else "plain" if segments[0].order_ptr is None else "counts"]
    fits = output is None or (len(segments) == 1 and max(query.shape[3], output.shape[3]) <= width)
    return fits and target_of(query.device) in FIXED_TARGETS


@triton.jit
def _attend_tile(
    state, start, limit, query, segment, pointers, headroom, common_max, known, floor, contrast, strength, KEY_PITCH: tl.constexpr,
    VALUE_PITCH: tl.constexpr, GUIDE_PITCH: tl.constexpr, MASKED: tl.constexpr, FIXED: tl.constexpr, HAS_VALUES: tl.constexpr,
    KNOWN_LSE: tl.constexpr, EXACT_WEIGHTS: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, D_V: tl.constexpr,
    V_MAIN: tl.constexpr, V_TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query tile meets the keys start .. start + BLOCK_N of a segment; MASKED where some are beyond `limit`, FIXED where the maximum stays,
    which is the same one, `common_max`, for all queries where there are counts: both then cost an addition for a key, not one for a score.
    """
    running_max, row_sum, acc_main, acc_tail = state
    scores, factor, seen, rows, present, key_ptr, key_pitch_n, value_ptr, value_pitch_n = score_tile(
        start, limit, query, segment, pointers, strength, KEY_PITCH, VALUE_PITCH, GUIDE_PITCH, MASKED, D, D_MAIN, D_TAIL, BLOCK_N
    )
    if KNOWN_LSE:
        weights = tl.math.exp2(tl.fma(scores, factor, (segment.shift - known)[:, None]))
        weights = tl.clamp(tl.fma(weights, contrast, floor), 0.0, 1.0)
        if MASKED or segment.labels_ptr is not None:
            weights = tl.where(seen, weights, 0.0)
    elif FIXED:
        if segment.order_ptr is None:
            shift = (segment.shift - running_max)[:, None]
        else:
            log_weights = load(pointers[6] + start + tl.arange(0, BLOCK_N), present, MASKED)
            shift = (log_weights + (segment.shift - common_max))[None, :]
        weights = tl.math.exp2(tl.fma(scores, factor, shift))
    else:
        new_max = tl.maximum(running_max, tl.max(scores, 1) * factor + (segment.shift + headroom))
        stabiliser = new_max
        if MASKED or segment.labels_ptr is not None:
            stabiliser = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.math.exp2(tl.fma(scores, factor, (segment.shift - stabiliser)[:, None]))
        rescale = tl.math.exp2(running_max - stabiliser)
        running_max = new_max
    if segment.order_ptr is not None and not FIXED:
        weights *= load(pointers[5] + start + tl.arange(0, BLOCK_N), present, MASKED)[None, :]

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
def _attend(
    state, segments, query, opposite, batch, head, known, floor, contrast, strength, SEGMENTS: tl.constexpr, NEGATIVE: tl.constexpr,
    RAGGED: tl.constexpr, PITCHES: tl.constexpr, FIXED: tl.constexpr, HAS_VALUES: tl.constexpr, KNOWN_LSE: tl.constexpr,
    EXACT_WEIGHTS: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, D_V: tl.constexpr, V_MAIN: tl.constexpr,
    V_TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query tile meets every key of every segment. Where FIXED, the row sum comes and goes in PARTS."""
    running_max, row_sum, acc_main, acc_tail = state
    common_max = tl.max(running_max, 0)
    for s in tl.static_range(SEGMENTS):
        segment = segments[s]
        pointers, limit, headroom = open_segment(segment, batch, head, HAS_VALUES)
        asked = opposite if NEGATIVE[s] else query
        whole = limit // BLOCK_N * BLOCK_N
        for start in tl.range(0, whole, BLOCK_N):
            running_max, row_sum, acc_main, acc_tail = _attend_tile(
                (running_max, row_sum, acc_main, acc_tail), start, limit, asked, segment, pointers, headroom, common_max, known, floor, contrast,
                strength, PITCHES[3 * s], PITCHES[3 * s + 1], PITCHES[3 * s + 2], False, FIXED, HAS_VALUES, KNOWN_LSE, EXACT_WEIGHTS, D, D_MAIN,
                D_TAIL, D_V, V_MAIN, V_TAIL, BLOCK_N,
            )  # fmt: skip
        if RAGGED[s]:
            if whole < limit:
                running_max, row_sum, acc_main, acc_tail = _attend_tile(
                    (running_max, row_sum, acc_main, acc_tail), whole, limit, asked, segment, pointers, headroom, common_max, known, floor, contrast,
                    strength, PITCHES[3 * s], PITCHES[3 * s + 1], PITCHES[3 * s + 2], True, FIXED, HAS_VALUES, KNOWN_LSE, EXACT_WEIGHTS, D, D_MAIN,
                    D_TAIL, D_V, V_MAIN, V_TAIL, BLOCK_N,
                )  # fmt: skip
    return running_max, row_sum, acc_main, acc_tail


@triton.jit
def _first_max(
    segment, query, batch, head, strength, RAGGED: tl.constexpr, KEY_PITCH: tl.constexpr, GUIDE_PITCH: tl.constexpr, D: tl.constexpr,
    D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The largest logit of each query among the first tile of keys: [BLOCK_M]."""
    pointers, limit, headroom = open_segment(segment, batch, head, False)
    scores, factor, seen, rows, present, key_ptr, key_pitch_n, value_ptr, value_pitch_n = score_tile(
        0, limit, query, segment, pointers, strength, KEY_PITCH, 0, GUIDE_PITCH, RAGGED, D, D_MAIN, D_TAIL, BLOCK_N
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
    query_ptr, guide_query_ptr, query_labels_ptr, output_ptr, lse_ptr, known_ptr, match_score_ptr, distance_ptr, signs_ptr, segments, query_pitch_b,
    query_pitch_h, query_pitch_n, query_stride_d, output_pitch_b, output_pitch_h, output_pitch_n, output_stride_d, guide_query_pitch_b,
    guide_query_pitch_h, guide_query_pitch_n, guide_query_stride_d, query_labels_stride_b, query_labels_stride_n, H, N_Q, lse_unit, contrast,
    strength, SEGMENTS: tl.constexpr, NEGATIVE: tl.constexpr, RAGGED: tl.constexpr, PITCHES: tl.constexpr, FIXED: tl.constexpr,
    HAS_VALUES: tl.constexpr, KNOWN_LSE: tl.constexpr, EXACT_WEIGHTS: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr,
    D_V: tl.constexpr, V_MAIN: tl.constexpr, V_TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, batch, head, queries, inside = open_tile(N_Q, H, BLOCK_M)
    query_main, query_tail = load_parts(
        query_ptr, batch, head, queries, inside, query_pitch_b, query_pitch_h, query_pitch_n, query_stride_d, D, D_MAIN, D_TAIL
    )  # fmt: skip
    guide_main, guide_tail = query_main, query_tail
    if guide_query_ptr is not None:
        guide_main, guide_tail = load_parts(
            guide_query_ptr, batch, head, queries, inside, guide_query_pitch_b, guide_query_pitch_h, guide_query_pitch_n, guide_query_stride_d, D,
            D_MAIN, D_TAIL,
        )  # fmt: skip
    query_labels = load_query_labels(query_labels_ptr, batch, queries, inside, query_labels_stride_b, query_labels_stride_n)

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
            if segments[s].order_ptr is None:
                total += segments[s].N_K
            else:
                total += tl.load(segments[s].total_ptr + batch * segments[s].maps + head % segments[s].maps)
        floor = (1.0 - contrast) / tl.maximum(total, 1.0)

    query = (query_main, query_tail, guide_main, guide_tail, query_labels)
    opposite = (-query_main, -query_tail, guide_main, guide_tail, query_labels)
    if FIXED:
        running_max = _first_max(
            segments[0], opposite if NEGATIVE[0] else query, batch, head, strength, RAGGED[0], PITCHES[0], PITCHES[2], D, D_MAIN, D_TAIL, BLOCK_N
        )  # fmt: skip
        for s in tl.static_range(SEGMENTS):
            if segments[s].order_ptr is not None:
                running_max = tl.zeros((BLOCK_M,), tl.float32) + tl.max(running_max, 0)
        row_sum = tl.zeros((BLOCK_M, PARTS), tl.float32)
    running_max, row_sum, acc_main, acc_tail = _attend(
        (running_max, row_sum, acc_main, acc_tail), segments, query, opposite, batch, head, known, floor, contrast, strength, SEGMENTS, NEGATIVE,
        RAGGED, PITCHES, FIXED, HAS_VALUES, KNOWN_LSE, EXACT_WEIGHTS, D, D_MAIN, D_TAIL, D_V, V_MAIN, V_TAIL, BLOCK_N,
    )  # fmt: skip
    if FIXED:
        row_sum = tl.sum(row_sum, 1)
        least = tl.min(tl.where(inside, row_sum, 1.0), 0)
        if not ((tl.max(row_sum, 0) < FIXED_LIMIT) & (least > 1 / FIXED_LIMIT)):
            running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            row_sum = tl.zeros((BLOCK_M,), tl.float32)
            acc_main = tl.zeros((BLOCK_M, V_MAIN), tl.float32)
            acc_tail = tl.zeros((BLOCK_M, V_TAIL if V_TAIL > 0 else 1), tl.float32)
            running_max, row_sum, acc_main, acc_tail = _attend(
                (running_max, row_sum, acc_main, acc_tail), segments, query, opposite, batch, head, known, floor, contrast, strength, SEGMENTS,
                NEGATIVE, RAGGED, PITCHES, False, HAS_VALUES, KNOWN_LSE, EXACT_WEIGHTS, D, D_MAIN, D_TAIL, D_V, V_MAIN, V_TAIL, BLOCK_N,
            )  # fmt: skip

    if KNOWN_LSE:
        factor = tl.where(known == known, 1.0, float("nan"))  # the clamp made a number of NaN
    else:
        empty = row_sum == 0.0
        row_sum = tl.where(empty, 1.0, row_sum)
        factor = tl.where(empty, 0.0, 1.0 / row_sum)
        lse = tl.where(empty, float("-inf"), running_max + tl.math.log2(row_sum))
    if match_score_ptr is not None:
        match_row = batch * segments[0].maps + head % segments[0].maps
        match_score = tl.load(match_score_ptr + match_row * N_Q + queries, mask=inside, other=0.0)
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
