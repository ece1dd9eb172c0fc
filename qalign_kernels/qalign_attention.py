"""Q-Align's three steps in one call: align queries, rearrange keys and values, refine by attention."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backends, _contracts, _library
from .attention import Guide, Segment, attention, guided_attention
from .rearrange import match_counts, take_rows
from .similarity import HEADS, SIMILARITIES, similarity_argmax, similarity_topk
from .topk_attention import topk_attention
from .unit_features import alignment_features

REFINEMENTS = ("rearranged", "guided", "topk", "warped_values", "warped_output", "soft", "none")


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
    """Attention to a reference image whose keys and values are aligned by query-query similarity.

    S = similarity(Q_match, Q_ref), Q_match = Q by default;  π(i) = argmax_j S_ij;  s = scale. By `refinement`:

    - "rearranged": softmax(s Q K_ref[π]ᵀ) V_ref[π], the paper's reading. Computed as attention over the original keys, each counted
      as often as it was chosen; nothing is gathered.
    - "guided": softmax(s Q K_refᵀ + strength · S) V_ref.
    - "topk": softmax of s q_i·k_j over the `topk` best-aligned reference tokens of each query only.
    - "warped_values": softmax(s Q K_ownᵀ) V_ref[π], the output's own map over warped values. Needs `own_key`.
    - "warped_output": softmax(s Q_ref[π] K_refᵀ) V_ref: what the reference itself made of the matched token. Computed as the reference's own
      attention, then gathered.
    - "soft": A = softmax(strength · S); softmax(s Q (A K_ref)ᵀ) (A V_ref).
    - "none": V_ref[π].

    The dense readings "guided" and "soft" take the per-head similarity whatever `heads` says: a joint map would recompute the dot
    product over all channels for every head.

    Args:
        query: [B, H, N_q, D], float16, bfloat16 or float32 (float64: reference and tiled), any strides.
        ref_query, ref_key: [B_r, H, N_k, D], ref_value: [B_r, H, N_k, D_v]; B_r = B unless `batch_index` names rows.
        similarity, heads: as `similarity_argmax`. (S is the raw dot product for "dot": choose `strength` accordingly.)
        match_query: [B, H, N_q, D], what is aligned with `ref_query` in place of `query`, such as the sum of two pictures' queries. Nothing
            flows back through it, except in "guided" and "soft".
        own_key: [B, H, N_q, D], the output's own keys; only for "warped_values".
        topk: reference tokens per query for "topk".
        strength: of the alignment for "guided" and "soft".
        scale: of the dot product; None is 1/sqrt(D).
        contrast: as `attention`, applied to the refinement's softmax (1.67 is Cross-Image attention's); nothing for "none" and "warped_output".
        query_labels, ref_labels: int32 bit sets [B or 1, N_q] and [B or 1, N_k], both or neither. They restrict the match and
            the attention to reference tokens: a query, and in "warped_output" a reference token, sees a token iff their sets meet. The
            softmax over warped tokens of "warped_values" and "soft" is not restricted.
        batch_index: int32 [B], the row of the reference tensors that each query row reads.
        backend: "auto", "triton", "tiled" or "reference"; None takes the default of `use_backend`.

    Returns:
        [B, H, N_q, D_v] in the dtype of `query`. A query that sees no reference token gives zeros, except where it
        still attends the warped tokens of others ("warped_values", "soft"). NaN in a query, in what it
        was compared with, or in a key or value that is read, gives NaN.

    Raises:
        TypeError, ValueError: a bad argument, named. RuntimeError: a `backend` that cannot run here.

    Memory: O(N), never N_q×N_k. Deterministic. Differentiable; not through the choice π.
    Source: Q-Align, arXiv 2508.21090 ("rearranged"; its similarity, heads and layers are inferred); "warped_values": Eye-for-an-eye,
    arXiv 2406.07008, whose features that are replaced before projection "warped_output" resembles; the others are this library's.
    """
    _check_tensors(query, ref_query, ref_key, ref_value, batch_index)
    _check_settings(similarity, heads, refinement, strength, scale, contrast)
    _check_refinement(query, ref_key, refinement, match_query, own_key, topk)
    _contracts.check_label_sets(query, ref_query, query_labels, "query_labels", ref_labels, "ref_labels")
    if _backends.requested(backend) == "reference":
        return _backends.implementation("reference", "qalign_attention").qalign_attention(
            query, ref_query, ref_key, ref_value, similarity=similarity, heads=heads, refinement=refinement, match_query=match_query,
            own_key=own_key, topk=topk, strength=strength, scale=query.shape[3] ** -0.5 if scale is None else scale, contrast=contrast,
            query_labels=query_labels, ref_labels=ref_labels, batch_index=batch_index,
        )  # fmt: skip
    alignment_query = query if match_query is None else match_query
    refine: dict[str, Any] = {"scale": scale, "contrast": contrast, "backend": backend}
    reference = Segment(ref_key, ref_value, labels=ref_labels, batch_index=batch_index)
    if refinement == "guided":
        guide = Guide(*alignment_features(alignment_query, ref_query, similarity, backend), strength)
        return guided_attention(query, reference, guide, query_labels=query_labels, **refine)
    if refinement == "soft":
        return _soft(query, alignment_query, ref_query, reference, similarity, strength, query_labels, refine)

    if refinement == "rearranged":
        scale = query.shape[3] ** -0.5 if scale is None else float(scale)
        call = _Rearranged(
            query, alignment_query.detach(), ref_query.detach(), ref_key, ref_value,
            similarity, heads, scale, float(contrast), query_labels, ref_labels, batch_index,
        )  # fmt: skip
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
        own = ref_query if batch_index is None else ref_query.index_select(0, batch_index)
        output = attention(own, reference, scale=scale, query_labels=ref_labels, backend=backend)
        return _unmatchable_to_nan(take_rows(output, index, backend=backend), score)
    if batch_index is not None:
        ref_value = ref_value.index_select(0, batch_index)
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
    """NaN in each row of [B, H, N, D] whose best score [B, 1 or H, N] is NaN: its choice means nothing. In place, unless a gradient may need
    the rows."""
    return (rows.masked_fill if rows.requires_grad else rows.masked_fill_)(
        score.isnan().unsqueeze(-1), float("nan")
    )


def _soft(
    query: Tensor,
    alignment_query: Tensor,
    ref_query: Tensor,
    reference: Segment,
    similarity: str,
    strength: float,
    query_labels: Tensor | None,
    refine: dict[str, Any],
) -> Tensor:
    features, ref_features = alignment_features(alignment_query, ref_query, similarity, refine["backend"])
    key, value = (
        attention(
            features,
            dataclasses.replace(reference, key=ref_features, value=x),
            scale=strength,
            query_labels=query_labels,
            backend=refine["backend"],
        )
        for x in (reference.key, reference.value)
    )
    present = None
    if (
        query_labels is not None and reference.labels is not None
    ):  # a token that saw no reference token has nothing to offer the refinement
        seen = (query_labels.unsqueeze(-1) & _label_union(reference.labels).unsqueeze(-1)) != 0
        present = seen.squeeze(-1).int().unsqueeze(1).expand(query.shape[0], 1, -1)
    return attention(query, Segment(key, value, counts=present), **refine)


def _label_union(labels: Tensor) -> Tensor:
    """The bits that any token of a row carries, [B or 1, 1]."""
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


def _check_settings(
    similarity: str, heads: str, refinement: str, strength: float, scale: float | None, contrast: float
) -> None:
    _contracts.check_choice("similarity", similarity, SIMILARITIES)
    _contracts.check_choice("heads", heads, HEADS)
    _contracts.check_choice("refinement", refinement, REFINEMENTS)
    _contracts.check_number("strength", strength)
    _contracts.check_number("contrast", contrast, above=0)
    if scale is not None:
        _contracts.check_number("scale", scale)


def _check_refinement(
    query: Tensor,
    ref_key: Tensor,
    refinement: str,
    match_query: Tensor | None,
    own_key: Tensor | None,
    topk: int,
) -> None:
    """What stands beside the reference: `match_query`, and what only one refinement takes, `topk` and `own_key`."""
    if refinement == "topk":
        _contracts.check_count("topk", topk, "N_k", ref_key.shape[2])
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
