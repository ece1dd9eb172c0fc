"""Q-Align in one call: align queries, rearrange keys and values, attend."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ambient, _backends, _contracts, _library
from ._choices import REFINEMENTS
from .attention import attention, guided_attention
from .rearrange import match_counts, take_batch_rows, take_rows
from .segments import Guide, Segment
from .similarity import HEADS, SIMILARITIES, similarity_argmax, similarity_topk
from .topk_attention import topk_attention
from .unit_features import alignment


@_ambient.public
def qalign_attention(
    query: Tensor,
    ref_query: Tensor,
    ref_key: Tensor,
    ref_value: Tensor,
    *,
    similarity: str = "cosine",
    heads: str = "joint",
    refinement: str = "rearranged",
    match_query: Tensor | None = None,
    own_key: Tensor | None = None,
    topk: int = 8,
    strength: float = 20.0,
    scale: float | None = None,
    contrast: float = 1.0,
    query_labels: Tensor | None = None,
    ref_labels: Tensor | None = None,
    batch_index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend to a reference image whose keys and values are aligned by query-query similarity.

    S = similarity(Q_match, Q_ref) with Q_match = Q by default;  π(i) = argmax_j S_ij;  s = scale

    The refinement chooses what follows:

    - "rearranged": softmax(s Q K_ref[π]ᵀ) V_ref[π], as the paper states it. It is computed as attention over
      the original keys, each counted as often as it was matched. Nothing is gathered.
    - "guided": softmax(s Q K_refᵀ + strength · S) V_ref.
    - "topk": softmax of s q_i·k_j over the `topk` most similar reference tokens of each query, times V_ref.
    - "warped_values": softmax(s Q K_ownᵀ) V_ref[π]: the output's own attention map over the matched values.
    - "warped_output": softmax(s Q_ref[π] K_refᵀ) V_ref: the reference's own attention output at the matched
      token.
    - "soft": softmax(s Q (A K_ref)ᵀ) (A V_ref) with A = softmax(strength · S).
    - "none": V_ref[π].

    "guided" and "soft" always use the per-head similarity, because a joint one would repeat the product over
    all channels for every head.

    Args:
        query: [B, H, N_q, D], float16, bfloat16 or float32, any strides. The reference and tiled backends
            also take float64.
        ref_query: [B_r, H, N_k, D], same dtype and device as `query`. B_r = B unless `batch_index` is given.
        ref_key: [B_r, H, N_k, D], same dtype and device.
        ref_value: [B_r, H, N_k, D_v], same dtype and device.
        similarity: "cosine" or "dot". For "dot" S is the raw product, so choose `strength` accordingly.
        heads: "joint" for one map over all heads, "per_head" for one map for each head.
        refinement: one of the seven above.
        match_query: [B, H, N_q, D], aligned with `ref_query` in place of `query`. It has a gradient in
            "guided" and "soft" only. None: `query`.
        own_key: [B, H, N_q, D], the output's own keys. Required for "warped_values", and refused otherwise.
        topk: number of reference tokens for each query in "topk".
        strength: factor of the similarity in "guided" and "soft".
        scale: factor s of the dot product. None: 1/sqrt(D).
        contrast: above 0, applied to the softmax of the refinement as in `attention`. 1.0 changes nothing.
            "none" and "warped_output" ignore it.
        query_labels: int32 bit sets [B or 1, N_q]. A query token matches and sees a reference token only if
            their sets share a bit. The softmax over matched tokens in "warped_values" and "soft" is not
            restricted. None: no restriction.
        ref_labels: int32 bit sets [B or 1, N_k]. Required if and only if `query_labels` is given. In
            "warped_output" they also restrict the reference's own attention.
        batch_index: int32 [B], the row of the reference tensors that each query row reads. None: its own row.
        backend: "auto", "triton", "tiled" or "reference". None: the default of `use_backend`.

    Returns:
        [B, H, N_q, D_v] in the dtype of `query`. A query without an admissible reference token gives zeros,
        except in "warped_values" and "soft", where it sees the matched tokens of other queries. NaN in a
        query, in a token that it is compared with, or in a key or value that it reads, gives NaN.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: `backend` cannot run this call.

    Example:
        >>> from qalign_kernels import qalign_attention
        >>> query = torch.randn(1, 8, 256, 40)
        >>> ref_query, ref_key, ref_value = torch.randn(3, 1, 8, 64, 40)
        >>> qalign_attention(query, ref_query, ref_key, ref_value).shape
        torch.Size([1, 8, 256, 40])
        >>> qalign_attention(query, ref_query, ref_key, ref_value, refinement="topk", topk=4).shape
        torch.Size([1, 8, 256, 40])

    Memory: O(N), never N_q×N_k. Deterministic. Differentiable, but not through the choice π.
    Source: Q-Align, arXiv 2508.21090 ("rearranged"; its similarity, heads and layers are inferred).
    "warped_values": Eye-for-an-eye, arXiv 2406.07008. The other refinements are of this library.
    """
    _check_tensors(query, ref_query, ref_key, ref_value, batch_index)
    _contracts.check_choice("similarity", similarity, SIMILARITIES)
    _contracts.check_choice("heads", heads, HEADS)
    _contracts.check_choice("refinement", refinement, REFINEMENTS)
    strength = _contracts.number("strength", strength)
    contrast = _contracts.number("contrast", contrast, above=0)
    scale = _library.scale_of(query, scale)
    if refinement == "topk":
        topk = _contracts.count("topk", topk, "N_k", ref_key.shape[2])
    _check_refinement(query, refinement, match_query, own_key)
    _contracts.check_label_sets(query, ref_query, query_labels, "query_labels", ref_labels, "ref_labels")
    if _backends.requested(backend) == "reference":
        return _backends.implementation("reference", "qalign_attention").qalign_attention(
            query,
            ref_query,
            ref_key,
            ref_value,
            similarity=similarity,
            heads=heads,
            refinement=refinement,
            match_query=match_query,
            own_key=own_key,
            topk=topk,
            strength=strength,
            scale=scale,
            contrast=contrast,
            query_labels=query_labels,
            ref_labels=ref_labels,
            batch_index=batch_index,
        )
    alignment_query = query if match_query is None else match_query
    refine: dict[str, Any] = {"scale": scale, "contrast": contrast, "backend": backend}
    reference = Segment(ref_key, ref_value, labels=ref_labels, batch_index=batch_index)
    if refinement == "guided":
        guide = alignment(alignment_query, ref_query, similarity, strength, backend)
        return guided_attention(query, reference, guide, query_labels=query_labels, **refine)
    if refinement == "soft":
        guide = alignment(alignment_query, ref_query, similarity, strength, backend)
        return _soft(query, guide, reference, query_labels, refine)

    if refinement == "rearranged":
        call = _Rearranged(
            query,
            alignment_query.detach(),
            ref_query.detach(),
            ref_key,
            ref_value,
            similarity,
            heads,
            scale,
            contrast,
            query_labels,
            ref_labels,
            batch_index,
        )
        if _library.wants_gradient(query, ref_key, ref_value):
            return _match_count_attend(call, _backends.requested(backend))
        return _rearranged_attention_op(*call, _backends.requested(backend))
    matching: dict[str, Any] = {
        "similarity": similarity,
        "heads": heads,
        "query_labels": query_labels,
        "reference_labels": ref_labels,
        "batch_index": batch_index,
    }
    if refinement == "topk":
        index, score = similarity_topk(
            alignment_query.detach(), ref_query.detach(), topk, **matching, backend=backend
        )
        return _unmatchable_to_nan(
            topk_attention(query, ref_key, ref_value, index, batch_index=batch_index, **refine),
            score.select(-1, 0),
        )
    index, score = similarity_argmax(
        alignment_query.detach(), ref_query.detach(), **matching, backend=backend
    )
    if refinement == "warped_output":
        own = take_batch_rows(ref_query, batch_index)
        output = attention(own, reference, scale=scale, query_labels=ref_labels, backend=backend)
        return _unmatchable_to_nan(take_rows(output, index, backend=backend), score)
    ref_value = take_batch_rows(ref_value, batch_index)
    value = _unmatchable_to_nan(take_rows(ref_value, index, backend=backend), score)
    if own_key is None:
        return value
    return attention(query, Segment(own_key, value, counts=(index >= 0).int()), **refine)


