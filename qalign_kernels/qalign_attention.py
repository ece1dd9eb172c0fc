"""Q-Align's three steps in one call: align queries, rearrange keys and values, refine by attention."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from . import _backends, _contracts, _library
from ._choices import REFINEMENTS
from .attention import Guide, Segment, attention, guided_attention
from .rearrange import match_counts, take_rows
from .similarity import HEADS, SIMILARITIES, similarity_argmax, similarity_topk
from .tiled import qalign_attention as tiled


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
    asking = query if match_query is None else match_query
    refine: dict[str, Any] = {"scale": scale, "contrast": contrast, "backend": backend}
    reference = Segment(ref_key, ref_value, labels=ref_labels, batch_index=batch_index)
    if refinement == "guided":
        guide = Guide(*_features(asking, ref_query, similarity, backend), strength)
        return guided_attention(query, reference, guide, query_labels=query_labels, **refine)
    if refinement == "soft":
        return _soft(query, asking, ref_query, reference, similarity, strength, query_labels, refine)

    if refinement == "rearranged":
        scale = query.shape[3] ** -0.5 if scale is None else float(scale)
        arguments = (
            query, asking.detach(), ref_query.detach(), ref_key, ref_value, similarity, heads, scale, float(contrast), query_labels, ref_labels,
            batch_index,
        )  # fmt: skip
        differentiable = _library.wants_gradient(query, ref_key, ref_value)
        return (_rearranged if differentiable else _rearranged_attention_op)(
            *arguments, _backends.requested(backend)
        )
    matching: dict[str, Any] = {
        "similarity": similarity,
        "heads": heads,
        "query_labels": query_labels,
        "reference_labels": ref_labels,
        "batch_index": batch_index,
    }
    if refinement == "topk":
        index, score = similarity_topk(asking.detach(), ref_query.detach(), topk, **matching, backend=backend)
        return _unmatchable_to_nan(
            topk_attention(query, ref_key, ref_value, index, batch_index=batch_index, **refine),
            score.select(-1, 0),
        )
    index, score = similarity_argmax(asking.detach(), ref_query.detach(), **matching, backend=backend)
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


def _rearranged(
    query,
    asking,
    ref_query,
    ref_key,
    ref_value,
    similarity,
    heads,
    scale,
    contrast,
    query_labels,
    ref_labels,
    batch_index,
    backend,
) -> Tensor:
    """Match, count, attend: differentiable, one op each."""
    index, score = similarity_argmax(
        asking, ref_query, similarity=similarity, heads=heads, query_labels=query_labels, reference_labels=ref_labels,
        batch_index=batch_index, backend=backend,
    )  # fmt: skip
    counts = match_counts(index, ref_key.shape[2], backend=backend)
    segment = Segment(ref_key, ref_value, counts=counts, labels=ref_labels, batch_index=batch_index)
    output = attention(
        query, segment, scale=scale, contrast=contrast, query_labels=query_labels, backend=backend
    )
    return _unmatchable_to_nan(output, score)


def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    *,
    scale: float | None = None,
    contrast: float = 1.0,
    batch_index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of each query over its own k gathered keys: the topk reading of `qalign_attention`.

    output_i = Σ_t w_it v_{index_it}, w_i = softmax_t(scale · q_i·k_{index_it}), contrasted as in `attention` with N = k; index -1 is absent.

    Shapes: query [B, H, N_q, D], key [B_r, H, N_k, D], value [B_r, H, N_k, D_v], index int32 [B, 1 or H, N_q, k]. Memory O(N k).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    backend = _backends.requested(backend)
    if backend == "reference":
        module = _backends.implementation("reference", "qalign_attention")
        return module.topk_attention(
            query, key, value, index, scale=scale, contrast=contrast, batch_index=batch_index
        )
    if _library.wants_gradient(query, key, value):
        _backends.require_gradient("topk_attention", backend, query, (query.shape[3], value.shape[3]))
        return tiled.topk_attention(
            query, key, value, index, scale=scale, contrast=contrast, batch_index=batch_index
        )
    return _topk_attention_op(query, key, value, index, scale, contrast, batch_index, backend)


def _unmatchable_to_nan(rows: Tensor, score: Tensor) -> Tensor:
    """NaN in each row of [B, H, N, D] whose best score [B, 1 or H, N] is NaN: its choice means nothing. In place, unless a gradient may need
    the rows."""
    return (rows.masked_fill if rows.requires_grad else rows.masked_fill_)(
        score.isnan().unsqueeze(-1), float("nan")
    )


def _features(
    query: Tensor, ref_query: Tensor, similarity: str, backend: str | None
) -> tuple[Tensor, Tensor]:
    """The tensors whose per-head dot product is the similarity, in the input dtype."""
    if similarity == "dot":
        return query, ref_query
    if _library.wants_gradient(query, ref_query):
        return unit(query), unit(ref_query)
    return _unit_features_op(query, ref_query, _backends.requested(backend))


def unit(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) along the last axis, computed in float32 (float64 for float64) and rounded to the input dtype."""
    return torch.nn.functional.normalize(x.to(_library.accumulate_dtype(x)), dim=-1, eps=1e-12).to(x.dtype)


