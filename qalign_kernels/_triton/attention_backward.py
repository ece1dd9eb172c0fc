"""The gradient of attention on Triton. B batch rows, H heads, N_Q queries, N_K keys, D and D_V channels.

1. `_gradient_rows.py` writes log2-sum-exp and delta of each query.
2. `query_gradient_kernel`, below: a program owns a tile of queries, walks over the keys of all segments, and
   sums dq_i = Σ_j scale_s mass_ij (dO_i·v_j - delta_i) k_j.
3. `_key_gradient.py`: a program owns a tile of keys and walks over the queries that read them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import FAMILIES, nearest_architecture
from ._gradient_rows import QuerySide, query_side
from ._key_gradient import launch_key_gradient
from ._launch import launch, target_of
from ._mend import mend_key_gradient, mend_query_gradient
from ._segments import (
    KeyTile,
    QueryTile,
    load_query_labels,
    open_segment,
    opposite,
    score_tile,
    segment_arguments,
    walked,
)
from ._tile import (
    Parts,
    accumulate,
    load,
    load_parts,
    open_tile,
    rows_of,
    split_scores,
    store_parts,
    width,
    zeros,
)


class QueryGradients(NamedTuple):
    """A tile of queries: the gradient of its output, its log2-sum-exp and its delta, fp32."""

    output: Parts
    known: Any
    delta: Any


def attention_backward(
    grad_output, grad_lse, output, lse, query, segments, *, scale, contrast, query_labels, guide, needs
) -> list[Tensor | None]:
    """The gradients of query, keys and values that are needed.

    With mass_ij = m_j p_ij from the saved log-sum-exp and delta_i = dO_i·O_i - dlse_i:
    dl_ij = mass_ij (dO_i·v_j - delta_i), dq_i = Σ_j scale_s dl_ij k_j, dk_j = Σ_i scale_s dl_ij q_i,
    dv_j = Σ_i mass_ij dO_i.

    There is one launch for log-sum-exp and delta, one for the query, and one or two for each segment. A
    program owns its keys and sums over all queries that read them, batch row after batch row, without
    atomics: the result is deterministic. Contrast and guide are not served.
    """
    queries = query_side(query, query_labels, grad_output, grad_lse, output, lse)
    scales, count = [s.logit_scale * scale for s in segments], len(segments)
    grads: list[Tensor | None] = [None] * (1 + 2 * count)
    if needs[0]:
        grads[0] = _query_gradient(queries, segments, scales)
        if any(s.labels is not None for s in segments):
            mend_query_gradient(queries, segments, scales, grads[0])
    for i, (segment, segment_scale) in enumerate(zip(segments, scales)):
        for position, x in ((1 + i, segment.key), (1 + count + i, segment.value)):
            if needs[position]:
                grads[position] = torch.empty(x.shape, device=x.device, dtype=x.dtype)
        wanted = [(grads[1 + i], grads[1 + count + i])]
        if _takes_two_launches(queries):
            wanted = [(grads[1 + i], None), (None, grads[1 + count + i])]
        for grad_key, grad_value in wanted:
            if grad_key is not None or grad_value is not None:
                launch_key_gradient(queries, segment, segment_scale, grad_key, grad_value)
        grad_key, grad_value = grads[1 + i], grads[1 + count + i]
        hidden = segment.labels is not None or segment.counts is not None
        if hidden and (grad_key is not None or grad_value is not None):
            mend_key_gradient(queries, segment, segment_scale, grad_key, grad_value)
    return grads


def _query_gradient(queries: QuerySide, segments: Sequence[Any], scales: list[float]) -> Tensor:
    (batch, heads, tokens, dim), tile = queries.query.shape, queries.tile("queries")
    grad_query = torch.empty(queries.query.shape, device=queries.query.device, dtype=queries.query.dtype)
    arguments = [
        segment_arguments(s.key, s.value, scale, s.logit_shift, s.counts, s.labels, s.batch_index)
        for s, scale in zip(segments, scales)
    ]
    launch(
        query_gradient_kernel,
        (triton.cdiv(tokens, tile.block_m) * batch * heads,),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **queries.arguments(),
        segments=walked(arguments, tile.block_n),
        scales=tuple(scales),
        SEGMENTS=len(segments),
        grad_query_ptr=grad_query,
        KEY_WIDTH=width(dim),
        VALUE_WIDTH=width(queries.grad_output.shape[3]),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
    )
    return grad_query


def _takes_two_launches(queries: QuerySide) -> bool:
    """Whether keys and values get a launch each: together, wide heads would spill registers on Ampere."""
    wide, target = queries.head_dim() > 128, target_of(queries.query.device)
    return wide and target != "interpreter" and FAMILIES[nearest_architecture(target)] == "ampere"


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
        scale = 1.0 if SEGMENTS == 1 else scales[s]  # a single segment is scaled once, at the end
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