class _Rearranged(NamedTuple):
    """What the "rearranged" refinement takes, in the order of the op's schema."""

    query: Tensor
    alignment_query: Tensor
    ref_query: Tensor
    ref_key: Tensor
    ref_value: Tensor
    similarity: str
    heads: str
    scale: float
    contrast: float
    query_labels: Tensor | None
    ref_labels: Tensor | None
    batch_index: Tensor | None


def _match_count_attend(call: _Rearranged, backend: str) -> Tensor:
    """Compute the "rearranged" refinement from three differentiable ops."""
    index, score = similarity_argmax(
        call.alignment_query,
        call.ref_query,
        similarity=call.similarity,
        heads=call.heads,
        query_labels=call.query_labels,
        reference_labels=call.ref_labels,
        batch_index=call.batch_index,
        backend=backend,
    )
    segment = Segment(
        call.ref_key,
        call.ref_value,
        counts=match_counts(index, call.ref_key.shape[2], backend=backend),
        labels=call.ref_labels,
        batch_index=call.batch_index,
    )
    output = attention(
        call.query,
        segment,
        scale=call.scale,
        contrast=call.contrast,
        query_labels=call.query_labels,
        backend=backend,
    )
    return _unmatchable_to_nan(output, score)


def _unmatchable_to_nan(rows: Tensor, score: Tensor) -> Tensor:
    """Set the rows of [B, H, N, D] without a valid match to NaN: their best score [B, 1 or H, N] is NaN.

    In place, unless a gradient may need the rows.
    """
    return (rows.masked_fill if _library.wants_gradient(rows) else rows.masked_fill_)(
        score.isnan().unsqueeze(-1), float("nan")
    )


