"""The gradients of the keys and values of one segment. N_Q queries, N_K keys, D and D_V channels.

A program owns a tile of keys of one batch row and head, so that no sum needs atomics:

1. Load the keys, their values, counts and labels.
2. Walk over the queries of every batch row that reads these keys, in order, tile after tile.
3. For a tile of queries: mass_ij = m_j p_ij from the saved log2-sum-exp; the gradient of a value grows by
   Σ_i mass_ij dO_i, that of a key by Σ_i mass_ij (dO_i·v_j - delta_i) q_i.
4. Write both sums, that of the keys times the scale of the segment.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._gradient_rows import QuerySide
from ._labels import Labels
from ._launch import launch
from ._segments import segment_arguments, unsigned
from ._tile import (
    Parts,
    accumulate,
    load,
    load_parts,
    open_tile,
    rows_of,
    skip,
    split_scores,
    store_parts,
    width,
    zeros,
)


class Counts(NamedTuple):
    """How often each key counts, int32 [B, G, N_K]. One map serves all heads by a stride of 0."""

    pointer: Any
    stride_b: Any
    stride_g: Any
    stride_n: Any


class KeyPlace(NamedTuple):
    """The keys of a program: `tokens` of one batch row and head."""

    batch: Any
    head: Any
    tokens: Any


class HeldKeys(NamedTuple):
    """A tile of keys: keys, values, log2 of the counts, and label sets; 0 for what is absent."""

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
    """The constexpr settings of a kernel. RAGGED if the last tile of queries may be incomplete."""

    RAGGED: Any
    HAS_KEY: Any
    HAS_VALUE: Any
    KEY_WIDTH: Any
    VALUE_WIDTH: Any
    BLOCK_N: Any


def launch_key_gradient(
    queries: QuerySide, segment: Any, scale: float, grad_key: Tensor | None, grad_value: Tensor | None
) -> None:
    """Write the gradients of one segment that are not None. The tile's rows are keys, its columns queries."""
    (batch, heads, tokens, dim), (rows, _, keys, _) = queries.query.shape, segment.key.shape
    tile = queries.tile("keys" if segment.batch_index is None else "shared keys")
    arguments = segment_arguments(
        segment.key, segment.value, scale, segment.logit_shift, None, segment.labels, segment.batch_index
    )
    launch(
        key_gradient_kernel,
        (triton.cdiv(keys, tile.block_m) * rows * heads,),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **queries.arguments(),
        segment=unsigned(arguments),
        counts=count_arguments(segment.counts),
        grad_key_ptr=grad_key,
        grad_value_ptr=grad_value,
        grad_scale=scale,
        B=batch,
        RAGGED=tokens % tile.block_n != 0,
        KEY_WIDTH=width(dim),
        VALUE_WIDTH=width(queries.grad_output.shape[3]),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
    )


def count_arguments(counts: Tensor | None) -> Counts | None:
    """Counts as kernels read them."""
    if counts is None:
        return None
    batch, maps, token = counts.stride()
    return Counts(counts, batch, maps if counts.shape[1] > 1 else 0, token)


@triton.jit
def _key_gradient_tile(sums, start, limit, held, readers, segment, variant, COUNTED: tl.constexpr):
    """What the queries from `start` on add to the sums of a tile of keys. Scores are [keys, queries]."""
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
    """What all batch rows that read the keys add, in order. Without a batch index it is one row."""
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
