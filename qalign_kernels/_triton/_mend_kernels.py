"""Kernels that compute rows again, where a hidden NaN or infinity reached them. `_mend.py` launches them.

1. Load a tile of the result. If all of it is finite, there is nothing to do.
2. Otherwise compute the rows of the tile again, without products of tiles: one key (or one query) after the
   other, which counts only where it is seen.
3. Write the rows that were not finite.

B batch rows, H heads, N_Q queries, N_K keys, D and D_V channels.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._comparison import _compare_parts
from ._key_gradient import Counts, KeyPlace, KeySums
from ._segments import (
    SegmentArguments,
    load_query_labels,
    open_segment,
)
from ._tile import (
    Parts,
    load_parts,
    open_tile,
    read_row,
    rows_of,
    store_parts,
    unpack_match,
    zeros,
)


class Hidden(NamedTuple):
    """A segment as it was given, with its labels and counts: no key is gathered or sorted."""

    arguments: SegmentArguments
    counts: Counts | None


class Reader(NamedTuple):
    """A tile of queries, or one of them: channels, those of the guide and its strength, label sets."""

    channels: Parts
    guide: Parts
    guide_strength: Any
    labels: Any


class Queries(NamedTuple):
    """All queries with the gradient of their output, as a tile of keys reads them."""

    query: Any
    grad: Any
    known_ptr: Any
    delta_ptr: Any
    labels: Any
    H: Any
    N_Q: Any


class Meeting(NamedTuple):
    """One key and a tile of queries: base-2 logits, the multiplicity, and which queries see the key."""

    logits: Any
    count: Any
    seen: Any


@triton.jit
def _floats(rows, tokens, inside, width):
    """Both parts of a tile of rows in float32."""
    parts = load_parts(rows, tokens, inside, width, True)
    return Parts(parts.main.to(tl.float32), parts.tail.to(tl.float32))


@triton.jit
def _dot(left, right, width):
    """The product of each row of two tiles, of which one may have a single row."""
    total = tl.sum(left.main * right.main, 1)
    if width.TAIL > 0:
        total += tl.sum(left.tail * right.tail, 1)
    return total


@triton.jit
def _add_where(sums, seen, weights, rows, width):
    """sums + weights · rows, where the rows are seen. What is not seen adds nothing, whatever it holds."""
    main = sums.main + tl.where(seen[:, None], weights[:, None] * rows.main, 0.0)
    tail = sums.tail
    if width.TAIL > 0:
        tail += tl.where(seen[:, None], weights[:, None] * rows.tail, 0.0)
    return Parts(main, tail)


@triton.jit
def _infinite(parts, width):
    """Whether a row holds a NaN or an infinity: its difference from itself is then NaN."""
    lost = tl.max(((parts.main - parts.main) != 0).to(tl.int32), 1)
    if width.TAIL > 0:
        lost = tl.maximum(lost, tl.max(((parts.tail - parts.tail) != 0).to(tl.int32), 1))
    return lost != 0


@triton.jit
def _round(numbers, like):
    """Numbers rounded to the dtype of a pointer's elements."""
    return numbers.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _count_of(counts, batch, head, tokens, present):
    """The multiplicity of keys, 0 where they are absent."""
    count = present.to(tl.int32)
    if counts is not None:
        pointers = (
            counts.pointer + batch * counts.stride_b + head * counts.stride_g + tokens * counts.stride_n
        )
        count = tl.maximum(tl.load(pointers, mask=present, other=0), 0)
    return count


@triton.jit
def _meet_key(reader, hidden, row, batch, head, token, width):
    """Queries [BLOCK_M] meet the key at `token`, [1]."""
    segment = hidden.arguments
    present = token >= 0
    key = _floats(row.key, token, present, width)
    logits = _dot(reader.channels, key, width) * segment.scale + segment.shift
    if segment.guide is not None:
        guide = _floats(row.guide, token, present, width)
        logits += _dot(reader.guide, guide, width) * reader.guide_strength
    count = tl.max(_count_of(hidden.counts, batch, head, token, present), 0)
    seen = (tl.zeros_like(reader.labels) + count) > 0
    if segment.labels is not None:
        label = tl.load(row.labels_ptr + token * segment.labels.stride_n)
        seen = seen & ((reader.labels & label) != 0)
    return Meeting(logits, count.to(tl.float32), seen)