def _soft(
    query: Tensor,
    guide: Guide,
    reference: Segment,
    query_labels: Tensor | None,
    refine: dict[str, Any],
) -> Tensor:
    key, value = (
        attention(
            guide.query,
            dataclasses.replace(reference, key=guide.key, value=x),
            scale=guide.strength,
            query_labels=query_labels,
            backend=refine["backend"],
        )
        for x in (reference.key, reference.value)
    )
    present = None
    if query_labels is not None and reference.labels is not None:
        # a token that sees no reference token has no key and value for the others
        seen = (query_labels.unsqueeze(-1) & _label_union(reference.labels).unsqueeze(-1)) != 0
        present = seen.squeeze(-1).int().unsqueeze(1).expand(query.shape[0], 1, -1)
    return attention(query, Segment(key, value, counts=present), **refine)


def _label_union(labels: Tensor) -> Tensor:
    """Compute the bits that any token of a row has, [B or 1, 1]."""
    bits = torch.arange(32, device=labels.device, dtype=torch.int32)
    carried = ((labels.unsqueeze(-1) >> bits) & 1).amax(1)
    return (carried << bits).sum(-1, keepdim=True, dtype=torch.int32)


def _check_tensors(
    query: Tensor, ref_query: Tensor, ref_key: Tensor, ref_value: Tensor, batch_index: Tensor | None
) -> None:
    for name, tensor in (
        ("query", query),
        ("ref_query", ref_query),
        ("ref_key", ref_key),
        ("ref_value", ref_value),
    ):
        _contracts.check_features(name, tensor)
        _contracts.check_like(name, tensor, "query", query)
    _, heads, _, head_dim = query.shape
    rows, _, tokens, _ = ref_query.shape
    _contracts.check_sizes("ref_query", ref_query, heads=heads, head_dim=head_dim)
    _contracts.check_sizes("ref_key", ref_key, batch=rows, heads=heads, tokens=tokens, head_dim=head_dim)
    _contracts.check_sizes("ref_value", ref_value, batch=rows, heads=heads, tokens=tokens)
    _contracts.check_batch_index("batch_index", batch_index, query, rows, "ref_query")


def _check_refinement(
    query: Tensor, refinement: str, match_query: Tensor | None, own_key: Tensor | None
) -> None:
    """Check `match_query`, and `own_key`, which only one refinement takes."""
    if (own_key is not None) != (refinement == "warped_values"):
        need = (
            "[B, H, N_q, D] for refinement='warped_values'"
            if own_key is None
            else f"None for refinement={refinement!r}"
        )
        _contracts.fail("own_key", need, own_key)
    batch, heads, tokens, head_dim = query.shape
    for name, tensor in (("match_query", match_query), ("own_key", own_key)):
        if tensor is not None:
            _contracts.check_features(name, tensor)
            _contracts.check_like(name, tensor, "query", query)
            _contracts.check_sizes(name, tensor, batch=batch, heads=heads, tokens=tokens, head_dim=head_dim)


def _rearranged_attention_implementation(*arguments) -> Tensor:
    *inputs, backend = arguments
    call = _Rearranged(*inputs)
    head_dims = (call.query.shape[3], call.ref_value.shape[3])
    chosen = _backends.select("qalign_attention", backend, call.query, head_dims)
    if chosen == "tiled":
        return _match_count_attend(call, chosen)
    return _backends.implementation("triton", "qalign_attention").rearranged_attention(
        *call[:6],
        call.heads == "joint",
        scale=call.scale,
        contrast=call.contrast,
        query_labels=call.query_labels,
        ref_labels=call.ref_labels,
        batch_index=call.batch_index,
    )


def _rearranged_attention_fake(*arguments) -> Tensor:
    *inputs, _ = arguments
    call = _Rearranged(*inputs)
    return call.query.new_empty((*call.query.shape[:3], call.ref_value.shape[3]))


_rearranged_attention_op = _library.register(
    "rearranged_attention",
    "(Tensor query, Tensor alignment_query, Tensor ref_query, Tensor ref_key, Tensor ref_value, "
    "str similarity, str heads, float scale, float contrast, Tensor? query_labels, Tensor? ref_labels, "
    "Tensor? batch_index, str backend) -> Tensor",
    _rearranged_attention_implementation,
    _rearranged_attention_fake,
)
