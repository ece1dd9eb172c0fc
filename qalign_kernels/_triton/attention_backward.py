"""The gradient of attention on Triton. B batch rows, H heads, N_Q queries, N_K keys, D and D_V channels."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import FAMILIES, Tile, choose_tile, nearest_architecture
from ._labels import Labels
from ._launch import launch, target_of
from ._segments import (
    LOG2_E,
    KeyTile,
    QueryTile,
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
    skip,
    split_scores,
    store_parts,
    width,
    zeros,
)

GRADIENT_ROWS = 32


class QueryGradients(NamedTuple):
    """Of a tile of queries: the gradient of its output, its log2-sum-exp and its delta, fp32."""

    output: Parts
    known: Any
    delta: Any


class Counts(NamedTuple):
    """How often each key counts, int32 [B, G, N_K]; with one map its stride of maps is 0."""

    pointer: Any
    stride_b: Any
    stride_g: Any
    stride_n: Any


class KeyPlace(NamedTuple):
    """Which keys a program has: `tokens` of one batch row and head."""

    batch: Any
    head: Any
    tokens: Any


class HeldKeys(NamedTuple):
    """A tile of keys: keys, values, log2 of the counts and label sets, 0 where there are none."""

    key: Parts
    value: Parts
    log_counts: Any
    labels: Any


class Readers(NamedTuple):
    """The queries that read keys: of all batch rows and heads (Features), or of one (Rows)."""

    query: Any
    grad: Any
    known_ptr: Any
    delta_ptr: Any
    labels: Any


class KeySums(NamedTuple):
    """The gradients of a tile of keys and of its values."""

    key: Parts
    value: Parts


class KeyVariant(NamedTuple):
    """Which kernel this is; constexpr. RAGGED where the last tile of queries may be incomplete."""

    RAGGED: Any
    HAS_KEY: Any
    HAS_VALUE: Any
    KEY_WIDTH: Any
    VALUE_WIDTH: Any
    BLOCK_N: Any


def attention_backward(
    grad_output, grad_lse, output, lse, query, segments, *, scale, contrast, query_labels, guide, needs
) -> list[Tensor | None]:
    """The gradients of query, keys and values that are needed.

    With mass_ij = m_j p_ij from the saved log-sum-exp and delta_i = dO_i·O_i - dlse_i:
    dl_ij = mass_ij (dO_i·v_j - delta_i), dq_i = Σ_j scale_s dl_ij k_j, dk_j = Σ_i scale_s dl_ij q_i,
    dv_j = Σ_i mass_ij dO_i. One launch is for known and delta, one for the query, one or two for a segment.
    A program owns its keys and sums over all queries that read them, batch row after batch row: no atomics.
    Neither contrast nor guide is served.
    """
    known, delta = _gradient_rows(grad_output, grad_lse, output, lse)
    scales, count = [s.logit_scale * scale for s in segments], len(segments)
    grads: list[Tensor | None] = [None] * (1 + 2 * count)
    if needs[0]:
        grads[0] = torch.empty(query.shape, device=query.device, dtype=query.dtype)
        arguments = [
            segment_arguments(
                s.key,
                s.value,
                segment_scale,
                s.logit_shift,
                s.counts,
                s.labels,
                s.batch_index,
            )
            for s, segment_scale in zip(segments, scales)
        ]
        _launch_query_gradient(query, grad_output, known, delta, query_labels, arguments, scales, grads[0])
    for i, (segment, segment_scale) in enumerate(zip(segments, scales)):
        for position, x in ((1 + i, segment.key), (1 + count + i, segment.value)):
            if needs[position]:
                grads[position] = torch.empty(x.shape, device=x.device, dtype=x.dtype)
        wanted = [(grads[1 + i], grads[1 + count + i])]
        if _takes_two_launches(query, grad_output):
            wanted = [(grads[1 + i], None), (None, grads[1 + count + i])]
        for grad_key, grad_value in wanted:
            if grad_key is not None or grad_value is not None:
                _launch_key_gradient(
                    query,
                    grad_output,
                    known,
                    delta,
                    query_labels,
                    segment,
                    segment_scale,
                    grad_key,
                    grad_value,
                )
    return grads


def _gradient_rows(
    grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """log2 of the sums of the exponentials, inf for a query without keys, and delta; float32 [B, H, N_Q]."""
    batch, heads, tokens, value_dim = output.shape
    known, delta = (
        torch.empty((batch, heads, tokens), device=output.device, dtype=torch.float32) for _ in range(2)
    )
    width = triton.next_power_of_2(value_dim)
    launch(
        gradient_rows_kernel,
        (batch * heads * triton.cdiv(tokens, GRADIENT_ROWS),),
        num_warps=max(4, width // 32),
        num_stages=1,
        grad=features(grad_output),
        grad_lse_ptr=grad_lse,
        grad_lse_strides=(0, 0, 0) if grad_lse is None else grad_lse.stride(),
        output_ptr=output,
        lse_ptr=lse,
        known_ptr=known,
        delta_ptr=delta,
        H=heads,
        N_Q=tokens,
        D_V=value_dim,
        WIDTH=width,
        BLOCK=GRADIENT_ROWS,
    )
    return known, delta


def _launch_query_gradient(
    query, grad_output, known, delta, query_labels, segments, scales, grad_query
) -> None:
    batch, heads, tokens, _ = query.shape
    tile = _gradient_tile("queries", query, grad_output)
    launch(
        query_gradient_kernel,
        (triton.cdiv(tokens, tile.block_m) * batch * heads,),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **query_arguments(query, query_labels),
        grad=features(grad_output),
        known_ptr=known,
        delta_ptr=delta,
        segments=walked(segments, tile.block_n),
        scales=tuple(scales),
        SEGMENTS=len(segments),
        grad_query_ptr=grad_query,
        KEY_WIDTH=width(query.shape[3]),
        VALUE_WIDTH=width(grad_output.shape[3]),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
    )


def _launch_key_gradient(
    query, grad_output, known, delta, query_labels, segment, scale, grad_key, grad_value
) -> None:
    """Of one segment; the tile's rows are keys here, its columns queries."""
    (batch, heads, tokens, _), (rows, _, keys, _) = query.shape, segment.key.shape
    mode = "keys" if segment.batch_index is None else "shared keys"
    tile = _gradient_tile(mode, query, grad_output)
    arguments = segment_arguments(
        segment.key, segment.value, scale, segment.logit_shift, None, segment.labels, segment.batch_index
    )
    launch(
        key_gradient_kernel,
        (triton.cdiv(keys, tile.block_m) * rows * heads,),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **query_arguments(query, query_labels),
        grad=features(grad_output),
        known_ptr=known,
        delta_ptr=delta,
        segment=unsigned(arguments),
        counts=_count_arguments(segment.counts),
        grad_key_ptr=grad_key,
        grad_value_ptr=grad_value,
        grad_scale=scale,
        B=batch,
        RAGGED=tokens % tile.block_n != 0,
        KEY_WIDTH=width(query.shape[3]),
        VALUE_WIDTH=width(grad_output.shape[3]),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
    )


