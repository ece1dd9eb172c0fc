"""rearranged_attention and topk_attention on Triton.

B batch rows, G maps (1 or H), H heads, N_Q and N_K tokens, D and D_V channels, K candidates of a query.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import choose_tile, split_head_dim
from ._labels import sort_queries
from ._launch import launch, target_of
from ._segments import segment_arguments
from ._tile import advance, load_rows
from .attention import launch_attention, log2_sum_exp
from .rearrange import compact
from .similarity import counted_argmax

LOG2_E = tl.constexpr(1.4426950408889634)


def rearranged_attention(
    query, asking, ref_query, ref_key, ref_value, similarity, joint, *, scale, contrast, query_labels=None, ref_labels=None, batch_index=None
) -> Tensor:
    """Norms, argmax with its counts, compaction, attention: four launches, one more with a contrast, two where labels are sorted."""
    match, counts = counted_argmax(asking, ref_query, similarity, joint, query_labels, ref_labels, batch_index)
    query_order = sort_queries(query_labels, [ref_labels])
    settings = {"multiplicity": compact(counts), "labels": ref_labels, "batch_index": batch_index, "by_label": query_order is not None}
    segments = [segment_arguments(ref_key, ref_value, scale, **settings)]
    output = torch.empty((*query.shape[:3], ref_value.shape[3]), device=query.device, dtype=query.dtype)
    asked = {"query_labels": query_labels, "query_order": query_order}
    known = None if contrast == 1.0 else log2_sum_exp(query, segments, **asked)
    launch_attention(query, segments, output=output, lse=None, contrast=contrast, known=known, match=match, **asked)
    return output


def topk_attention(query, key, value, index, *, scale, contrast, batch_index=None) -> Tensor:
    (batch, heads, tokens, dim), value_dim = query.shape, value.shape[3]
    output = torch.empty((batch, heads, tokens, value_dim), device=query.device, dtype=query.dtype)
    mode = "softmax" if contrast == 1.0 else "contrast"
    tile = choose_tile("topk_attention", mode, target_of(query.device), max(dim, value_dim), query.dtype, tokens)
    (main, tail), (value_main, value_tail) = split_head_dim(dim), split_head_dim(value_dim)
    launch(
        _topk_attention_kernel, (batch * heads * triton.cdiv(tokens, tile.block_m),), num_warps=tile.num_warps, num_stages=tile.num_stages,
        query_ptr=query, key_ptr=key, value_ptr=value, index_ptr=index, rows_ptr=batch_index, output_ptr=output,
        **{
            f"{name}_pitch_{axis}": x.stride(i) * x.element_size()
            for name, x in (("query", query), ("key", key), ("value", value))
            for i, axis in enumerate("bhn")
        },
        query_stride_d=query.stride(3), key_stride_d=key.stride(3), value_stride_d=value.stride(3), index_stride_b=index.stride(0),
        index_stride_g=index.stride(1) if index.shape[1] > 1 else 0, index_stride_n=index.stride(2), index_stride_k=index.stride(3),
        rows_stride=0 if batch_index is None else batch_index.stride(0), scale=scale * LOG2_E.value, contrast=contrast, H=heads, N_Q=tokens,
        N_K=key.shape[2], K=index.shape[3], D=dim, MAIN=main, TAIL=tail, D_V=value_dim, VALUE_MAIN=value_main, VALUE_TAIL=value_tail,
        CONTRAST=contrast != 1.0, BLOCK_M=tile.block_m,
    )  # fmt: skip
    return output


@triton.jit
def _gathered_logits(
    query_main, query_tail, key_ptr, index_ptrs, inside, key_pitch_n, key_stride_d, scale, N_K, D: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Base-2 logits [BLOCK_M] against one candidate of each query, -inf where there is none; with the candidates' rows and presence."""
    rows = tl.load(index_ptrs, mask=inside, other=-1).to(tl.int64)
    present = (rows >= 0) & (rows < N_K)
    logits = tl.sum(query_main * load_rows(key_ptr, rows, present, key_pitch_n, key_stride_d, D, 0, MAIN, True).to(tl.float32), 1)
    if TAIL > 0:
        logits += tl.sum(query_tail * load_rows(key_ptr, rows, present, key_pitch_n, key_stride_d, D, MAIN, TAIL, True).to(tl.float32), 1)
    return tl.where(present, logits * scale, float("-inf")), rows, present


