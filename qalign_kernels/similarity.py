"""The most similar reference tokens of each query token, without the N×N scores."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _ambient, _backends, _contracts, _library
from .tiled import similarity as tiled

SIMILARITIES = ("cosine", "dot")
HEADS = ("joint", "per_head")


class Match(NamedTuple):
    """The best reference tokens of each query token.

    Attributes:
        index: int32, the reference token; -1 where no reference token is admissible.
        score: float32, the similarity to that token; -inf where `index` is -1.

    Both are [B, 1 or H, N_q] from `similarity_argmax` and [B, 1 or H, N_q, k] from `similarity_topk`.

    Example:
        >>> from qalign_kernels import similarity_argmax
        >>> query, reference = torch.randn(1, 8, 256, 40), torch.randn(1, 8, 64, 40)
        >>> index, score = similarity_argmax(query, reference)
        >>> index.shape
        torch.Size([1, 1, 256])
    """

    index: Tensor  # type: ignore[assignment]  # the field hides tuple.index
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
    """Find the most similar reference token of each query token.

    index_i = argmax_j S_ij,  score_i = max_j S_ij

    S_ij = q_i·r_j for "dot", and q_i·r_j / (max(|q_i|, 1e-12) max(|r_j|, 1e-12)) for "cosine".

    Args:
        query: [B, H, N_q, D], float16, bfloat16 or float32, any strides. The reference and tiled backends
            also take float64.
        reference: [B_r, H, N_k, D], same dtype and device as `query`. B_r = B unless `batch_index` is given.
        similarity: "cosine" or "dot".
        heads: "joint" compares the concatenated vectors of all heads and gives one map. "per_head" gives one
            map for each head.
        query_labels: int32 bit sets [B or 1, N_q]. A query token may match a reference token only if their
            sets share a bit. None: every pair is admissible.
        reference_labels: int32 bit sets [B or 1, N_k], given per row of `query` even with a `batch_index`.
            Required if and only if `query_labels` is given.
        batch_index: int32 [B], the row of `reference` that each query row reads, without a copy. None: its
            own row.
        exact: False allows a faster Triton kernel that packs the position into the seven low mantissa bits of
            the score. Finite scores closer than 2^-16 relative may then resolve to another index. It serves
            "per_head" without labels; all other calls and backends stay exact.
        backend: "auto", "triton", "tiled" or "reference". None: the default of `use_backend`.

    Returns:
        Match(index int32, score float32), both [B, 1, N_q] for "joint" and [B, H, N_q] for "per_head". The
        score is float64 for float64 input. Ties go to the lowest index. A query token without an admissible
        reference token has index -1 and score -inf. If one of its scores is NaN, its score is NaN and its
        index is any valid one.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: `backend` cannot run this call.

    Example:
        >>> from qalign_kernels import similarity_argmax
        >>> query, reference = torch.randn(2, 8, 256, 40), torch.randn(2, 8, 64, 40)
        >>> match = similarity_argmax(query, reference)
        >>> match.index.shape, match.score.shape
        (torch.Size([2, 1, 256]), torch.Size([2, 1, 256]))
        >>> similarity_argmax(reference, reference).index[0, 0, :4].tolist()
        [0, 1, 2, 3]

    Memory: O(N); the N_q×N_k scores are never stored. Deterministic. The index has no gradient. The gradient
    of the score is computed by PyTorch at the matched pairs.
    Source: Q-Align, arXiv 2508.21090 (query-query alignment); Eye-for-an-eye, arXiv 2406.07008 (cosine over
    all heads).
    """
    _check(query, reference, similarity, heads, query_labels, reference_labels, batch_index)
    if not isinstance(exact, bool):
        _contracts.fail("exact", "True or False", exact, error=TypeError)
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
    """Find the k most similar reference tokens of each query token, most similar first.

    index_i1, ..., index_ik are the tokens j with the k largest S_ij; S is as in `similarity_argmax`.

    Args:
        query: [B, H, N_q, D], float16, bfloat16 or float32, any strides. The reference and tiled backends
            also take float64.
        reference: [B_r, H, N_k, D], same dtype and device as `query`. B_r = B unless `batch_index` is given.
        k: number of reference tokens, 1 ≤ k ≤ N_k. The Triton kernel serves k ≤ 64.
        similarity: "cosine" or "dot".
        heads: "joint" for one map over all heads, "per_head" for one map for each head.
        query_labels: int32 bit sets [B or 1, N_q], as in `similarity_argmax`. None: every pair is admissible.
        reference_labels: int32 bit sets [B or 1, N_k]. Required if and only if `query_labels` is given.
        batch_index: int32 [B], the row of `reference` that each query row reads. None: its own row.
        backend: "auto", "triton", "tiled" or "reference". None: the default of `use_backend`.

    Returns:
        Match(index int32, score float32), both [B, 1 or H, N_q, k], in descending order of score. The score
        is float64 for float64 input. Ties go to the lowest index. If fewer than k reference tokens are
        admissible, the remaining entries have index -1 and score -inf.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: `backend` cannot run this call.

    Example:
        >>> from qalign_kernels import similarity_topk
        >>> query, reference = torch.randn(2, 8, 256, 40), torch.randn(2, 8, 64, 40)
        >>> similarity_topk(query, reference, 4).index.shape
        torch.Size([2, 1, 256, 4])
        >>> similarity_topk(query, reference, 4, heads="per_head").score.shape
        torch.Size([2, 8, 256, 4])

    Memory: O(N k). Deterministic. The index has no gradient. The gradient of the score is that
    of the matched pairs, summed in float32.
    Source: SeAl (CVPR 2026) and the top-k refinement of this library for Q-Align, arXiv 2508.21090.
    """
    _check(query, reference, similarity, heads, query_labels, reference_labels, batch_index)
    k = _contracts.count("k", k, "N_k", reference.shape[2])
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
    if not isinstance(settings[0], str):  # the k of similarity_topk
        settings = settings[1:]
    ctx.similarity, _, _, _, batch_index, *_ = settings
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
    "(Tensor query, Tensor reference, str similarity, bool joint, Tensor? query_labels, "
    "Tensor? reference_labels, Tensor? batch_index, bool exact, str backend) -> (Tensor, Tensor)",
    _argmax_implementation,
    _argmax_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_topk_op = _library.register(
    "similarity_topk",
    "(Tensor query, Tensor reference, SymInt k, str similarity, bool joint, Tensor? query_labels, "
    "Tensor? reference_labels, Tensor? batch_index, str backend) -> (Tensor, Tensor)",
    _topk_implementation,
    _topk_fake,
    setup_context=_setup_context,
    backward=_backward,
)
