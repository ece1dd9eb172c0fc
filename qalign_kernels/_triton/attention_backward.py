"""The gradient of attention on Triton. B batch rows, H heads, N_Q queries, N_K keys of a segment, D and D_V channels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import FAMILIES, Tile, choose_tile, nearest_architecture
from ._launch import launch, target_of
from ._segments import (
    TINY,
    load_query_labels,
    open_segment,
    pitch_arguments,
    query_arguments,
    score_tile,
    segment_arguments,
    walk_arguments,
    width_arguments,
)
from ._tile import advance, load, load_parts, load_rows, open_tile, split_scores, store_channels
from .rearrange import compact

GRADIENT_ROWS = 32


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


def _gradient_rows(grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """log2 of the sums of the exponentials, inf for a query without keys, and dO·O - dlse, float32 [B, H, N_Q]."""
    batch, heads, tokens, value_dim = output.shape
    known, delta = (torch.empty((batch, heads, tokens), device=output.device, dtype=torch.float32) for _ in range(2))
    grad_lse_strides, width = (0, 0, 0) if grad_lse is None else grad_lse.stride(), triton.next_power_of_2(value_dim)
    launch(
        gradient_rows_kernel, (batch * heads * triton.cdiv(tokens, GRADIENT_ROWS),), num_warps=max(4, width // 32), num_stages=1,
        grad_ptr=grad_output, grad_lse_ptr=grad_lse, output_ptr=output, lse_ptr=lse, known_ptr=known, delta_ptr=delta, H=heads, N_Q=tokens,
        **pitch_arguments("grad", grad_output), **dict(zip(("grad_lse_stride_b", "grad_lse_stride_h", "grad_lse_stride_n"), grad_lse_strides)),
        D_V=value_dim, WIDTH=width, BLOCK=GRADIENT_ROWS,
    )  # fmt: skip
    return known, delta


def _launch_query_gradient(query, grad_output, known, delta, query_labels, segments, scales, grad_query) -> None:
    batch, heads, tokens, _ = query.shape
    tile, dims = _gradient_tile("queries", query, grad_output)
    launch(
        query_gradient_kernel, (triton.cdiv(tokens, tile.block_m) * batch * heads,), num_warps=tile.num_warps, num_stages=tile.num_stages,
        grad_ptr=grad_output, known_ptr=known, delta_ptr=delta, grad_query_ptr=grad_query, scales=tuple(scales),
        **query_arguments(query, query_labels), **pitch_arguments("grad", grad_output), **walk_arguments(segments, tile.block_n), **dims,
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
        grad_ptr=grad_output, known_ptr=known, delta_ptr=delta, counts_ptr=counts, grad_key_ptr=grad_key, grad_value_ptr=grad_value,
        segment=arguments._replace(scale=max(abs(arguments.scale), TINY)), grad_scale=scale, **query_arguments(query, query_labels),
        **pitch_arguments("grad", grad_output), **dict(zip(("counts_stride_b", "counts_stride_h", "counts_stride_n"), counts_strides)), B=batch,
        NEGATIVE=scale < 0, RAGGED=tokens % tile.block_n != 0, **dims, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
    )  # fmt: skip


def _takes_two_launches(query: Tensor, grad_output: Tensor) -> bool:
    """Whether the gradients of keys and of values are summed one after the other: together they would spill registers there."""
    wide = max(query.shape[3], grad_output.shape[3]) > 128
    target = target_of(query.device)
    return wide and target != "interpreter" and FAMILIES[nearest_architecture(target)] == "ampere"


def _gradient_tile(mode: str, query: Tensor, grad_output: Tensor) -> tuple[Tile, dict[str, int]]:
    dim, value_dim = query.shape[3], grad_output.shape[3]
    tile = choose_tile("attention_backward", mode, target_of(query.device), max(dim, value_dim), query.dtype, query.shape[2])
    return tile, width_arguments(dim, value_dim)


@triton.jit
def gradient_rows_kernel(
    grad_ptr, grad_lse_ptr, output_ptr, lse_ptr, known_ptr, delta_ptr, grad_pitch_b, grad_pitch_h, grad_pitch_n, grad_stride_d, grad_lse_stride_b,
    grad_lse_stride_h, grad_lse_stride_n, H, N_Q, D_V: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, batch, head, queries, inside = open_tile(N_Q, H, BLOCK)
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
    columns = start + tl.arange(0, BLOCK_N)
    scores, factor, seen, rows, present, key_ptr, key_pitch_n, value_ptr, value_pitch_n = score_tile(
        start, columns, columns < limit, query, segment, pointers, 0.0, KEY_PITCH, VALUE_PITCH, 0, MASKED, segment.labels_ptr is not None, D, D_MAIN,
        D_TAIL, BLOCK_N,
    )  # fmt: skip
    mass = tl.math.exp2(tl.fma(scores, factor, (segment.shift - known)[:, None]))
    if segment.weights_ptr is not None:
        mass *= load(pointers[5] + columns, present, MASKED)[None, :]
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
    row, batch, head, queries, inside = open_tile(N_Q, H, BLOCK_M)
    query_main, query_tail = load_parts(
        query_ptr, batch, head, queries, inside, query_pitch_b, query_pitch_h, query_pitch_n, query_stride_d, D, D_MAIN, D_TAIL
    )  # fmt: skip
    grad = load_parts(grad_ptr, batch, head, queries, inside, grad_pitch_b, grad_pitch_h, grad_pitch_n, grad_stride_d, D_V, V_MAIN, V_TAIL)
    query_labels = load_query_labels(query_labels_ptr, batch, queries, inside, query_labels_stride_b, query_labels_stride_n)
    known = tl.load(known_ptr + row * N_Q + queries, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + row * N_Q + queries, mask=inside, other=0.0)
    query = (query_main, query_tail, query_main, query_tail, query_labels)
    opposite = (-query_main, -query_tail, query_main, query_tail, query_labels)
    acc_main = tl.zeros((BLOCK_M, D_MAIN), tl.float32)
    acc_tail = tl.zeros((BLOCK_M, D_TAIL if D_TAIL > 0 else 1), tl.float32)
    for s in tl.static_range(SEGMENTS):
        pointers, limit, _ = open_segment(segments[s], batch, head, True)
        asked = opposite if NEGATIVE[s] else query
        scale = 1.0 if SEGMENTS == 1 else scales[s]  # of a single segment: once, in the end
        for start in tl.range(0, limit, BLOCK_N):
            acc_main, acc_tail = _query_gradient_tile(
                (acc_main, acc_tail), start, limit, asked, grad, segments[s], pointers, known, delta, scale, PITCHES[3 * s], PITCHES[3 * s + 1],
                RAGGED[s], D, D_MAIN, D_TAIL, D_V, V_MAIN, V_TAIL, BLOCK_N,
            )  # fmt: skip
    scale = scales[0] if SEGMENTS == 1 else 1.0
    output_ptrs = grad_query_ptr + (row * N_Q + queries) * D
    store_channels(output_ptrs, acc_main * scale, inside, D, 0, D_MAIN)
    if D_TAIL > 0:
        store_channels(output_ptrs, acc_tail * scale, inside, D, D_MAIN, D_TAIL)


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
        query_labels = load(query_labels_ptr + (first + rows) * query_labels_stride_n, inside, MASKED)
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
        delta = load(delta_ptr + first + rows, inside, MASKED)
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
    key = load_parts(
        segment.key_ptr, key_row, head, keys, present, segment.key_pitch_b, segment.key_pitch_h, segment.key_pitch_n, segment.key_stride_d, D,
        D_MAIN, D_TAIL,
    )  # fmt: skip
    if NEGATIVE:
        key = (-key[0], -key[1])
    value = key
    if HAS_KEY:
        value = load_parts(
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
    row, key_row, head, keys, inside = open_tile(segment.N_K, H, BLOCK_M)
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
    if HAS_KEY:
        output_ptrs = grad_key_ptr + (row * segment.N_K + keys) * D
        store_channels(output_ptrs, key_main * grad_scale, inside, D, 0, D_MAIN)
        if D_TAIL > 0:
            store_channels(output_ptrs, key_tail * grad_scale, inside, D, D_MAIN, D_TAIL)
    if HAS_VALUE:
        output_ptrs = grad_value_ptr + (row * segment.N_K + keys) * D_V
        store_channels(output_ptrs, value_main, inside, D_V, 0, V_MAIN)
        if V_TAIL > 0:
            store_channels(output_ptrs, value_tail, inside, D_V, V_MAIN, V_TAIL)