@triton.jit
def _topk_attention_kernel(
    query_ptr, key_ptr, value_ptr, index_ptr, rows_ptr, output_ptr, query_pitch_b, query_pitch_h, query_pitch_n, key_pitch_b, key_pitch_h,
    key_pitch_n, value_pitch_b, value_pitch_h, value_pitch_n, query_stride_d, key_stride_d, value_stride_d, index_stride_b, index_stride_g,
    index_stride_n, index_stride_k, rows_stride, scale, contrast, H, N_Q, N_K, K, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    D_V: tl.constexpr, VALUE_MAIN: tl.constexpr, VALUE_TAIL: tl.constexpr, CONTRAST: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(N_Q, BLOCK_M)
    row = (tl.program_id(0) // row_tiles).to(tl.int64)
    batch, head = row // H, row % H
    tokens = (tl.program_id(0) % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, query_rows = tokens < N_Q, tokens.to(tl.int64)
    reference_batch = batch
    if rows_ptr is not None:
        reference_batch = tl.load(rows_ptr + batch * rows_stride).to(tl.int64)
    query_ptr = advance(query_ptr, batch * query_pitch_b + head * query_pitch_h)
    key_ptr = advance(key_ptr, reference_batch * key_pitch_b + head * key_pitch_h)
    value_ptr = advance(value_ptr, reference_batch * value_pitch_b + head * value_pitch_h)
    index_ptrs = index_ptr + batch * index_stride_b + head * index_stride_g + query_rows * index_stride_n
    query_main = load_rows(query_ptr, query_rows, inside, query_pitch_n, query_stride_d, D, 0, MAIN, True).to(tl.float32)
    query_tail = query_main
    if TAIL > 0:
        query_tail = load_rows(query_ptr, query_rows, inside, query_pitch_n, query_stride_d, D, MAIN, TAIL, True).to(tl.float32)

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    out_main = tl.zeros([BLOCK_M, VALUE_MAIN], tl.float32)
    out_tail = tl.zeros([BLOCK_M, VALUE_TAIL if VALUE_TAIL > 0 else 16], tl.float32)
    if CONTRAST:
        candidate_ptrs = index_ptrs
        for _ in range(K):
            logits, rows, present = _gathered_logits(
                query_main, query_tail, key_ptr, candidate_ptrs, inside, key_pitch_n, key_stride_d, scale, N_K, D, MAIN, TAIL
            )
            new_max = tl.maximum(running_max, logits)
            stabiliser = tl.where(new_max == float("-inf"), 0.0, new_max)
            running_sum = running_sum * tl.exp2(running_max - stabiliser) + tl.exp2(logits - stabiliser)
            running_max = new_max
            candidate_ptrs += index_stride_k
        running_sum = tl.where(running_sum == 0.0, 1.0, running_sum)
    for _ in range(K):
        logits, rows, present = _gathered_logits(
            query_main, query_tail, key_ptr, index_ptrs, inside, key_pitch_n, key_stride_d, scale, N_K, D, MAIN, TAIL
        )
        new_max = running_max if CONTRAST else tl.maximum(running_max, logits)
        stabiliser = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(logits - stabiliser)
        if CONTRAST:
            probabilities = weights / running_sum
            weights = tl.clamp(contrast * (probabilities - 1.0 / K) + 1.0 / K, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
            weights = tl.where(logits == float("-inf"), 0.0, weights)
        else:
            rescale = tl.exp2(running_max - stabiliser)
            running_sum = running_sum * rescale + weights
            out_main *= rescale[:, None]
            out_tail *= rescale[:, None]
            running_max = new_max
        out_main += weights[:, None] * load_rows(value_ptr, rows, present, value_pitch_n, value_stride_d, D_V, 0, VALUE_MAIN, True).to(tl.float32)
        if VALUE_TAIL > 0:
            tile = load_rows(value_ptr, rows, present, value_pitch_n, value_stride_d, D_V, VALUE_MAIN, VALUE_TAIL, True)
            out_tail += weights[:, None] * tile.to(tl.float32)
        index_ptrs += index_stride_k

    if not CONTRAST:
        norm = 1.0 / tl.where(running_sum == 0.0, 1.0, running_sum)
        out_main *= norm[:, None]
        out_tail *= norm[:, None]
    output_ptrs = output_ptr + (row * N_Q + query_rows)[:, None] * D_V
    channels = tl.arange(0, VALUE_MAIN)[None, :]
    tl.store(output_ptrs + channels, out_main.to(output_ptr.dtype.element_ty), mask=inside[:, None] & (channels < D_V))
    if VALUE_TAIL > 0:
        channels = VALUE_MAIN + tl.arange(0, VALUE_TAIL)[None, :]
        tl.store(output_ptrs + channels, out_tail.to(output_ptr.dtype.element_ty), mask=inside[:, None] & (channels < D_V))
