"""Which reference token each query token resembles most: similarity scores and their reduction, never the N×N matrix."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _ambient, _backends, _contracts, _library
from .tiled import similarity as tiled

SIMILARITIES = ("cosine", "dot")
HEADS = ("joint", "per_head")


class Match(NamedTuple):
    """The best reference tokens of each query token."""

    index: Tensor  # type: ignore[assignment]  # tuple.index gives way to the field
    score: Tensor


@_ambient.public
def similarity_argmax(
    query: Tensor,
    reference: Tensor,
    *,
    similarity: str = "cosine",
    heads: str = "joint",
    query_labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
    batch_index: Tensor | None = None,
    exact: bool = True,
    backend: str | None = None,
) -> Match:
    """The most similar reference token of each query token.

    index_i = argmax_j S_ij, score_i = max_j S_ij; S_ij = q_i·r_j ("dot") or q_i·r_j / (max(|q_i|, 1e-12) max(|r_j|, 1e-12)) ("cosine").
    "joint" takes one map for all heads, over the concatenated head vectors; "per_head" takes one map for each head.

    Args:
        query: [B, H, N_q, D], float16, bfloat16 or float32 (float64: reference and tiled), any strides.
        reference: [B_r, H, N_k, D], same dtype and device. B_r = B unless `batch_index` names rows.
        similarity: "cosine" or "dot".
        heads: "joint" or "per_head".
        query_labels, reference_labels: int32 bit sets [B or 1, N_q] and [B or 1, N_k], both or neither; a pair is admissible iff its
            sets meet. They are given per query row, whatever `batch_index` says.
        batch_index: int32 [B], the row of `reference` that each query row reads; no copies are made.
        exact: False lets the Triton kernel keep, for every two columns of a tile, the tile and the column in the seven low mantissa bits of the
            score: fewer instructions, but finite scores closer than 2^-16 relative may resolve to another index. It does so per head and without
            labels; other calls and other backends are always exact.
        backend: "auto", "triton", "tiled" or "reference"; None takes the default of `use_backend`.

    Returns:
        Match(index int32, score float32), both [B, 1 or H, N_q] (score float64 for float64 input). Ties go to the lowest index.
        Without an admissible reference token: index -1, score -inf. A NaN among a query token's scores gives score NaN and some index
        inside the range.

    Raises:
        TypeError, ValueError: a bad argument, named. RuntimeError: a `backend` that cannot run here.

    Memory: O(N). Deterministic. The index carries no gradient; the score does, by plain PyTorch at the matched pairs.
    Source: Q-Align, arXiv 2508.21090 (query-query alignment); cosine over all heads: Eye-for-an-eye, arXiv 2406.07008.
    """
    _check(query, reference, similarity, heads, query_labels, reference_labels, batch_index)
    joint, backend = heads == "joint", _backends.requested(backend)
    labels = (query_labels, reference_labels, batch_index)
    if backend == "reference":
        return Match(
            *_backends.implementation("reference", "similarity").similarity_argmax(
                query, reference, similarity, joint, *labels
            )
        )
    return Match(*_argmax_op(query, reference, similarity, joint, *labels, exact, backend))


@_ambient.public
def similarity_topk(
    query: Tensor,
    reference: Tensor,
    k: int,
    *,
    similarity: str = "cosine",
    heads: str = "joint",
    query_labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
    batch_index: Tensor | None = None,
    backend: str | None = None,
) -> Match:
    """The k most similar reference tokens of each query token, most similar first.

    As `similarity_argmax` (same scores, arguments, errors and gradient), with the k largest scores in place of the largest.

    Args:
        k: 1 ≤ k ≤ N_k; the Triton kernel serves k ≤ 64.

    Returns:
        Match(index int32, score float32), both [B, 1 or H, N_q, k], descending; ties go to the lowest index. Where fewer than k
        reference tokens are admissible the rest is index -1, score -inf.

    Memory: O(N k). Deterministic.
    Source: SeAl and the top-k reading of Q-Align, arXiv 2508.21090.
    """
    _check(query, reference, similarity, heads, query_labels, reference_labels, batch_index)
    _contracts.check_count("k", k, "N_k", reference.shape[2])
    joint, backend = heads == "joint", _backends.requested(backend)
    labels = (query_labels, reference_labels, batch_index)
    if backend == "reference":
        return Match(
            *_backends.implementation("reference", "similarity").similarity_topk(
                query, reference, k, similarity, joint, *labels
            )
        )
    return Match(*_topk_op(query, reference, k, similarity, joint, *labels, backend))


def _check(query, reference, similarity, heads, query_labels, reference_labels, batch_index) -> None:
    _contracts.check_features("query", query)
    _contracts.check_features("reference", reference)
    _contracts.check_like("reference", reference, "query", query)
    _contracts.check_sizes("reference", reference, heads=query.shape[1], head_dim=query.shape[3])
    _contracts.check_choice("similarity", similarity, SIMILARITIES)
    _contracts.check_choice("heads", heads, HEADS)
    _contracts.check_batch_index("batch_index", batch_index, query, reference.shape[0], "reference")
    _contracts.check_label_sets(
        query, reference, query_labels, "query_labels", reference_labels, "reference_labels"
    )


def _argmax_implementation(
    query, reference, similarity, joint, query_labels, reference_labels, batch_index, exact, backend
):
    chosen = _backends.select("similarity_argmax", backend, query, (query.shape[3],))
    module = _backends.implementation(chosen, "similarity")
    arguments = (query, reference, similarity, joint, query_labels, reference_labels, batch_index)
    return (
        module.similarity_argmax(*arguments, exact=exact)
        if chosen == "triton"
        else module.similarity_argmax(*arguments)
    )


def _topk_implementation(
    query, reference, k, similarity, joint, query_labels, reference_labels, batch_index, backend
):
    chosen = _backends.select("similarity_topk", backend, query, (query.shape[3],), max_k=k)
    module = _backends.implementation(chosen, "similarity")
    return module.similarity_topk(
        query, reference, k, similarity, joint, query_labels, reference_labels, batch_index
    )


def _empty_match(query: Tensor, joint: bool, *last: int) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], 1 if joint else query.shape[1], query.shape[2], *last)
    return query.new_empty(shape, dtype=torch.int32), query.new_empty(
        shape, dtype=_library.accumulate_dtype(query)
    )


def _argmax_fake(
    query, reference, similarity, joint, query_labels, reference_labels, batch_index, exact, backend
):
    return _empty_match(query, joint)


def _topk_fake(query, reference, k, similarity, joint, query_labels, reference_labels, batch_index, backend):
    return _empty_match(query, joint, k)


def _setup_context(ctx, inputs, output):
    query, reference, *settings = inputs
    names = ("k", "similarity", "joint") if isinstance(settings[0], int) else ("similarity", "joint")
    given = dict(zip(names, settings))
    batch_index = settings[len(names) + 2]
    ctx.similarity = given["similarity"]
    ctx.inputs = len(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, reference, output[0], batch_index)


def _backward(ctx, _, grad_score):
    query, reference, index, batch_index = ctx.saved_tensors
    rest = [None] * (ctx.inputs - 2)
    if grad_score is None:
        return None, None, *rest
    grads = _score_backward_op(grad_score, query, reference, index, ctx.similarity, batch_index)
    return *(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad)), *rest


_score_backward_op = _library.register(
    "matched_score_backward",
    "(Tensor grad_score, Tensor query, Tensor reference, Tensor index, str similarity, Tensor? batch_index) "
    "-> (Tensor, Tensor)",
    tiled.matched_score_backward,
    lambda grad_score, query, reference, index, similarity, batch_index: (
        query.new_empty(query.shape),
        reference.new_empty(reference.shape),
    ),
    **_library.no_second_derivative("similarity", "only backend='reference' has every derivative"),
)
_argmax_op = _library.register(
    "similarity_argmax",
    "(Tensor query, Tensor reference, str similarity, bool joint, Tensor? query_labels, Tensor? reference_labels, "
    "Tensor? batch_index, bool exact, str backend) -> (Tensor, Tensor)",
    _argmax_implementation,
    _argmax_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_topk_op = _library.register(
    "similarity_topk",
    "(Tensor query, Tensor reference, SymInt k, str similarity, bool joint, Tensor? query_labels, Tensor? reference_labels, "
    "Tensor? batch_index, str backend) -> (Tensor, Tensor)",
    _topk_implementation,
    _topk_fake,
    setup_context=_setup_context,
    backward=_backward,
)
