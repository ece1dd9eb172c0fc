"""rearranged_attention, unit_features and topk_attention on Triton.

B batch rows, G maps (1 or H), H heads, N_Q and N_K tokens, D and D_V channels, K candidates of a query.

- `rearranged_attention` never moves keys to their queries. Softmax over rearranged keys is softmax over the
  distinct matched keys, each weighted by how many queries it matches: argmax with counts, then attention with
  counts.
- `unit_features` divides every token of every head by its norm.
- `topk_attention` is a softmax over K gathered keys of each query.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_choice import AttentionCall
from ._configs import choose_tile
from ._labels import sort_queries
from ._launch import launch, target_of
from ._mend import Given, mend_output
from ._segments import LOG2_E, segment_arguments
from ._tile import (
    Parts,
    features,
    load_parts,
    load_rows,
    rows_of,
    scale_rows,
    store_channels,
    store_parts,
    width,
    zeros,
)
from .attention import launch_attention, log2_sum_exp
from .similarity import counted_argmax

UNIT_VALUES = 4096  # values that a program normalises, 32 a thread


class Candidate(NamedTuple):
    """One candidate of each query: its base-2 logit, -inf for no candidate, and its int64 token."""

    logits: Any
    tokens: Any
    present: Any


def rearranged_attention(
    query,
    alignment_query,
    ref_query,
    ref_key,
    ref_value,
    similarity,
    joint,
    *,
    scale,
    contrast,
    query_labels=None,
    ref_labels=None,
    batch_index=None,
) -> Tensor:
    """Norms, argmax with its counts, gathering and attention, in four launches.

    A contrast costs one more launch, labels cost one more, sorted labels two more.
    """
    match, counts = counted_argmax(
        alignment_query, ref_query, similarity, joint, query_labels, ref_labels, batch_index
    )
    query_order = sort_queries(query_labels, [ref_labels])
    segment = segment_arguments(
        ref_key,
        ref_value,
        scale,
        counts=counts,
        labels=ref_labels,
        batch_index=batch_index,
        by_label=query_order is not None,
    )
    output = torch.empty((*query.shape[:3], ref_value.shape[3]), device=query.device, dtype=query.dtype)
    labels: dict[str, Any] = {"query_labels": query_labels, "query_order": query_order}
    known = None if contrast == 1.0 else log2_sum_exp(query, [segment], **labels)
    call = AttentionCall(query, [segment], output, contrast=contrast, known=known, match=match, **labels)
    launch_attention(call)
    if ref_labels is not None:
        given = Given(ref_key, ref_value, counts, ref_labels, batch_index)
        mend_output(call, [given], [scale])
    return output


def unit_features(query: Tensor, ref_query: Tensor) -> tuple[Tensor, Tensor]:
    """x / max(|x|, 1e-12) for each token and head of both tensors [B, H, N, D]; contiguous, in one launch."""
    heads, dim = query.shape[1], query.shape[3]
    channels = triton.next_power_of_2(dim)
    block = UNIT_VALUES // channels
    query_programs, reference_programs = (
        x.shape[0] * heads * triton.cdiv(x.shape[2], block) for x in (query, ref_query)
    )
    units = query.new_empty(query.shape), ref_query.new_empty(ref_query.shape)
    launch(
        _unit_features_kernel,
        (query_programs + reference_programs,),
        num_warps=4,
        num_stages=1,
        query=features(query),
        reference=features(ref_query),
        query_unit_ptr=units[0],
        reference_unit_ptr=units[1],
        QUERY_PROGRAMS=query_programs,
        H=heads,
        N_Q=query.shape[2],
        N_K=ref_query.shape[2],
        D=dim,
        WIDTH=channels,
        BLOCK=block,
    )
    return units


def topk_attention(query, key, value, index, *, scale, contrast, batch_index=None) -> Tensor:
    (batch, heads, tokens, dim), value_dim = query.shape, value.shape[3]
    output = torch.empty((batch, heads, tokens, value_dim), device=query.device, dtype=query.dtype)
    mode = "softmax" if contrast == 1.0 else "contrast"
    tile = choose_tile(
        "topk_attention", mode, target_of(query.device), max(dim, value_dim), query.dtype, tokens
    )
    stride_b, stride_g, stride_n, stride_k = index.stride()
    launch(
        _topk_attention_kernel,
        (batch * heads * triton.cdiv(tokens, tile.block_m),),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        query=features(query),
        key=features(key),
        value=features(value),
        rows_ptr=batch_index,
        rows_stride=0 if batch_index is None else batch_index.stride(0),
        index_ptr=index,
        index_strides=(stride_b, stride_g if index.shape[1] > 1 else 0, stride_n, stride_k),
        output_ptr=output,
        scale=scale * LOG2_E.value,
        contrast=contrast,
        H=heads,
        N_Q=tokens,
        N_K=key.shape[2],
        K=index.shape[3],
        KEY_WIDTH=width(dim),
        VALUE_WIDTH=width(value_dim),
        CONTRAST=contrast != 1.0,
        BLOCK_M=tile.block_m,
    )
    return output


@triton.jit
def _store_units(source, unit_ptr, program, H, N, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Normalise a block of tokens of one batch row and head."""
    blocks = tl.cdiv(N, BLOCK)
    row = program // blocks
    tokens = ((program % blocks) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    rows = rows_of(source, (row // H).to(tl.int64), (row % H).to(tl.int64))
    tile = load_rows(rows, tokens, tokens < N, D, 0, WIDTH, True).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(tile * tile, 1))
    norm = tl.maximum(norm, 1e-12, propagate_nan=tl.PropagateNan.ALL)
    pointers = unit_ptr + (row.to(tl.int64) * N + tokens) * D
    store_channels(pointers, tile * (1.0 / norm)[:, None], tokens < N, D, 0, WIDTH)


@triton.jit
def _unit_features_kernel(
    query,
    reference,
    query_unit_ptr,
    reference_unit_ptr,
    QUERY_PROGRAMS,
    H,
    N_Q,
    N_K,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of tokens of the queries or of the reference. The programs of the queries come first."""
    program = tl.program_id(0)
    if program < QUERY_PROGRAMS:
        _store_units(query, query_unit_ptr, program, H, N_Q, D, WIDTH, BLOCK)
    else:
        _store_units(reference, reference_unit_ptr, program - QUERY_PROGRAMS, H, N_K, D, WIDTH, BLOCK)


@triton.jit
def _load_floats(rows, tokens, present, width):
    """Both parts of a tile of rows in float32."""
    parts = load_parts(rows, tokens, present, width, True)
    return Parts(parts.main.to(tl.float32), parts.tail.to(tl.float32))


@triton.jit
def _meet_candidate(query, key, index_ptrs, inside, scale, N_K, width):
    """The logit of each query and of the candidate at its pointer."""
    tokens = tl.load(index_ptrs, mask=inside, other=-1).to(tl.int64)
    present = (tokens >= 0) & (tokens < N_K)
    main = load_rows(key, tokens, present, width.D, 0, width.MAIN, True)
    logits = tl.sum(query.main * main.to(tl.float32), 1)
    if width.TAIL > 0:
        tail = load_rows(key, tokens, present, width.D, width.MAIN, width.TAIL, True)
        logits += tl.sum(query.tail * tail.to(tl.float32), 1)
    return Candidate(tl.where(present, logits * scale, float("-inf")), tokens, present)


@triton.jit
def _topk_attention_kernel(
    query,
    key,
    value,
    rows_ptr,
    rows_stride,
    index_ptr,
    index_strides,
    output_ptr,
    scale,
    contrast,
    H,
    N_Q,
    N_K,
    K,
    KEY_WIDTH,
    VALUE_WIDTH,
    CONTRAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A tile of queries against its candidates, one after the other.

    1. With a contrast, a first walk gives the sum of the weights.
    2. Each candidate's weight comes from the running maximum, or from the contrast of its probability.
    3. Its value is added with this weight.

    Both walks stand in one function because they share the running maximum and the running sum.
    """
    row_tiles = tl.cdiv(N_Q, BLOCK_M)
    row = (tl.program_id(0) // row_tiles).to(tl.int64)
    batch, head = row // H, row % H
    own = (tl.program_id(0) % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, queries = own < N_Q, own.to(tl.int64)
    reference_batch = batch
    if rows_ptr is not None:
        reference_batch = tl.load(rows_ptr + batch * rows_stride).to(tl.int64)
    query_rows = rows_of(query, batch, head)
    keys, values = rows_of(key, reference_batch, head), rows_of(value, reference_batch, head)
    index_ptrs = index_ptr + batch * index_strides[0] + head * index_strides[1] + queries * index_strides[2]
    tile = _load_floats(query_rows, queries, inside, KEY_WIDTH)

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    output = zeros(BLOCK_M, VALUE_WIDTH)
    if CONTRAST:
        candidate_ptrs = index_ptrs
        for _ in range(K):
            candidate = _meet_candidate(tile, keys, candidate_ptrs, inside, scale, N_K, KEY_WIDTH)
            new_max = tl.maximum(running_max, candidate.logits)
            stabiliser = tl.where(new_max == float("-inf"), 0.0, new_max)
            rescaled = running_sum * tl.exp2(running_max - stabiliser)
            running_sum = rescaled + tl.exp2(candidate.logits - stabiliser)
            running_max = new_max
            candidate_ptrs += index_strides[3]
        running_sum = tl.where(running_sum == 0.0, 1.0, running_sum)
    for _ in range(K):
        candidate = _meet_candidate(tile, keys, index_ptrs, inside, scale, N_K, KEY_WIDTH)
        new_max = running_max if CONTRAST else tl.maximum(running_max, candidate.logits)
        stabiliser = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(candidate.logits - stabiliser)
        if CONTRAST:
            contrasted = contrast * (weights / running_sum - 1.0 / K) + 1.0 / K
            weights = tl.clamp(contrasted, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
            weights = tl.where(candidate.logits == float("-inf"), 0.0, weights)
        else:
            rescale = tl.exp2(running_max - stabiliser)
            running_sum = running_sum * rescale + weights
            output = scale_rows(output, rescale, VALUE_WIDTH)
            running_max = new_max
        output = _add_candidate(output, weights, values, candidate, VALUE_WIDTH)
        index_ptrs += index_strides[3]

    if not CONTRAST:
        norm = 1.0 / tl.where(running_sum == 0.0, 1.0, running_sum)
        output = scale_rows(output, norm, VALUE_WIDTH)
    store_parts(output_ptr + (row * N_Q + queries) * VALUE_WIDTH.D, output, inside, VALUE_WIDTH)


@triton.jit
def _add_candidate(output, weights, values, candidate, width):
    """output + weight · value of the candidate of each query."""
    loaded = load_rows(values, candidate.tokens, candidate.present, width.D, 0, width.MAIN, True)
    main, tail = output.main + weights[:, None] * loaded.to(tl.float32), output.tail
    if width.TAIL > 0:
        loaded = load_rows(values, candidate.tokens, candidate.present, width.D, width.MAIN, width.TAIL, True)
        tail += weights[:, None] * loaded.to(tl.float32)
    return Parts(main, tail)