def _soft(
    query: Tensor,
    asking: Tensor,
    ref_query: Tensor,
    reference: Segment,
    similarity: str,
    strength: float,
    query_labels: Tensor | None,
    refine: dict[str, Any],
) -> Tensor:
    features, ref_features = _features(asking, ref_query, similarity, refine["backend"])
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


def _rearranged_attention_implementation(
    query,
    asking,
    ref_query,
    ref_key,
    ref_value,
    similarity,
    heads,
    scale,
    contrast,
    query_labels,
    ref_labels,
    batch_index,
    backend,
):
    chosen = _backends.select("qalign_attention", backend, query, (query.shape[3], ref_value.shape[3]))
    settings = {
        "scale": scale,
        "contrast": contrast,
        "query_labels": query_labels,
        "ref_labels": ref_labels,
        "batch_index": batch_index,
    }
    if chosen == "triton":
        module = _backends.implementation("triton", "qalign_attention")
        return module.rearranged_attention(
            query, asking, ref_query, ref_key, ref_value, similarity, heads == "joint", **settings
        )
    return _rearranged(
        query, asking, ref_query, ref_key, ref_value, similarity, heads, **settings, backend=chosen
    )


def _rearranged_attention_fake(
    query,
    asking,
    ref_query,
    ref_key,
    ref_value,
    similarity,
    heads,
    scale,
    contrast,
    query_labels,
    ref_labels,
    batch_index,
    backend,
):
    return query.new_empty((*query.shape[:3], ref_value.shape[3]))


_rearranged_attention_op = _library.register(
    "rearranged_attention",
    "(Tensor query, Tensor asking, Tensor ref_query, Tensor ref_key, Tensor ref_value, str similarity, str heads, float scale, float contrast, "
    "Tensor? query_labels, Tensor? ref_labels, Tensor? batch_index, str backend) -> Tensor",
    _rearranged_attention_implementation,
    _rearranged_attention_fake,
)


def _unit_features_implementation(query, ref_query, backend):
    chosen = _backends.select("qalign_attention", backend, query, (query.shape[3],))
    if chosen == "triton":
        return _backends.implementation("triton", "qalign_attention").unit_features(query, ref_query)
    return unit(query).contiguous(), unit(ref_query).contiguous()


def _unit_features_fake(query, ref_query, backend):
    return query.new_empty(query.shape), ref_query.new_empty(ref_query.shape)


_unit_features_op = _library.register(
    "unit_features",
    "(Tensor query, Tensor ref_query, str backend) -> (Tensor, Tensor)",
    _unit_features_implementation,
    _unit_features_fake,
)


def _topk_attention_implementation(query, key, value, index, scale, contrast, batch_index, backend):
    dims = (query.shape[3], value.shape[3])
    chosen = _backends.select("topk_attention", backend, query, dims, max_k=index.shape[3])
    module = _backends.implementation(chosen, "qalign_attention")
    return module.topk_attention(
        query, key, value, index, scale=scale, contrast=contrast, batch_index=batch_index
    )


def _topk_attention_fake(query, key, value, index, scale, contrast, batch_index, backend):
    return query.new_empty((*query.shape[:3], value.shape[3]))


_topk_attention_op = _library.register(
    "topk_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor index, float scale, float contrast, Tensor? batch_index, str backend) -> Tensor",
    _topk_attention_implementation,
    _topk_attention_fake,
)
