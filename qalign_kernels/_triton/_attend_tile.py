"""One tile of queries meets one tile of keys: the inner step of `attention.attention_kernel`.

1. Multiply queries and keys: the scores [BLOCK_M, BLOCK_N].
2. Make weights of the scores, 2^(logit - maximum), times the counts of the keys.
   - In general the maximum is the largest logit so far. Where it grows, what was summed before is rescaled.
   - If FIXED, the maximum stays as it is, so that nothing is rescaled.
   - With a known log2-sum-exp the weights are contrasted probabilities, which need no maximum.
3. Add the weights to the row sums, and the weighted values to the output.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._labels import free_slot, visible_spans
from ._segments import KeyTile, score_tile
from ._tile import Parts, accumulate, load, load_rows, scale_rows, zeros

PARTS = tl.constexpr(8)  # of a row sum: lanes keep them apart and add them after the last tile


class State(NamedTuple):
    """The sums of a tile of queries: maximum logit, sum of the weights, weighted sum of the values."""

    running_max: Any
    row_sum: Any
    output: Parts


class Contrast(NamedTuple):
    """Weights are clamp(amount · probability + floor, 0, 1); `known` is the log2-sum-exp of the logits."""

    known: Any
    amount: Any
    floor: Any


class Variant(NamedTuple):
    """The constexpr settings of a kernel.

    KNOWN_LSE with a contrast, EXACT_WEIGHTS where weights are not rounded. LOOP_ONCE where even a product
    that is computed once stands in a loop: see `_attention_choice.loop_once`.
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

    MASKED if some keys may not be present, COMPARED if labels may differ, FIXED if the maximum stays. With
    counts all queries have one FIXED maximum, `common_max`: shift and count cost one addition for a key.
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
    """As `accumulate`, with a weight as three bfloat16 numbers, which hold its 24 bits. There is no tail."""
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
