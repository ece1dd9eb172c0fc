"""attention on Triton and its gradient. B batch rows, H heads, N_Q queries, N_K keys of a segment, D and D_V channels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import FAMILIES, Tile, choose_tile, nearest_architecture, split_head_dim
from ._launch import launch, target_of
from ._tile import advance, load_rows, split_scores
from .rearrange import Multiplicity, compact

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
TINY = 1e-37  # in the place of a scale of 0
GRADIENT_ROWS = 32
FIXED_TARGETS = ("sm_90", "interpreter")
FIXED_WIDTHS = {"plain": 128, "counts": 64, "distance": 64}  # head dims up to which the kernel with both loops is known not to spill there
FIXED_LIMIT = tl.constexpr(2.0**64)  # of a row sum whose weights the first tile alone stabilised: beyond it, they or what they weigh may overflow
_QUERY_PITCHES = ("query_pitch_b", "query_pitch_h", "query_pitch_n", "query_stride_d")
_GUIDE_QUERY_PITCHES = ("guide_query_pitch_b", "guide_query_pitch_h", "guide_query_pitch_n", "guide_query_stride_d")
_OUTPUT_PITCHES = ("output_pitch_b", "output_pitch_h", "output_pitch_n", "output_stride_d")
_GRAD_PITCHES = ("grad_pitch_b", "grad_pitch_h", "grad_pitch_n", "grad_stride_d")
_QUERY_LABEL_STRIDES = ("query_labels_stride_b", "query_labels_stride_n")


class SegmentArguments(NamedTuple):
    """What the kernel reads of one segment; None where the segment has none.

    A pitch is a stride in bytes: that of a head is then a multiple of 16 also at head dim 40, and the loads stay wide.

    A segment with counts is read through `order`, its keys with a count above zero, which are `unique` many and weigh `weights`.
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
    unique_ptr: Tensor | None
    headroom_ptr: Tensor | None
    total_ptr: Tensor | None
    maps: int


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


