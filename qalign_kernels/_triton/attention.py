"""attention on Triton. B batch rows, H heads, N_Q queries, N_K keys of a segment, D and D_V channels.

A program has one tile of queries and walks over the keys of all segments, tile after tile, with a running
maximum (online softmax): `attention_kernel` → `_attend` → `_attend_segment` → `_attend_tile`. In a FIXED
kernel `_attend_fixed` first tries the maximum of the first tile for all of them, which saves the rescaling.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import Tile, choose_tile, listed_tile, split_head_dim
from ._labels import compared_slots, free_slot, label_class, sort_queries, visible_spans
from ._launch import launch, target_of
from ._segments import (
    LOG2_E,
    KeyTile,
    QueryTile,
    SegmentArguments,
    load_query_labels,
    open_segment,
    opposite,
    query_arguments,
    score_tile,
    segment_arguments,
    unsigned,
    walked,
)
from ._tile import (
    Parts,
    accumulate,
    features,
    load,
    load_parts,
    load_rows,
    open_tile,
    rows_of,
    scale_rows,
    store_parts,
    unpack_match,
    width,
    zeros,
)
from .attention_backward import attention_backward as attention_backward

LN_2 = 0.6931471805599453
FIXED_TARGETS = ("sm_90", "interpreter")
LOOP_TARGETS = ("sm_90", "interpreter")  # see `_loop_once`; the interpreter, so that tests run these loops
# head dims up to which the kernel with both loops is known not to spill there
FIXED_WIDTHS = {"plain": 128, "counts": 128, "distance": 64}
PARTS = tl.constexpr(8)  # of a row sum, which lanes have apart: they meet after the last tile
ONCE_STAGES = tl.constexpr(2)  # of a loop that runs once at most: the least that is pipelined
# of a row sum, and of its inverse, with the maximum of the first tile: beyond it, weights may overflow
FIXED_LIMIT = tl.constexpr(2.0**64)
COPY_ALIGNMENT = 16  # of rows that the bulk copy engine reads, in bytes


class State(NamedTuple):
    """What a tile of queries has gathered: maximum logit, sum of the weights, weighted sum of the values."""

    running_max: Any
    row_sum: Any
    output: Parts


class Contrast(NamedTuple):
    """Weights are clamp(amount · probability + floor, 0, 1), probabilities by the `known` log2-sum-exp."""

    known: Any
    amount: Any
    floor: Any


class Variant(NamedTuple):
    """What is constexpr. KNOWN_LSE with a contrast, EXACT_WEIGHTS where weights are not rounded.

    LOOP_ONCE where even what happens once is to be in a loop: see `_loop_once`.
    """

    SEGMENTS: Any
    HAS_VALUES: Any
    KNOWN_LSE: Any
    EXACT_WEIGHTS: Any
    KEY_WIDTH: Any
    VALUE_WIDTH: Any
    BLOCK_M: Any
    BLOCK_N: Any
    LOOP_ONCE: Any


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
    launch_attention(query, arguments, output=output, lse=lse, contrast=contrast, known=known, **shared)
    return output, lse


def log2_sum_exp(query: Tensor, segments: Sequence[SegmentArguments], **shared: Any) -> Tensor:
    """log2 of the sum of the exponentials of the logits, fp32 [B, H, N_Q]; `shared` goes to the launch."""
    lse = torch.empty(query.shape[:3], device=query.device, dtype=torch.float32)
    launch_attention(query, segments, output=None, lse=lse, lse_unit=1.0, **shared)
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
    """Launch attention, contrasted if the log2-sum-exp is `known`; without `output`, its log-sum-exp only.

    Args:
        output: [B, H, N_Q, D_V], written, contiguous; with a `distance` read and compared, any strides.
        lse: float32 [B, H, N_Q], in `lse_unit`: ln 2 for natural logarithms, 1 for base 2.
        query_order: int32 [B or 1, 1, N_Q], by which tiles take queries where segments are sorted by label.
        match: int64 [B, G, N_Q] as `_tile.pack_match` has it, of the maps of the first segment's counts.
            Queries whose match has score NaN give NaN.
        distance: float32 [B, H, N_Q], the mean of |output - attention| over the channels of each query.
        signs: int8 [B, H, N_Q, D_V], contiguous, the signs of output - attention.
    """
    (batch, heads, tokens, dim), value_dim = query.shape, 16 if output is None else output.shape[3]
    mode = _tile_mode(segments, output, guide, known, exact_weights, distance)
    fixed = _fixed(query, segments, output, known, exact_weights, distance)
    hopper_tile = _hopper_tile(query, segments, output, mode)
    if hopper_tile is not None and output is not None:
        _launch_hopper(query, segments[0], output, lse, lse_unit, match, fixed, hopper_tile)
        return
    tile = choose_tile("attention", mode, target_of(query.device), max(dim, value_dim), query.dtype, tokens)
    launch(
        attention_kernel,
        (triton.cdiv(tokens, tile.block_m) * batch * heads,),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **query_arguments(query, query_labels),
        query_order_ptr=query_order,
        query_order_stride_b=0 if query_order is None or query_order.shape[0] == 1 else tokens,
        guide_query=None if guide is None else features(guide.query),
        guide_strength=0.0 if guide is None else guide.strength * LOG2_E.value,
        segments=walked(segments, tile.block_n),
        output_ptr=output if distance is None else None,
        lse_ptr=lse,
        lse_unit=lse_unit,
        known_ptr=known,
        contrast=contrast,
        match_ptr=match,
        compared=None if output is None or distance is None else features(output),
        distance_ptr=distance,
        signs_ptr=signs,
        SEGMENTS=len(segments),
        FIXED=fixed,
        HAS_VALUES=output is not None,
        KNOWN_LSE=known is not None,
        EXACT_WEIGHTS=exact_weights,
        KEY_WIDTH=width(dim),
        VALUE_WIDTH=width(value_dim),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        LOOP_ONCE=_loop_once(target_of(query.device), (dim,) if output is None else (dim, value_dim)),
    )


def _loop_once(target: str, dims: tuple[int, ...]) -> bool:
    """Whether every product is to be in a pipelined loop, those that are computed once as well.

    With parts of fewer than 64 channels, the ptxas 12.8 of Triton 3.6 and 3.7 reads the operands of others from
    wrong addresses on sm_90 (`stray_descriptors` in benchmarks/machine_code.py). Wider parts are faster without.
    """
    return target in LOOP_TARGETS and min(part for dim in dims for part in split_head_dim(dim) if part) < 64


def _tile_mode(
    segments: Sequence[SegmentArguments],
    output: Tensor | None,
    guide: Any,
    known: Tensor | None,
    exact_weights: bool,
    distance: Tensor | None,
) -> str:
    if guide is not None or exact_weights:
        return "guided" if guide is not None else "exact"
    if output is None:
        return "lse"
    counted = any(s.weights_ptr is not None for s in segments)
    busy = (
        any(s.labels is not None for s in segments) or (counted and len(segments) > 1) or distance is not None
    )
    if known is not None:
        return "busy contrast" if busy else "contrast"
    return "busy softmax" if busy else "counted softmax" if counted else "softmax"


def _fixed(
    query: Tensor,
    segments: Sequence[SegmentArguments],
    output: Tensor | None,
    known: Tensor | None,
    exact_weights: bool,
    distance: Tensor | None,
) -> bool:
    """Whether the maximum of the first tile may serve for all tiles.

    Weights must have the range of float32, and every query must see a key there.
    """
    unsorted = any(s.labels is not None and s.starts_ptr is None for s in segments)
    if known is not None or exact_weights or query.dtype == torch.float16 or unsorted:
        return False
    kind = "distance" if distance is not None else "plain" if segments[0].weights_ptr is None else "counts"
    narrow = output is None or max(query.shape[3], output.shape[3]) <= FIXED_WIDTHS[kind]
    return narrow and (output is None or len(segments) == 1) and target_of(query.device) in FIXED_TARGETS


def _hopper_tile(
    query: Tensor, segments: Sequence[SegmentArguments], output: Tensor | None, mode: str
) -> Tile | None:
    """The tile with which `_attention_hopper` serves a call, or None: it takes one segment and no labels."""
    (segment, *others), dim = segments, query.shape[3]
    if mode not in ("softmax", "counted softmax") or others or segment.order_ptr is not None:
        return None
    target, tokens = target_of(query.device), query.shape[2]
    tile = listed_tile("attention", f"{mode} hopper", target, dim, query.dtype, tokens)
    if tile is None or output is None or output.shape[3] != dim or segment.N_K < tile.block_n:
        return None
    return tile if all(map(_is_copied, (query, *_copied(segment)))) else None


def _copied(segment: SegmentArguments) -> list[Tensor]:
    """The keys and the values of a segment."""
    return [x.pointer for x in (segment.key, segment.value) if x is not None]


def _is_copied(x: Tensor) -> bool:
    """Whether the bulk copy engine reads tiles of these features."""
    *apart, step = (stride for stride, size in zip(x.stride(), x.shape) if size > 1)
    addresses = (x.data_ptr(), *(stride * x.element_size() for stride in apart))
    return step == 1 and all(apart) and not any(address % COPY_ALIGNMENT for address in addresses)


def _launch_hopper(
    query: Tensor,
    segment: SegmentArguments,
    output: Tensor,
    lse: Tensor | None,
    lse_unit: float,
    match: Tensor | None,
    fixed: bool,
    tile: Tile,
) -> None:
    from . import _attention_hopper  # Gluon, which no other call needs

    key, value = _copied(segment)
    launch(
        _attention_hopper.attention_hopper_kernel,
        (triton.cdiv(query.shape[2], tile.block_m) * query.shape[0] * query.shape[1],),
        num_warps=tile.num_warps // _attention_hopper.CONSUMERS.value,
        num_stages=1,
        segment=unsigned(segment),
        output_ptr=output,
        lse_ptr=lse,
        lse_unit=lse_unit,
        match_ptr=match,
        H=query.shape[1],
        N_Q=query.shape[2],
        FIXED=fixed,
        **_attention_hopper.arguments(query, key, value, tile),
    )


@triton.jit
def _empty_state(variant):
    """No key met yet."""
    running_max = tl.full((variant.BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((variant.BLOCK_M,), tl.float32)
    return State(running_max, row_sum, zeros(variant.BLOCK_M, variant.VALUE_WIDTH))


@triton.jit
def _attend_tile(
    state,
    query,
    segment,
    row,
    keys,
    common_max,
    contrast,
    variant,
    FIXED: tl.constexpr,
    MASKED: tl.constexpr,
    COMPARED: tl.constexpr,
):
    """One query tile meets one key tile.

    MASKED where some keys may not be present, COMPARED where labels may differ, FIXED where the maximum
    stays. With counts a FIXED maximum is the same one, `common_max`, for all queries: shift and count then
    cost an addition for a key, not one for a score.
    """
    running_max, row_sum, output = state
    tile = score_tile(query, segment, row, keys, variant.KEY_WIDTH, MASKED, COMPARED, variant.BLOCK_N)
    if variant.KNOWN_LSE:
        weights = tl.math.exp2(tl.fma(tile.scores, tile.factor, (segment.shift - contrast.known)[:, None]))
        weights = tl.clamp(tl.fma(weights, contrast.amount, contrast.floor), 0.0, 1.0)
        if MASKED or COMPARED:
            weights = tl.where(tile.seen, weights, 0.0)
    elif FIXED:
        if segment.weights_ptr is None:
            shift = (segment.shift - running_max)[:, None]
        else:
            log_weights = load(row.log_weights_ptr + keys.columns, keys.present, MASKED)
            shift = (log_weights + (segment.shift - common_max))[None, :]
        weights = tl.math.exp2(tl.fma(tile.scores, tile.factor, shift))
    else:
        new_max = tl.maximum(
            running_max, tl.max(tile.scores, 1) * tile.factor + (segment.shift + row.headroom)
        )
        stabiliser = new_max
        if MASKED or COMPARED:
            stabiliser = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.math.exp2(tl.fma(tile.scores, tile.factor, (segment.shift - stabiliser)[:, None]))
        rescale = tl.math.exp2(running_max - stabiliser)
        running_max = new_max
    if segment.weights_ptr is not None and not FIXED:
        weights *= load(row.weights_ptr + keys.columns, keys.present, MASKED)[None, :]

    if FIXED:
        parts = tl.reshape(weights, (variant.BLOCK_M, variant.BLOCK_N // PARTS, PARTS))
        row_sum += tl.sum(parts, 1)
    elif not variant.KNOWN_LSE:
        row_sum = tl.fma(row_sum, rescale, tl.sum(weights, 1))
        if variant.HAS_VALUES:
            output = scale_rows(output, rescale, variant.VALUE_WIDTH)
    if variant.HAS_VALUES:
        if variant.EXACT_WEIGHTS:
            output = _accumulate_exactly(output, weights, tile, keys.present, variant.VALUE_WIDTH, MASKED)
        else:
            output = accumulate(
                output, weights, tile.value, tile.tokens, keys.present, variant.VALUE_WIDTH, MASKED
            )
    return State(running_max, row_sum, output)


@triton.jit
def _accumulate_exactly(output, weights, tile, present, width, MASKED: tl.constexpr):
    """As `accumulate`, with weights in three bfloat16 parts, which hold their 24 bits. There is no tail."""
    value = load_rows(tile.value, tile.tokens, present, width.D, 0, width.MAIN, MASKED)
    main = output.main
    for _ in tl.static_range(3):
        part = weights.to(value.dtype)
        main = tl.dot(part, value, main)
        weights -= part.to(tl.float32)
    return Parts(main, output.tail)


@triton.jit
def _attend_last_tile(
    state,
    query,
    segment,
    row,
    start,
    common_max,
    contrast,
    variant,
    FIXED: tl.constexpr,
    COMPARED: tl.constexpr,
):
    """One query tile meets the last key tile, of which some keys are not present."""
    columns = start + tl.arange(0, variant.BLOCK_N)
    keys = KeyTile(start, columns, columns < row.limit)
    return _attend_tile(
        state, query, segment, row, keys, common_max, contrast, variant, FIXED, True, COMPARED
    )


@triton.jit
def _attend_segment(state, query, segment, batch, head, common_max, contrast, variant, FIXED: tl.constexpr):
    """One query tile meets the keys of a segment: whole tiles of them, then the others."""
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
    """One query tile meets every key of every segment. If FIXED, the row sum comes and goes in PARTS."""
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
    """Whether every query of a tile sees a whole tile of keys, the first; without labels it sees all keys."""
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
def _tile_max(query, segment, row, start, variant):
    """The largest logit of each query among the tile of keys at `start`."""
    columns = start + tl.arange(0, variant.BLOCK_N)
    present = columns < row.limit
    if segment.starts_ptr is not None:
        spans = visible_spans(row.starts_ptr, query.lowest_class, query.highest_class, variant.BLOCK_N)
        columns += free_slot(0, spans)
    keys = KeyTile(start, columns, present)
    tile = score_tile(query, segment, row, keys, variant.KEY_WIDTH, segment.RAGGED, False, variant.BLOCK_N)
    return tl.max(tile.scores, 1) * tile.factor + segment.shift


@triton.jit
def _attend_fixed(query, segments, batch, head, contrast, variant):
    """One query tile meets every key, with the maximum of the first key tile; row sums are inf without."""
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
    """Whether for some query the maximum of the first tile was too far from that of all tiles, or NaN."""
    least = tl.min(tl.where(inside, row_sum, 1.0), 0)
    return not ((tl.max(row_sum, 0) < FIXED_LIMIT) & (least > 1 / FIXED_LIMIT))


@triton.jit
def _attend_keys(query, segments, batch, head, inside, contrast, variant, FIXED: tl.constexpr):
    """One query tile meets every key: if FIXED first with one maximum for all tiles, else a running one."""
    state = _empty_state(variant)
    if FIXED:
        state = _attend_fixed(query, segments, batch, head, contrast, variant)
    if not FIXED or _may_have_overflowed(state.row_sum, inside):
        state = _attend(_empty_state(variant), query, segments, batch, head, contrast, variant, False)
    return state


@triton.jit
def _compare_channels(
    compared, signs_ptrs, ideal, queries, inside, D_V: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr
):
    """Sum of |output - ideal| over some channels, the ideal rounded as the output is; write the signs."""
    output = load_rows(compared, queries, inside, D_V, FIRST, WIDTH, True)
    difference = output.to(tl.float32) - ideal.to(output.dtype).to(tl.float32)
    if signs_ptrs is not None:
        channels = FIRST + tl.arange(0, WIDTH)
        sign = (difference > 0).to(tl.int8) - (difference < 0).to(tl.int8)
        mask = inside[:, None] & (channels < D_V)[None, :]
        tl.store(signs_ptrs[:, None] + channels[None, :], sign, mask=mask)
    return tl.sum(tl.abs(difference), 1)


@triton.jit
def _compare_parts(compared, signs_ptrs, parts, factors, queries, inside, width):
    """The sum over all channels, where the ideal is `parts` times the factor of each row."""
    main = parts.main * factors
    total = _compare_channels(compared, signs_ptrs, main, queries, inside, width.D, 0, width.MAIN)
    if width.TAIL > 0:
        tail = parts.tail * factors
        total += _compare_channels(
            compared, signs_ptrs, tail, queries, inside, width.D, width.MAIN, width.TAIL
        )
    return total


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
    """One tile of queries of one batch row and head against every key of every segment."""
    row, batch, head, queries, inside = open_tile(N_Q, H, BLOCK_M)
    if query_order_ptr is not None:  # beyond the end the last query, for its class
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