def _count_arguments(counts: Tensor | None) -> Counts | None:
    """Counts as the kernel takes them."""
    if counts is None:
        return None
    batch, maps, token = counts.stride()
    return Counts(counts, batch, maps if counts.shape[1] > 1 else 0, token)


def _takes_two_launches(query: Tensor, grad_output: Tensor) -> bool:
    """Whether gradients of keys and of values are summed one after the other: together they would spill."""
    wide = max(query.shape[3], grad_output.shape[3]) > 128
    target = target_of(query.device)
    return wide and target != "interpreter" and FAMILIES[nearest_architecture(target)] == "ampere"


def _gradient_tile(mode: str, query: Tensor, grad_output: Tensor) -> Tile:
    dim = max(query.shape[3], grad_output.shape[3])
    return choose_tile("attention_backward", mode, target_of(query.device), dim, query.dtype, query.shape[2])


@triton.jit
def gradient_rows_kernel(
    grad,
    grad_lse_ptr,
    grad_lse_strides,
    output_ptr,
    lse_ptr,
    known_ptr,
    delta_ptr,
    H,
    N_Q,
    D_V: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of queries: their log2-sum-exp and delta."""
    row, batch, head, queries, inside = open_tile(N_Q, H, BLOCK)
    gradient = load_rows(rows_of(grad, batch, head), queries, inside, D_V, 0, WIDTH, True).to(tl.float32)
    channels = tl.arange(0, WIDTH)
    output_ptrs = output_ptr + (row * N_Q + queries)[:, None] * D_V + channels[None, :]
    mask = inside[:, None] & (channels < D_V)[None, :]
    output = tl.load(output_ptrs, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(gradient * output, 1)
    lse = tl.load(lse_ptr + row * N_Q + queries, mask=inside, other=0.0)
    if grad_lse_ptr is not None:
        grad_lse_ptr += batch * grad_lse_strides[0] + head * grad_lse_strides[1]
        delta -= tl.load(grad_lse_ptr + queries * grad_lse_strides[2], mask=inside, other=0.0)
    tl.store(
        known_ptr + row * N_Q + queries,
        tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E),
        mask=inside,
    )
    tl.store(delta_ptr + row * N_Q + queries, delta, mask=inside)


@triton.jit
def _query_gradient_tile(
    total,
    query,
    given,
    segment,
    row,
    keys,
    scale,
    key_width,
    value_width,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What one tile of keys adds to the gradient of a query tile."""
    tile = score_tile(query, segment, row, keys, key_width, MASKED, segment.labels is not None, BLOCK_N)
    mass = tl.math.exp2(tl.fma(tile.scores, tile.factor, (segment.shift - given.known)[:, None]))
    if segment.weights_ptr is not None:
        mass *= load(row.weights_ptr + keys.columns, keys.present, MASKED)[None, :]
    gains = split_scores(given.output, tile.value, tile.tokens, keys.present, value_width, MASKED)
    grad_logits = (mass * (gains - given.delta[:, None]) * scale).to(query.channels.main.dtype)
    return accumulate(total, grad_logits, tile.key, tile.tokens, keys.present, key_width, MASKED)


@triton.jit
def query_gradient_kernel(
    query,
    query_labels,
    grad,
    known_ptr,
    delta_ptr,
    segments,
    scales,
    grad_query_ptr,
    H,
    N_Q,
    SEGMENTS: tl.constexpr,
    KEY_WIDTH,
    VALUE_WIDTH,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One query tile against every key of every segment."""
    row, batch, head, queries, inside = open_tile(N_Q, H, BLOCK_M)
    channels = load_parts(rows_of(query, batch, head), queries, inside, KEY_WIDTH, True)
    gradient = load_parts(rows_of(grad, batch, head), queries, inside, VALUE_WIDTH, True)
    labels = load_query_labels(query_labels, batch, queries, inside)
    known = tl.load(known_ptr + row * N_Q + queries, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + row * N_Q + queries, mask=inside, other=0.0)
    tile = QueryTile(channels, channels, 0.0, labels, 0, 0)
    total = zeros(BLOCK_M, KEY_WIDTH)
    for s in tl.static_range(SEGMENTS):
        opened = open_segment(segments[s], batch, head)
        scale = 1.0 if SEGMENTS == 1 else scales[s]  # of a single segment: once, in the end
        for start in tl.range(0, opened.limit, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            total = _query_gradient_tile(
                total,
                opposite(tile) if segments[s].NEGATIVE else tile,
                QueryGradients(gradient, known, delta),
                segments[s],
                opened,
                KeyTile(start, columns, columns < opened.limit),
                scale,
                KEY_WIDTH,
                VALUE_WIDTH,
                segments[s].RAGGED,
                BLOCK_N,
            )
    scale = scales[0] if SEGMENTS == 1 else 1.0
    store_parts(grad_query_ptr + (row * N_Q + queries) * KEY_WIDTH.D, total, inside, KEY_WIDTH, scale)


@triton.jit
def _key_gradient_tile(sums, start, limit, held, readers, segment, variant, COUNTED: tl.constexpr):
    """What the queries from `start` on add to the sums of a tile of keys; scores lie as [keys, queries]."""
    key_sums, value_sums = sums
    MASKED: tl.constexpr = variant.RAGGED
    columns = tl.arange(0, variant.BLOCK_N)
    inside = start + columns < limit
    tokens, first = columns.to(tl.int64), tl.cast(start, tl.int64)
    query, grad = skip(readers.query, first), skip(readers.grad, first)
    scores = split_scores(held.key, query, tokens, inside, variant.KEY_WIDTH, MASKED)
    if segment.labels is not None:
        pointers = readers.labels.pointer + (first + tokens) * readers.labels.stride_n
        query_labels = load(pointers, inside, MASKED)
        scores = tl.where((held.labels[:, None] & query_labels[None, :]) != 0, scores, float("-inf"))
    if MASKED:
        known = tl.load(readers.known_ptr + first + tokens, mask=inside, other=float("inf"))
    else:
        known = tl.load(readers.known_ptr + first + tokens)
    logits = tl.fma(scores, segment.scale, (segment.shift - known)[None, :])
    if COUNTED:
        logits += held.log_counts[:, None]
    mass = tl.math.exp2(logits)
    if variant.HAS_VALUE:
        value_sums = accumulate(value_sums, mass, grad, tokens, inside, variant.VALUE_WIDTH, MASKED)
    if variant.HAS_KEY:
        gains = split_scores(held.value, grad, tokens, inside, variant.VALUE_WIDTH, MASKED)
        delta = load(readers.delta_ptr + first + tokens, inside, MASKED)
        grad_logits = (mass * (gains - delta[None, :])).to(held.value.main.dtype)
        key_sums = accumulate(key_sums, grad_logits, query, tokens, inside, variant.KEY_WIDTH, MASKED)
    return KeySums(key_sums, value_sums)


@triton.jit
def _labels_of(labels, batch):
    """The label sets of one batch row."""
    return Labels(labels.pointer + batch * labels.stride_b, 0, labels.stride_n)


@triton.jit
def _read_by(sums, readers, batch, limit, keys, segment, counts, H, N_Q, variant):
    """What the first `limit` queries of one batch row and head add to the sums of a tile of keys."""
    query, grad = rows_of(readers.query, batch, keys.head), rows_of(readers.grad, batch, keys.head)
    known_ptr = readers.known_ptr + (batch * H + keys.head) * N_Q
    delta_ptr = readers.delta_ptr + (batch * H + keys.head) * N_Q
    present = keys.tokens < segment.N_K
    log_counts, labels, query_labels = 0.0, 0, Labels(0, 0, 0)
    if counts is not None:
        counts_ptr = counts.pointer + (batch * counts.stride_b + keys.head * counts.stride_g)
        count = tl.load(counts_ptr + keys.tokens * counts.stride_n, mask=present, other=0)
        present = count > 0
        log_counts = tl.math.log2(tl.maximum(count, 0).to(tl.float32))
        limit = tl.where(tl.max(count, 0) > 0, limit, 0)  # no queries for a tile of absent keys
    if segment.labels is not None:
        query_labels, key_labels = _labels_of(readers.labels, batch), _labels_of(segment.labels, batch)
        labels = tl.load(key_labels.pointer + keys.tokens * key_labels.stride_n, mask=present, other=0)
    key = load_parts(
        rows_of(segment.key, keys.batch, keys.head), keys.tokens, present, variant.KEY_WIDTH, True
    )
    if segment.NEGATIVE:
        key = Parts(-key.main, -key.tail)
    value = key
    if variant.HAS_KEY:
        value_rows = rows_of(segment.value, keys.batch, keys.head)
        value = load_parts(value_rows, keys.tokens, present, variant.VALUE_WIDTH, True)
    held = HeldKeys(key, value, log_counts, labels)
    of_row = Readers(query, grad, known_ptr, delta_ptr, query_labels)
    for start in tl.range(0, limit, variant.BLOCK_N):
        sums = _key_gradient_tile(sums, start, limit, held, of_row, segment, variant, counts is not None)
    return sums


@triton.jit
def _read_by_all(sums, readers, keys, segment, counts, B, H, N_Q, variant):
    """The same of every batch row that reads the keys, in order; without a batch index that is their own."""
    if segment.rows_ptr is None:
        sums = _read_by(sums, readers, keys.batch, N_Q, keys, segment, counts, H, N_Q, variant)
    else:
        for row in range(0, B):
            reads = tl.load(segment.rows_ptr + row * segment.rows_stride) == keys.batch
            batch, limit = tl.cast(row, tl.int64), tl.where(reads, N_Q, 0)
            sums = _read_by(sums, readers, batch, limit, keys, segment, counts, H, N_Q, variant)
    return sums


@triton.jit
def key_gradient_kernel(
    query,
    query_labels,
    grad,
    known_ptr,
    delta_ptr,
    segment,
    counts,
    grad_key_ptr,
    grad_value_ptr,
    grad_scale,
    B,
    H,
    N_Q,
    RAGGED: tl.constexpr,
    KEY_WIDTH,
    VALUE_WIDTH,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of BLOCK_M keys of one row and head against the queries of every batch row that reads it."""
    row, batch, head, keys, inside = open_tile(segment.N_K, H, BLOCK_M)
    HAS_KEY: tl.constexpr = grad_key_ptr is not None
    HAS_VALUE: tl.constexpr = grad_value_ptr is not None
    sums = _read_by_all(
        KeySums(zeros(BLOCK_M, KEY_WIDTH), zeros(BLOCK_M, VALUE_WIDTH)),
        Readers(query, grad, known_ptr, delta_ptr, query_labels),
        KeyPlace(batch, head, keys),
        segment,
        counts,
        B,
        H,
        N_Q,
        KeyVariant(RAGGED, HAS_KEY, HAS_VALUE, KEY_WIDTH, VALUE_WIDTH, BLOCK_N),
    )
    if HAS_KEY:
        pointers = grad_key_ptr + (row * segment.N_K + keys) * KEY_WIDTH.D
        store_parts(pointers, sums.key, inside, KEY_WIDTH, grad_scale)
    if HAS_VALUE:
        pointers = grad_value_ptr + (row * segment.N_K + keys) * VALUE_WIDTH.D
        store_parts(pointers, sums.value, inside, VALUE_WIDTH)