def attention_backward(
    grad_output, grad_lse, output, lse, query, segments, *, scale, contrast, query_labels, guide, needs
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of query, keys and values that are needed: one launch before, one for the query, one or two for each segment.

    With mass_ij = m_j p_ij from the saved log-sum-exp and delta_i = dO_i·O_i - dlse_i: dl_ij = mass_ij (dO_i·v_j - delta_i),
    dq_i = Σ_j scale_s dl_ij k_j, dk_j = Σ_i scale_s dl_ij q_i, dv_j = Σ_i mass_ij dO_i. A program owns its keys and sums over all queries
    that read them, batch row after batch row: no atomics. Neither contrast nor guide is served.
    """
    known, delta = _gradient_rows(grad_output, grad_lse, output, lse)
    scales, count = [s.logit_scale * scale for s in segments], len(segments)
    grads: list[Tensor | None] = [None] * (1 + 2 * count)
    if needs[0]:
        grads[0] = torch.empty(query.shape, device=query.device, dtype=query.dtype)
        arguments = [
            segment_arguments(s.key, s.value, a, s.logit_shift, None if s.counts is None else compact(s.counts), s.labels, s.batch_index)
            for s, a in zip(segments, scales)
        ]
        _launch_query_gradient(query, grad_output, known, delta, query_labels, arguments, scales, grads[0])
    for i, (segment, a) in enumerate(zip(segments, scales)):
        for position, x in ((1 + i, segment.key), (1 + count + i, segment.value)):
            if needs[position]:
                grads[position] = torch.empty(x.shape, device=x.device, dtype=x.dtype)
        wanted = [(grads[1 + i], grads[1 + count + i])]
        if _takes_two_launches(query, grad_output):
            wanted = [(grads[1 + i], None), (None, grads[1 + count + i])]
        for grad_key, grad_value in wanted:
            if grad_key is not None or grad_value is not None:
                _launch_key_gradient(query, grad_output, known, delta, query_labels, segment, a, grad_key, grad_value)
    return grads


def log2_sum_exp(query: Tensor, segments: Sequence[SegmentArguments], query_labels: Tensor | None = None, guide: Any = None) -> Tensor:
    """log2 of the sum of the exponentials of the logits, fp32 [B, H, N_Q]; no values are read."""
    lse = torch.empty(query.shape[:3], device=query.device, dtype=torch.float32)
    launch_attention(query, segments, output=None, lse=lse, lse_unit=1.0, query_labels=query_labels, guide=guide)
    return lse


def segment_arguments(
    key: Tensor,
    value: Tensor | None,
    scale: float,
    shift: float = 0.0,
    multiplicity: Multiplicity | None = None,
    labels: Tensor | None = None,
    batch_index: Tensor | None = None,
    guide_key: Tensor | None = None,
) -> SegmentArguments:
    """One segment as the kernel takes it."""
    order, weights, unique, headroom, total = (None,) * 5 if multiplicity is None else multiplicity
    return SegmentArguments(
        key, *pitches(key), value, *pitches(value), guide_key, *pitches(guide_key), key.shape[2], scale * LOG2_E, shift * LOG2_E,
        batch_index, 0 if batch_index is None else batch_index.stride(0), labels, *_label_strides(labels), order, weights, unique, headroom, total,
        0 if unique is None else unique.shape[1],
    )  # fmt: skip


def pitches(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """Strides of batch, head and token in bytes, the stride of the channels."""
    if tensor is None:
        return 0, 0, 0, 0
    batch, head, token = (stride * tensor.element_size() for stride in tensor.stride()[:3])
    return batch, head, token, tensor.stride(3)


def _label_strides(labels: Tensor | None) -> tuple[int, int]:
    if labels is None:
        return 0, 0
    return labels.stride(0) if labels.shape[0] > 1 else 0, labels.stride(1)


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
    main, tail = split_head_dim(dim)
    value_main, value_tail = split_head_dim(value_dim)
    signed = segments
    if guide is None:  # a negative scale moves into the query; 0 becomes tiny, because -inf times it must stay -inf
        segments = [s._replace(scale=max(abs(s.scale), TINY)) for s in segments]
    launch(
        attention_kernel, (triton.cdiv(tokens, tile.block_m) * batch * heads,), num_warps=tile.num_warps, num_stages=tile.num_stages,
        query_ptr=query, guide_query_ptr=None if guide is None else guide.query, query_labels_ptr=query_labels, output_ptr=output, lse_ptr=lse,
        known_ptr=known, match_score_ptr=match_score, distance_ptr=distance, signs_ptr=signs, segments=tuple(segments),
        **dict(zip(_QUERY_PITCHES, pitches(query))), **dict(zip(_OUTPUT_PITCHES, pitches(None if distance is None else output))),
        **dict(zip(_GUIDE_QUERY_PITCHES, pitches(None if guide is None else guide.query))),
        **dict(zip(_QUERY_LABEL_STRIDES, _label_strides(query_labels))), H=heads, N_Q=tokens, lse_unit=lse_unit, contrast=contrast,
        strength=0.0 if guide is None else guide.strength * LOG2_E, SEGMENTS=len(segments),
        NEGATIVE=tuple(guide is None and s.scale < 0 for s in signed),
        RAGGED=tuple(s.order_ptr is not None or s.N_K % tile.block_n != 0 for s in segments),
        PITCHES=sum(((0, 0, 0) if s.order_ptr is None else (s.key_pitch_n, s.value_pitch_n, s.guide_pitch_n) for s in segments), ()),
        FIXED=_fixed(query, segments, output, known, exact_weights, distance), HAS_VALUES=output is not None, KNOWN_LSE=known is not None,
        EXACT_WEIGHTS=exact_weights, D=dim, D_MAIN=main, D_TAIL=tail, D_V=value_dim,
        V_MAIN=value_main, V_TAIL=value_tail, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
    )  # fmt: skip


def _gradient_rows(grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """log2 of the sums of the exponentials, inf for a query without keys, and dO·O - dlse, float32 [B, H, N_Q]."""
    batch, heads, tokens, value_dim = output.shape
    known, delta = (torch.empty((batch, heads, tokens), device=output.device, dtype=torch.float32) for _ in range(2))
    grad_lse_strides = (0, 0, 0) if grad_lse is None else grad_lse.stride()
    launch(
        gradient_rows_kernel, (batch * heads * triton.cdiv(tokens, GRADIENT_ROWS),), num_warps=4, num_stages=1, grad_ptr=grad_output,
        grad_lse_ptr=grad_lse, output_ptr=output, lse_ptr=lse, known_ptr=known, delta_ptr=delta, **dict(zip(_GRAD_PITCHES, pitches(grad_output))),
        **dict(zip(("grad_lse_stride_b", "grad_lse_stride_h", "grad_lse_stride_n"), grad_lse_strides)), H=heads, N_Q=tokens, D_V=value_dim,
        WIDTH=triton.next_power_of_2(value_dim), BLOCK=GRADIENT_ROWS,
    )  # fmt: skip
    return known, delta


def _launch_query_gradient(query, grad_output, known, delta, query_labels, segments, scales, grad_query) -> None:
    batch, heads, tokens, _ = query.shape
    tile, dims = _gradient_tile("queries", query, grad_output)
    launch(
        query_gradient_kernel, (triton.cdiv(tokens, tile.block_m) * batch * heads,), num_warps=tile.num_warps, num_stages=tile.num_stages,
        query_ptr=query, grad_ptr=grad_output, known_ptr=known, delta_ptr=delta, query_labels_ptr=query_labels, grad_query_ptr=grad_query,
        segments=tuple(s._replace(scale=max(abs(s.scale), TINY)) for s in segments), scales=tuple(scales),
        **dict(zip(_QUERY_PITCHES, pitches(query))), **dict(zip(_GRAD_PITCHES, pitches(grad_output))),
        **dict(zip(_QUERY_LABEL_STRIDES, _label_strides(query_labels))), H=heads, N_Q=tokens, SEGMENTS=len(segments),
        NEGATIVE=tuple(a < 0 for a in scales), RAGGED=tuple(s.order_ptr is not None or s.N_K % tile.block_n != 0 for s in segments),
        PITCHES=sum(((0, 0) if s.order_ptr is None else (s.key_pitch_n, s.value_pitch_n) for s in segments), ()), **dims,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
    )  # fmt: skip


def _launch_key_gradient(query, grad_output, known, delta, query_labels, segment, scale, grad_key, grad_value) -> None:
    """Of one segment; the tile's rows are keys here, its columns queries."""
    (batch, heads, tokens, _), (rows, _, keys, _) = query.shape, segment.key.shape
    tile, dims = _gradient_tile("keys" if segment.batch_index is None else "shared keys", query, grad_output)
    arguments = segment_arguments(segment.key, segment.value, scale, segment.logit_shift, None, segment.labels, segment.batch_index)
    counts = segment.counts
    counts_strides = (0, 0, 0) if counts is None else (counts.stride(0), counts.stride(1) if counts.shape[1] > 1 else 0, counts.stride(2))
    launch(
        key_gradient_kernel, (triton.cdiv(keys, tile.block_m) * rows * heads,), num_warps=tile.num_warps, num_stages=tile.num_stages,
        query_ptr=query, grad_ptr=grad_output, known_ptr=known, delta_ptr=delta, query_labels_ptr=query_labels, counts_ptr=counts,
        grad_key_ptr=grad_key, grad_value_ptr=grad_value, segment=arguments._replace(scale=max(abs(arguments.scale), TINY)), grad_scale=scale,
        **dict(zip(_QUERY_PITCHES, pitches(query))), **dict(zip(_GRAD_PITCHES, pitches(grad_output))),
        **dict(zip(_QUERY_LABEL_STRIDES, _label_strides(query_labels))),
        **dict(zip(("counts_stride_b", "counts_stride_h", "counts_stride_n"), counts_strides)), B=batch, H=heads, N_Q=tokens, NEGATIVE=scale < 0,
        RAGGED=tokens % tile.block_n != 0, **dims, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
    )  # fmt: skip


def _takes_two_launches(query: Tensor, grad_output: Tensor) -> bool:
    """Whether the gradients of keys and of values are summed one after the other: together they would spill registers there."""
    wide = max(query.shape[3], grad_output.shape[3]) > 128
    target = target_of(query.device)
    return wide and target != "interpreter" and FAMILIES[nearest_architecture(target)] == "ampere"


def _gradient_tile(mode: str, query: Tensor, grad_output: Tensor) -> tuple[Tile, dict[str, int]]:
    (dim, value_dim), tokens = (query.shape[3], grad_output.shape[3]), query.shape[2]
    tile = choose_tile("attention_backward", mode, target_of(query.device), max(dim, value_dim), query.dtype, tokens)
    names = ("D", "D_MAIN", "D_TAIL", "D_V", "V_MAIN", "V_TAIL")
    return tile, dict(zip(names, (dim, *split_head_dim(dim), value_dim, *split_head_dim(value_dim))))


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
def _load(pointers, present, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=present, other=0)
    else:
        return tl.load(pointers)


@triton.jit
def _score_tile(
    start, limit, query, segment, pointers, strength, KEY_PITCH: tl.constexpr, VALUE_PITCH: tl.constexpr, GUIDE_PITCH: tl.constexpr,
    MASKED: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_M, BLOCK_N] of the keys start .. start + BLOCK_N, -inf where unseen; what makes logits of them; where keys and values are."""
    query_main, query_tail, guide_main, guide_tail, query_labels = query
    key_ptr, value_ptr, guide_ptr, labels_ptr, order_ptr, weights_ptr = pointers
    columns = start + tl.arange(0, BLOCK_N)
    present = columns < limit
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
        rows = _load(order_ptr + columns, present, MASKED).to(tl.int64)

    scores = split_scores(query_main, query_tail, key_ptr, rows, present, key_pitch_n, segment.key_stride_d, D, D_MAIN, D_TAIL, MASKED)
    factor = segment.scale
    if segment.guide_ptr is not None:
        guided = split_scores(guide_main, guide_tail, guide_ptr, rows, present, guide_pitch_n, segment.guide_stride_d, D, D_MAIN, D_TAIL, MASKED)
        scores = tl.fma(scores, segment.scale, guided * strength)
        factor = 1.0
    seen = present[None, :]
    if segment.labels_ptr is not None:
        key_labels = _load(labels_ptr + rows * segment.labels_stride_n, present, MASKED)
        seen = (query_labels[:, None] & key_labels[None, :]) != 0
        scores = tl.where(seen, scores, float("-inf"))
    elif MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    return scores, factor, seen, rows, present, key_ptr, key_pitch_n, value_ptr, value_pitch_n


@triton.jit
def _attend_tile(
    state, start, limit, query, segment, pointers, headroom, known, floor, contrast, strength, KEY_PITCH: tl.constexpr, VALUE_PITCH: tl.constexpr,
    GUIDE_PITCH: tl.constexpr, MASKED: tl.constexpr, FIXED: tl.constexpr, HAS_VALUES: tl.constexpr, KNOWN_LSE: tl.constexpr,
    EXACT_WEIGHTS: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, D_V: tl.constexpr, V_MAIN: tl.constexpr,
    V_TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query tile meets the keys start .. start + BLOCK_N of a segment; MASKED where some are beyond `limit`, FIXED where the maximum stays."""
    running_max, row_sum, acc_main, acc_tail = state
    scores, factor, seen, rows, present, key_ptr, key_pitch_n, value_ptr, value_pitch_n = _score_tile(
        start, limit, query, segment, pointers, strength, KEY_PITCH, VALUE_PITCH, GUIDE_PITCH, MASKED, D, D_MAIN, D_TAIL, BLOCK_N
    )
    if KNOWN_LSE:
        weights = tl.math.exp2(tl.fma(scores, factor, (segment.shift - known)[:, None]))
        weights = tl.clamp(tl.fma(weights, contrast, floor), 0.0, 1.0)
        if MASKED or segment.labels_ptr is not None:
            weights = tl.where(seen, weights, 0.0)
    elif FIXED:
        weights = tl.math.exp2(tl.fma(scores, factor, (segment.shift - running_max)[:, None]))
    else:
        new_max = tl.maximum(running_max, tl.max(scores, 1) * factor + (segment.shift + headroom))
        stabiliser = new_max
        if MASKED or segment.labels_ptr is not None:
            stabiliser = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.math.exp2(tl.fma(scores, factor, (segment.shift - stabiliser)[:, None]))
        rescale = tl.math.exp2(running_max - stabiliser)
        running_max = new_max
    if segment.order_ptr is not None:
        weights *= _load(pointers[5] + start + tl.arange(0, BLOCK_N), present, MASKED)[None, :]

    if FIXED:
        row_sum += tl.sum(weights, 1)
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
def _open_segment(segment, batch, head, HAS_VALUES: tl.constexpr):
    """Pointers to a segment's (keys, values, guide, labels, order, weights) for one row, how many keys there are, and the headroom."""
    key_row = batch
    if segment.rows_ptr is not None:
        key_row = tl.load(segment.rows_ptr + batch * segment.rows_stride).to(tl.int64)
    key_ptr = advance(segment.key_ptr, key_row * segment.key_pitch_b + head * segment.key_pitch_h)
    value_ptr, guide_ptr, labels_ptr, order_ptr, weights_ptr = key_ptr, key_ptr, key_ptr, key_ptr, key_ptr
    limit, headroom = segment.N_K, 0.0
    if HAS_VALUES:
        value_ptr = advance(segment.value_ptr, key_row * segment.value_pitch_b + head * segment.value_pitch_h)
    if segment.guide_ptr is not None:
        guide_ptr = advance(segment.guide_ptr, key_row * segment.guide_pitch_b + head * segment.guide_pitch_h)
    if segment.labels_ptr is not None:
        labels_ptr = segment.labels_ptr + batch * segment.labels_stride_b
    if segment.order_ptr is not None:
        counts_row = batch * segment.maps + head % segment.maps
        order_ptr = segment.order_ptr + counts_row * segment.N_K
        weights_ptr = segment.weights_ptr + counts_row * segment.N_K
        headroom = tl.load(segment.headroom_ptr + counts_row)
        limit = tl.load(segment.unique_ptr + counts_row)
    return (key_ptr, value_ptr, guide_ptr, labels_ptr, order_ptr, weights_ptr), limit, headroom


@triton.jit
def _attend(
    state, segments, query, opposite, batch, head, known, floor, contrast, strength, SEGMENTS: tl.constexpr, NEGATIVE: tl.constexpr,
    RAGGED: tl.constexpr, PITCHES: tl.constexpr, FIXED: tl.constexpr, HAS_VALUES: tl.constexpr, KNOWN_LSE: tl.constexpr,
    EXACT_WEIGHTS: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, D_V: tl.constexpr, V_MAIN: tl.constexpr,
    V_TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query tile meets every key of every segment."""
    running_max, row_sum, acc_main, acc_tail = state
    for s in tl.static_range(SEGMENTS):
        segment = segments[s]
        pointers, limit, headroom = _open_segment(segment, batch, head, HAS_VALUES)
        asked = opposite if NEGATIVE[s] else query
        whole = limit // BLOCK_N * BLOCK_N
        for start in tl.range(0, whole, BLOCK_N):
            running_max, row_sum, acc_main, acc_tail = _attend_tile(
                (running_max, row_sum, acc_main, acc_tail), start, limit, asked, segment, pointers, headroom, known, floor, contrast, strength,
                PITCHES[3 * s], PITCHES[3 * s + 1], PITCHES[3 * s + 2], False, FIXED, HAS_VALUES, KNOWN_LSE, EXACT_WEIGHTS, D, D_MAIN, D_TAIL, D_V,
                V_MAIN, V_TAIL, BLOCK_N,
            )  # fmt: skip
        if RAGGED[s]:
            if whole < limit:
                running_max, row_sum, acc_main, acc_tail = _attend_tile(
                    (running_max, row_sum, acc_main, acc_tail), whole, limit, asked, segment, pointers, headroom, known, floor, contrast, strength,
                    PITCHES[3 * s], PITCHES[3 * s + 1], PITCHES[3 * s + 2], True, FIXED, HAS_VALUES, KNOWN_LSE, EXACT_WEIGHTS, D, D_MAIN, D_TAIL,
                    D_V, V_MAIN, V_TAIL, BLOCK_N,
                )  # fmt: skip
    return running_max, row_sum, acc_main, acc_tail


@triton.jit
def _first_max(
    segment, query, batch, head, strength, RAGGED: tl.constexpr, KEY_PITCH: tl.constexpr, GUIDE_PITCH: tl.constexpr, D: tl.constexpr,
    D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The largest logit of each query among the first tile of keys: [BLOCK_M]."""
    pointers, limit, headroom = _open_segment(segment, batch, head, False)
    scores, factor, seen, rows, present, key_ptr, key_pitch_n, value_ptr, value_pitch_n = _score_tile(
        0, limit, query, segment, pointers, strength, KEY_PITCH, 0, GUIDE_PITCH, RAGGED, D, D_MAIN, D_TAIL, BLOCK_N
    )
    return tl.max(scores, 1) * factor + segment.shift


@triton.jit
def _load_parts(pointer, batch, head, rows, present, pitch_b, pitch_h, pitch_n, stride_d, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Both parts of a tile of rows; the main part again where there is no tail."""
    pointer = advance(pointer, batch * pitch_b + head * pitch_h)
    main = load_rows(pointer, rows, present, pitch_n, stride_d, D, 0, MAIN, True)
    tail = main
    if TAIL > 0:
        tail = load_rows(pointer, rows, present, pitch_n, stride_d, D, MAIN, TAIL, True)
    return main, tail


@triton.jit
def _store_channels(output_ptrs, acc, inside, D_V: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    channels = FIRST + tl.arange(0, WIDTH)
    mask = inside[:, None] & (channels < D_V)[None, :]
    tl.store(output_ptrs[:, None] + channels[None, :], acc.to(output_ptrs.dtype.element_ty), mask=mask)


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
    blocks = tl.cdiv(N_Q, BLOCK_M)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = row // H, row % H
    queries = ((tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = queries < N_Q
    query_main, query_tail = _load_parts(
        query_ptr, batch, head, queries, inside, query_pitch_b, query_pitch_h, query_pitch_n, query_stride_d, D, D_MAIN, D_TAIL
    )  # fmt: skip
    guide_main, guide_tail = query_main, query_tail
    if guide_query_ptr is not None:
        guide_main, guide_tail = _load_parts(
            guide_query_ptr, batch, head, queries, inside, guide_query_pitch_b, guide_query_pitch_h, guide_query_pitch_n, guide_query_stride_d, D,
            D_MAIN, D_TAIL,
        )  # fmt: skip
    query_labels = queries
    if query_labels_ptr is not None:
        query_labels = tl.load(query_labels_ptr + batch * query_labels_stride_b + queries * query_labels_stride_n, mask=inside, other=-1)

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
    running_max, row_sum, acc_main, acc_tail = _attend(
        (running_max, row_sum, acc_main, acc_tail), segments, query, opposite, batch, head, known, floor, contrast, strength, SEGMENTS, NEGATIVE,
        RAGGED, PITCHES, FIXED, HAS_VALUES, KNOWN_LSE, EXACT_WEIGHTS, D, D_MAIN, D_TAIL, D_V, V_MAIN, V_TAIL, BLOCK_N,
    )  # fmt: skip
    if FIXED:
        if not tl.max(row_sum, 0) < FIXED_LIMIT:
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
        _store_channels(output_ptrs, acc_main * factor[:, None], inside, D_V, 0, V_MAIN)
        if V_TAIL > 0:
            _store_channels(output_ptrs, acc_tail * factor[:, None], inside, D_V, V_MAIN, V_TAIL)


@triton.jit
def gradient_rows_kernel(
    grad_ptr, grad_lse_ptr, output_ptr, lse_ptr, known_ptr, delta_ptr, grad_pitch_b, grad_pitch_h, grad_pitch_n, grad_stride_d, grad_lse_stride_b,
    grad_lse_stride_h, grad_lse_stride_n, H, N_Q, D_V: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N_Q, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = row // H, row % H
    queries = ((tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = queries < N_Q
    grad_ptr = advance(grad_ptr, batch * grad_pitch_b + head * grad_pitch_h)
    grad = load_rows(grad_ptr, queries, inside, grad_pitch_n, grad_stride_d, D_V, 0, WIDTH, True).to(tl.float32)
    channels = tl.arange(0, WIDTH)
    output_ptrs = output_ptr + (row * N_Q + queries)[:, None] * D_V + channels[None, :]
    output = tl.load(output_ptrs, mask=inside[:, None] & (channels < D_V)[None, :], other=0.0).to(tl.float32)
    delta = tl.sum(grad * output, 1)
    lse = tl.load(lse_ptr + row * N_Q + queries, mask=inside, other=0.0)
    if grad_lse_ptr is not None:
        grad_lse_ptr += batch * grad_lse_stride_b + head * grad_lse_stride_h
        delta -= tl.load(grad_lse_ptr + queries * grad_lse_stride_n, mask=inside, other=0.0)
    tl.store(known_ptr + row * N_Q + queries, tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634), mask=inside)
    tl.store(delta_ptr + row * N_Q + queries, delta, mask=inside)


@triton.jit
def _query_gradient_tile(
    acc, start, limit, query, grad, segment, pointers, known, delta, scale, KEY_PITCH: tl.constexpr, VALUE_PITCH: tl.constexpr,
    MASKED: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, D_V: tl.constexpr, V_MAIN: tl.constexpr,
    V_TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the keys start .. start + BLOCK_N of a segment add to the gradient of a query tile."""
    acc_main, acc_tail = acc
    scores, factor, seen, rows, present, key_ptr, key_pitch_n, value_ptr, value_pitch_n = _score_tile(
        start, limit, query, segment, pointers, 0.0, KEY_PITCH, VALUE_PITCH, 0, MASKED, D, D_MAIN, D_TAIL, BLOCK_N
    )
    mass = tl.math.exp2(tl.fma(scores, factor, (segment.shift - known)[:, None]))
    if segment.order_ptr is not None:
        mass *= _load(pointers[5] + start + tl.arange(0, BLOCK_N), present, MASKED)[None, :]
    gains = split_scores(grad[0], grad[1], value_ptr, rows, present, value_pitch_n, segment.value_stride_d, D_V, V_MAIN, V_TAIL, MASKED)
    grad_logits = (mass * (gains - delta[:, None]) * scale).to(query[0].dtype)
    key = load_rows(key_ptr, rows, present, key_pitch_n, segment.key_stride_d, D, 0, D_MAIN, MASKED)
    acc_main = tl.dot(grad_logits, key, acc_main, input_precision="ieee")
    if D_TAIL > 0:
        tail = load_rows(key_ptr, rows, present, key_pitch_n, segment.key_stride_d, D, D_MAIN, D_TAIL, MASKED)
        acc_tail = tl.dot(grad_logits, tail, acc_tail, input_precision="ieee")
    return acc_main, acc_tail


@triton.jit
def query_gradient_kernel(
    query_ptr, grad_ptr, known_ptr, delta_ptr, query_labels_ptr, grad_query_ptr, segments, scales, query_pitch_b, query_pitch_h, query_pitch_n,
    query_stride_d, grad_pitch_b, grad_pitch_h, grad_pitch_n, grad_stride_d, query_labels_stride_b, query_labels_stride_n, H, N_Q,
    SEGMENTS: tl.constexpr, NEGATIVE: tl.constexpr, RAGGED: tl.constexpr, PITCHES: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr, D_V: tl.constexpr, V_MAIN: tl.constexpr, V_TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query tile against every key of every segment."""
    blocks = tl.cdiv(N_Q, BLOCK_M)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = row // H, row % H
    queries = ((tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = queries < N_Q
    query_main, query_tail = _load_parts(
        query_ptr, batch, head, queries, inside, query_pitch_b, query_pitch_h, query_pitch_n, query_stride_d, D, D_MAIN, D_TAIL
    )  # fmt: skip
    grad = _load_parts(grad_ptr, batch, head, queries, inside, grad_pitch_b, grad_pitch_h, grad_pitch_n, grad_stride_d, D_V, V_MAIN, V_TAIL)
    query_labels = queries
    if query_labels_ptr is not None:
        query_labels = tl.load(query_labels_ptr + batch * query_labels_stride_b + queries * query_labels_stride_n, mask=inside, other=-1)
    known = tl.load(known_ptr + row * N_Q + queries, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + row * N_Q + queries, mask=inside, other=0.0)
    query = (query_main, query_tail, query_main, query_tail, query_labels)
    opposite = (-query_main, -query_tail, query_main, query_tail, query_labels)
    acc_main = tl.zeros((BLOCK_M, D_MAIN), tl.float32)
    acc_tail = tl.zeros((BLOCK_M, D_TAIL if D_TAIL > 0 else 1), tl.float32)
    for s in tl.static_range(SEGMENTS):
        pointers, limit, _ = _open_segment(segments[s], batch, head, True)
        asked = opposite if NEGATIVE[s] else query
        scale = 1.0 if SEGMENTS == 1 else scales[s]  # of a single segment: once, in the end
        for start in tl.range(0, limit, BLOCK_N):
            acc_main, acc_tail = _query_gradient_tile(
                (acc_main, acc_tail), start, limit, asked, grad, segments[s], pointers, known, delta, scale, PITCHES[2 * s], PITCHES[2 * s + 1],
                RAGGED[s], D, D_MAIN, D_TAIL, D_V, V_MAIN, V_TAIL, BLOCK_N,
            )  # fmt: skip
    scale = scales[0] if SEGMENTS == 1 else 1.0
    output_ptrs = grad_query_ptr + (row * N_Q + queries) * D
    _store_channels(output_ptrs, acc_main * scale, inside, D, 0, D_MAIN)
    if D_TAIL > 0:
        _store_channels(output_ptrs, acc_tail * scale, inside, D, D_MAIN, D_TAIL)


@triton.jit
def _key_gradient_tile(
    sums, start, N_Q, key, value, key_labels, log_counts, rows_of, pitches, segment, MASKED: tl.constexpr, COUNTED: tl.constexpr,
    HAS_KEY: tl.constexpr, HAS_VALUE: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, D_V: tl.constexpr,
    V_MAIN: tl.constexpr, V_TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the queries start .. start + BLOCK_N of a batch row add to the gradients of a tile of keys; scores lie as [keys, queries]."""
    key_main, key_tail, value_main, value_tail = sums
    query_ptr, grad_ptr, known_ptr, delta_ptr, query_labels_ptr = rows_of
    query_pitch_n, query_stride_d, grad_pitch_n, grad_stride_d, query_labels_stride_n = pitches
    columns = tl.arange(0, BLOCK_N)
    inside = start + columns < N_Q
    rows, first = columns.to(tl.int64), tl.cast(start, tl.int64)
    query_ptr = advance(query_ptr, first * query_pitch_n)
    grad_ptr = advance(grad_ptr, first * grad_pitch_n)
    scores = split_scores(key[0], key[1], query_ptr, rows, inside, query_pitch_n, query_stride_d, D, D_MAIN, D_TAIL, MASKED)
    if segment.labels_ptr is not None:
        query_labels = _load(query_labels_ptr + (first + rows) * query_labels_stride_n, inside, MASKED)
        scores = tl.where((key_labels[:, None] & query_labels[None, :]) != 0, scores, float("-inf"))
    if MASKED:
        known = tl.load(known_ptr + first + rows, mask=inside, other=float("inf"))
    else:
        known = tl.load(known_ptr + first + rows)
    logits = tl.fma(scores, segment.scale, (segment.shift - known)[None, :])
    if COUNTED:
        logits += log_counts[:, None]
    mass = tl.math.exp2(logits)
    grad = load_rows(grad_ptr, rows, inside, grad_pitch_n, grad_stride_d, D_V, 0, V_MAIN, MASKED)
    if HAS_VALUE:
        rounded = mass.to(grad.dtype)
        value_main = tl.dot(rounded, grad, value_main, input_precision="ieee")
        if V_TAIL > 0:
            grad_tail = load_rows(grad_ptr, rows, inside, grad_pitch_n, grad_stride_d, D_V, V_MAIN, V_TAIL, MASKED)
            value_tail = tl.dot(rounded, grad_tail, value_tail, input_precision="ieee")
    if HAS_KEY:
        gains = split_scores(value[0], value[1], grad_ptr, rows, inside, grad_pitch_n, grad_stride_d, D_V, V_MAIN, V_TAIL, MASKED)
        delta = _load(delta_ptr + first + rows, inside, MASKED)
        grad_logits = (mass * (gains - delta[None, :])).to(grad.dtype)
        query = load_rows(query_ptr, rows, inside, query_pitch_n, query_stride_d, D, 0, D_MAIN, MASKED)
        key_main = tl.dot(grad_logits, query, key_main, input_precision="ieee")
        if D_TAIL > 0:
            query_tail = load_rows(query_ptr, rows, inside, query_pitch_n, query_stride_d, D, D_MAIN, D_TAIL, MASKED)
            key_tail = tl.dot(grad_logits, query_tail, key_tail, input_precision="ieee")
    return key_main, key_tail, value_main, value_tail


@triton.jit
def _read_by(
    sums, batch, key_row, head, limit, keys, rows_of, pitches_b, pitches, counts_ptr, counts_strides, segment, H, N_Q, NEGATIVE: tl.constexpr,
    RAGGED: tl.constexpr, HAS_KEY: tl.constexpr, HAS_VALUE: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr,
    D_V: tl.constexpr, V_MAIN: tl.constexpr, V_TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the first `limit` queries of one batch row and head add to the gradients of a tile of keys that they read."""
    key_main, key_tail, value_main, value_tail = sums
    query_ptr, grad_ptr, known_ptr, delta_ptr, query_labels_ptr = rows_of
    query_pitch_b, query_pitch_h, grad_pitch_b, grad_pitch_h, query_labels_stride_b = pitches_b
    query_ptr = advance(query_ptr, batch * query_pitch_b + head * query_pitch_h)
    grad_ptr = advance(grad_ptr, batch * grad_pitch_b + head * grad_pitch_h)
    known_ptr += (batch * H + head) * N_Q
    delta_ptr += (batch * H + head) * N_Q
    present = keys < segment.N_K
    log_counts, key_labels = 0.0, 0
    if counts_ptr is not None:
        counts_ptr += batch * counts_strides[0] + head * counts_strides[1]
        counts = tl.load(counts_ptr + keys * counts_strides[2], mask=present, other=0)
        present = counts > 0
        log_counts = tl.math.log2(tl.maximum(counts, 0).to(tl.float32))
        limit = tl.where(tl.max(counts, 0) > 0, limit, 0)  # no queries for a tile of absent keys
    if segment.labels_ptr is not None:
        query_labels_ptr += batch * query_labels_stride_b
        labels_ptr = segment.labels_ptr + batch * segment.labels_stride_b
        key_labels = tl.load(labels_ptr + keys * segment.labels_stride_n, mask=present, other=0)
    key = _load_parts(
        segment.key_ptr, key_row, head, keys, present, segment.key_pitch_b, segment.key_pitch_h, segment.key_pitch_n, segment.key_stride_d, D,
        D_MAIN, D_TAIL,
    )  # fmt: skip
    if NEGATIVE:
        key = (-key[0], -key[1])
    value = key
    if HAS_KEY:
        value = _load_parts(
            segment.value_ptr, key_row, head, keys, present, segment.value_pitch_b, segment.value_pitch_h, segment.value_pitch_n,
            segment.value_stride_d, D_V, V_MAIN, V_TAIL,
        )  # fmt: skip
    rows_of = (query_ptr, grad_ptr, known_ptr, delta_ptr, query_labels_ptr)
    for start in tl.range(0, limit, BLOCK_N):
        key_main, key_tail, value_main, value_tail = _key_gradient_tile(
            (key_main, key_tail, value_main, value_tail), start, limit, key, value, key_labels, log_counts, rows_of, pitches, segment, RAGGED,
            counts_ptr is not None, HAS_KEY, HAS_VALUE, D, D_MAIN, D_TAIL, D_V, V_MAIN, V_TAIL, BLOCK_N,
        )  # fmt: skip
    return key_main, key_tail, value_main, value_tail


@triton.jit
def key_gradient_kernel(
    query_ptr, grad_ptr, known_ptr, delta_ptr, query_labels_ptr, counts_ptr, grad_key_ptr, grad_value_ptr, segment, grad_scale, query_pitch_b,
    query_pitch_h, query_pitch_n, query_stride_d, grad_pitch_b, grad_pitch_h, grad_pitch_n, grad_stride_d, query_labels_stride_b,
    query_labels_stride_n, counts_stride_b, counts_stride_h, counts_stride_n, B, H, N_Q, NEGATIVE: tl.constexpr, RAGGED: tl.constexpr,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, D_V: tl.constexpr, V_MAIN: tl.constexpr, V_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_M keys of one row and head against the queries of every batch row that reads it, in order."""
    blocks = tl.cdiv(segment.N_K, BLOCK_M)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    key_row, head = row // H, row % H
    keys = ((tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    HAS_KEY: tl.constexpr = grad_key_ptr is not None
    HAS_VALUE: tl.constexpr = grad_value_ptr is not None
    key_main = tl.zeros((BLOCK_M, D_MAIN), tl.float32)
    key_tail = tl.zeros((BLOCK_M, D_TAIL if D_TAIL > 0 else 1), tl.float32)
    value_main = tl.zeros((BLOCK_M, V_MAIN), tl.float32)
    value_tail = tl.zeros((BLOCK_M, V_TAIL if V_TAIL > 0 else 1), tl.float32)
    rows_of = (query_ptr, grad_ptr, known_ptr, delta_ptr, query_labels_ptr)
    pitches_b = (query_pitch_b, query_pitch_h, grad_pitch_b, grad_pitch_h, query_labels_stride_b)
    pitches = (query_pitch_n, query_stride_d, grad_pitch_n, grad_stride_d, query_labels_stride_n)
    counts_strides = (counts_stride_b, counts_stride_h, counts_stride_n)
    if segment.rows_ptr is None:
        key_main, key_tail, value_main, value_tail = _read_by(
            (key_main, key_tail, value_main, value_tail), key_row, key_row, head, N_Q, keys, rows_of, pitches_b, pitches,
            counts_ptr, counts_strides, segment, H, N_Q, NEGATIVE, RAGGED, HAS_KEY, HAS_VALUE, D, D_MAIN, D_TAIL, D_V, V_MAIN, V_TAIL, BLOCK_N,
        )  # fmt: skip
    else:
        for batch in range(0, B):
            reads = tl.load(segment.rows_ptr + batch * segment.rows_stride) == key_row
            key_main, key_tail, value_main, value_tail = _read_by(
                (key_main, key_tail, value_main, value_tail), tl.cast(batch, tl.int64), key_row, head, tl.where(reads, N_Q, 0), keys, rows_of,
                pitches_b, pitches, counts_ptr, counts_strides, segment, H, N_Q, NEGATIVE, RAGGED, HAS_KEY, HAS_VALUE, D, D_MAIN, D_TAIL, D_V,
                V_MAIN, V_TAIL, BLOCK_N,
            )  # fmt: skip
    inside = keys < segment.N_K
    if HAS_KEY:
        output_ptrs = grad_key_ptr + (row * segment.N_K + keys) * D
        _store_channels(output_ptrs, key_main * grad_scale, inside, D, 0, D_MAIN)
        if D_TAIL > 0:
            _store_channels(output_ptrs, key_tail * grad_scale, inside, D, D_MAIN, D_TAIL)
    if HAS_VALUE:
        output_ptrs = grad_value_ptr + (row * segment.N_K + keys) * D_V
        _store_channels(output_ptrs, value_main, inside, D_V, 0, V_MAIN)
        if V_TAIL > 0:
            _store_channels(output_ptrs, value_tail, inside, D_V, V_MAIN, V_TAIL)