@triton.jit
def _log2_sum(reader, hidden, batch, head, width, SEGMENTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """log2 of the sum of the exponentials over what each query sees, -inf for no key."""
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for s in tl.static_range(SEGMENTS):
        row = open_segment(hidden[s].arguments, batch, head)
        for start in range(0, hidden[s].arguments.N_K):
            token = (start + tl.arange(0, 1)).to(tl.int64)
            met = _meet_key(reader, hidden[s], row, batch, head, token, width)
            new = tl.maximum(largest, tl.where(met.seen, met.logits, float("-inf")))
            stabiliser = tl.where(new == float("-inf"), 0.0, new)
            mass = met.count * tl.math.exp2(met.logits - stabiliser)
            total = total * tl.math.exp2(largest - stabiliser) + tl.where(met.seen, mass, 0.0)
            largest = new
    return tl.where(total == 0.0, float("-inf"), largest + tl.math.log2(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def _number_of_keys(hidden, batch, head, SEGMENTS: tl.constexpr):
    """N, the number of keys with their multiplicity, at least 1."""
    total = 0.0
    for s in tl.static_range(SEGMENTS):
        for start in range(0, hidden[s].arguments.N_K):
            token = (start + tl.arange(0, 1)).to(tl.int64)
            total += tl.max(_count_of(hidden[s].counts, batch, head, token, token >= 0), 0).to(tl.float32)
    return tl.maximum(total, 1.0)


@triton.jit
def _attend_seen(
    reader,
    hidden,
    batch,
    head,
    contrast,
    like,
    key_width,
    value_width,
    SEGMENTS: tl.constexpr,
    CONTRAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The attention of a tile of queries to what each of them sees."""
    known = _log2_sum(reader, hidden, batch, head, key_width, SEGMENTS, BLOCK_M)
    number = 1.0
    if CONTRAST:
        number = _number_of_keys(hidden, batch, head, SEGMENTS)
    output = zeros(BLOCK_M, value_width)
    for s in tl.static_range(SEGMENTS):
        row = open_segment(hidden[s].arguments, batch, head)
        for start in range(0, hidden[s].arguments.N_K):
            token = (start + tl.arange(0, 1)).to(tl.int64)
            met = _meet_key(reader, hidden[s], row, batch, head, token, key_width)
            weights = tl.math.exp2(met.logits - known)
            if CONTRAST:
                contrasted = contrast * (weights - 1.0 / number) + 1.0 / number
                weights = tl.clamp(contrasted, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
            weights = _round(met.count * weights, like)
            value = _floats(row.value, token, token >= 0, value_width)
            output = _add_where(output, met.seen, weights, value, value_width)
    return output


@triton.jit
def mend_output_kernel(
    query,
    query_labels,
    guide_query,
    guide_strength,
    hidden,
    output_ptr,
    contrast,
    match_ptr,
    match_maps,
    output,
    distance_ptr,
    signs_ptr,
    H,
    N_Q,
    SEGMENTS: tl.constexpr,
    CONTRAST: tl.constexpr,
    KEY_WIDTH,
    VALUE_WIDTH,
    BLOCK_M: tl.constexpr,
):
    """A tile of queries whose output, or its distance from another one, may not be finite."""
    row, batch, head, queries, inside = open_tile(N_Q, H, BLOCK_M)
    if distance_ptr is not None:
        distance = tl.load(distance_ptr + row * N_Q + queries, mask=inside, other=0.0)
        lost = (distance - distance) != 0
    else:
        lost = _infinite(_floats(rows_of(output, batch, head), queries, inside, VALUE_WIDTH), VALUE_WIDTH)
    if match_ptr is not None:  # the output of an invalid match stays NaN
        match_row = batch * match_maps + head % match_maps
        match = tl.load(match_ptr + match_row * N_Q + queries, mask=inside, other=0)
        match_score, match_index = unpack_match(match)
        lost = lost & (match_score == match_score)
    if tl.max(lost.to(tl.int32), 0) > 0:
        channels = _floats(rows_of(query, batch, head), queries, inside, KEY_WIDTH)
        guide = channels
        if guide_query is not None:
            guide = _floats(rows_of(guide_query, batch, head), queries, inside, KEY_WIDTH)
        labels = load_query_labels(query_labels, batch, queries, inside)
        attended = _attend_seen(
            Reader(channels, guide, guide_strength, labels),
            hidden,
            batch,
            head,
            contrast,
            query.pointer,
            KEY_WIDTH,
            VALUE_WIDTH,
            SEGMENTS,
            CONTRAST,
            BLOCK_M,
        )
        if distance_ptr is not None:
            compared, written = rows_of(output, batch, head), lost & inside
            if signs_ptr is not None:
                signs = signs_ptr + (row * N_Q + queries) * VALUE_WIDTH.D
                total = _compare_parts(compared, signs, attended, 1.0, queries, written, VALUE_WIDTH)
            else:
                total = _compare_parts(compared, None, attended, 1.0, queries, written, VALUE_WIDTH)
            tl.store(distance_ptr + row * N_Q + queries, total / VALUE_WIDTH.D, mask=written)
        else:
            pointers = output_ptr + (row * N_Q + queries) * VALUE_WIDTH.D
            store_parts(pointers, attended, lost & inside, VALUE_WIDTH)


@triton.jit
def mend_query_gradient_kernel(
    query,
    query_labels,
    grad,
    known_ptr,
    delta_ptr,
    hidden,
    scales,
    grad_query,
    grad_query_ptr,
    H,
    N_Q,
    SEGMENTS: tl.constexpr,
    KEY_WIDTH,
    VALUE_WIDTH,
    BLOCK_M: tl.constexpr,
):
    """A tile of queries whose gradient may not be finite."""
    row, batch, head, queries, inside = open_tile(N_Q, H, BLOCK_M)
    lost = _infinite(_floats(rows_of(grad_query, batch, head), queries, inside, KEY_WIDTH), KEY_WIDTH)
    if tl.max(lost.to(tl.int32), 0) > 0:
        channels = _floats(rows_of(query, batch, head), queries, inside, KEY_WIDTH)
        gradient = _floats(rows_of(grad, batch, head), queries, inside, VALUE_WIDTH)
        labels = load_query_labels(query_labels, batch, queries, inside)
        known = tl.load(known_ptr + row * N_Q + queries, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + row * N_Q + queries, mask=inside, other=0.0)
        total = zeros(BLOCK_M, KEY_WIDTH)
        for s in tl.static_range(SEGMENTS):
            opened = open_segment(hidden[s].arguments, batch, head)
            for start in range(0, hidden[s].arguments.N_K):
                token = (start + tl.arange(0, 1)).to(tl.int64)
                reader = Reader(channels, channels, 0.0, labels)
                met = _meet_key(reader, hidden[s], opened, batch, head, token, KEY_WIDTH)
                gains = _dot(gradient, _floats(opened.value, token, token >= 0, VALUE_WIDTH), VALUE_WIDTH)
                mass = met.count * tl.math.exp2(met.logits - known)
                grad_logits = _round(mass * (gains - delta) * scales[s], query.pointer)
                key = _floats(opened.key, token, token >= 0, KEY_WIDTH)
                total = _add_where(total, met.seen, grad_logits, key, KEY_WIDTH)
        pointers = grad_query_ptr + (row * N_Q + queries) * KEY_WIDTH.D
        store_parts(pointers, total, lost & inside, KEY_WIDTH)


@triton.jit
def _read_keys(sums, reading, hidden, keys, value, place, row, limit, KEY_WIDTH, VALUE_WIDTH):
    """What the first `limit` queries of one batch row add to the gradients of a tile of keys."""
    segment, head = hidden.arguments, place.head
    batch = tl.cast(row, tl.int64)
    present = place.tokens < segment.N_K
    count = _count_of(hidden.counts, batch, head, place.tokens, present)
    labels = place.tokens
    if segment.labels is not None:
        pointers = segment.labels.pointer + batch * segment.labels.stride_b
        labels = tl.load(pointers + place.tokens * segment.labels.stride_n, mask=present, other=0)
    first = (batch * reading.H + head) * reading.N_Q
    for start in range(0, limit):
        token = (start + tl.arange(0, 1)).to(tl.int64)
        channels = _floats(rows_of(reading.query, batch, head), token, token >= 0, KEY_WIDTH)
        gradient = _floats(rows_of(reading.grad, batch, head), token, token >= 0, VALUE_WIDTH)
        seen = count > 0
        if segment.labels is not None:
            seen = seen & ((labels & load_query_labels(reading.labels, batch, token, token >= 0)) != 0)
        logits = _dot(keys, channels, KEY_WIDTH) * segment.scale + segment.shift
        mass = count.to(tl.float32) * tl.math.exp2(logits - tl.load(reading.known_ptr + first + token))
        gains = _dot(value, gradient, VALUE_WIDTH) - tl.load(reading.delta_ptr + first + token)
        grad_logits = _round(mass * gains, reading.query.pointer)
        sums = KeySums(
            _add_where(sums.key, seen, grad_logits, channels, KEY_WIDTH),
            _add_where(sums.value, seen, _round(mass, reading.query.pointer), gradient, VALUE_WIDTH),
        )
    return sums


@triton.jit
def mend_key_gradient_kernel(
    query,
    query_labels,
    grad,
    known_ptr,
    delta_ptr,
    hidden,
    grad_key,
    grad_key_ptr,
    grad_value,
    grad_value_ptr,
    grad_scale,
    B,
    H,
    N_Q,
    KEY_WIDTH,
    VALUE_WIDTH,
    BLOCK_M: tl.constexpr,
):
    """A tile of keys of which a gradient may not be finite."""
    segment = hidden.arguments
    row, batch, head, tokens, inside = open_tile(segment.N_K, H, BLOCK_M)
    key_lost, value_lost = inside & (tokens < 0), inside & (tokens < 0)
    if grad_key_ptr is not None:
        key_lost = _infinite(_floats(rows_of(grad_key, batch, head), tokens, inside, KEY_WIDTH), KEY_WIDTH)
    if grad_value_ptr is not None:
        value_lost = _infinite(
            _floats(rows_of(grad_value, batch, head), tokens, inside, VALUE_WIDTH), VALUE_WIDTH
        )
    if tl.max((key_lost | value_lost).to(tl.int32), 0) > 0:
        keys = _floats(rows_of(segment.key, batch, head), tokens, inside, KEY_WIDTH)
        value = _floats(rows_of(segment.value, batch, head), tokens, inside, VALUE_WIDTH)
        place = KeyPlace(batch, head, tokens)
        queries = Queries(query, grad, known_ptr, delta_ptr, query_labels, H, N_Q)
        sums = KeySums(zeros(BLOCK_M, KEY_WIDTH), zeros(BLOCK_M, VALUE_WIDTH))
        for reading in range(0, B):
            reads = tl.cast(reading, tl.int64) == batch
            if segment.rows_ptr is not None:
                read = read_row(segment.rows_ptr, segment.rows_stride, segment.rows_number, reading)
                reads = read == batch
            limit = tl.where(reads, N_Q, 0)
            sums = _read_keys(
                sums, queries, hidden, keys, value, place, reading, limit, KEY_WIDTH, VALUE_WIDTH
            )
        if grad_key_ptr is not None:
            pointers = grad_key_ptr + (row * segment.N_K + tokens) * KEY_WIDTH.D
            store_parts(pointers, sums.key, key_lost & inside, KEY_WIDTH, grad_scale)
        if grad_value_ptr is not None:
            pointers = grad_value_ptr + (row * segment.N_K + tokens) * VALUE_WIDTH.D
            store_parts(pointers, sums.value, value_lost & inside, VALUE_WIDTH)
