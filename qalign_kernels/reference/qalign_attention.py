"""The seven readings of Q-Align as their formulas read: maps materialised, keys and values gathered."""

from types import SimpleNamespace

import torch
from torch import Tensor

from ._product import product
from .attention import attention, contrast_weights
from .rearrange import rearrange_kv
from .similarity import scores, similarity_argmax, similarity_topk


def _segment(
    key: Tensor, value: Tensor, counts: Tensor | None = None, labels: Tensor | None = None
) -> SimpleNamespace:
    return SimpleNamespace(
        key=key, value=value, counts=counts, labels=labels, batch_index=None, logit_scale=1.0, logit_shift=0.0
    )


def qalign_attention(
    query, ref_query, ref_key, ref_value, *, similarity, heads, refinement, match_query, own_key, topk, strength, scale, contrast,
    query_labels, ref_labels, batch_index,
) -> Tensor:  # fmt: skip
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    if batch_index is not None:
        ref_query, ref_key, ref_value = (
            x.to(accumulate)[batch_index.long()].to(x.dtype) for x in (ref_query, ref_key, ref_value)
        )
    joint = heads == "joint" and refinement not in ("guided", "soft")
    asking = query if match_query is None else match_query
    alignment = (asking, ref_query, similarity, joint, query_labels, ref_labels)
    if (
        refinement in ("guided", "soft") and similarity == "cosine"
    ):  # features of the input dtype, as keys and queries are
        alignment = (_unit(asking), _unit(ref_query), "dot", joint, query_labels, ref_labels)

    if refinement == "topk":
        index, score = similarity_topk(asking, ref_query, topk, similarity, joint, query_labels, ref_labels)
        return _unmatchable_to_nan(
            topk_attention(query, ref_key, ref_value, index, scale=scale, contrast=contrast), score[..., 0]
        )
    if refinement == "guided":
        return _weigh(
            _logits(query, ref_key, scale) + _strengthened(scores(*alignment), strength), ref_value, contrast
        )
    if refinement == "soft":
        table = _strengthened(scores(*alignment), strength)
        present = (table != float("-inf")).any(-1)
        weights = table.softmax(-1).masked_fill(~present.unsqueeze(-1), 0).to(query.dtype)
        key, value = (product(weights, x.expand(*weights.shape[:2], -1, -1)) for x in (ref_key, ref_value))
        logits = _logits(query, key, scale).masked_fill(~present.unsqueeze(2), float("-inf"))
        return _weigh(logits, value, contrast, present.sum(-1))

    index, score = similarity_argmax(*alignment)
    if refinement == "warped_output":
        output = attention(
            ref_query, [_segment(ref_key, ref_value, labels=ref_labels)], scale=scale, query_labels=ref_labels
        )[0]
        return _unmatchable_to_nan(rearrange_kv(output, output, index)[0], score)
    key, value = rearrange_kv(ref_key, ref_value, index)
    if refinement == "none":
        return _unmatchable_to_nan(value, score)
    matched = index >= 0
    if refinement == "warped_values":
        return attention(
            query,
            [_segment(own_key, _unmatchable_to_nan(value, score), matched.int())],
            scale=scale,
            contrast=contrast,
        )[0]
    labels = None
    if query_labels is not None:  # a rearranged key carries the label of the token it was taken from
        labels = (
            ref_labels.expand(query.shape[0], -1)
            .unsqueeze(1)
            .take_along_dim(index.clamp(min=0).long(), dim=2)
        )
    logits = _logits(query, key, scale).masked_fill(~matched.unsqueeze(2), float("-inf"))
    if labels is not None:
        seen = (query_labels.unsqueeze(1).unsqueeze(-1) & labels.unsqueeze(2)) != 0
        logits = logits.masked_fill(~seen, float("-inf"))
    return _unmatchable_to_nan(_weigh(logits, value, contrast, matched.sum(-1)), score)


def _strengthened(table: Tensor, strength: float) -> Tensor:
    """strength · S, inadmissible pairs still -inf."""
    return (strength * table).masked_fill(table == float("-inf"), float("-inf"))


def _unmatchable_to_nan(rows: Tensor, score: Tensor) -> Tensor:
    return rows.masked_fill(score.isnan().unsqueeze(-1), float("nan"))


def _unit(x: Tensor) -> Tensor:
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.nn.functional.normalize(x.to(accumulate), dim=-1, eps=1e-12).to(x.dtype)


def _logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    return scale * product(query.to(accumulate), key.to(accumulate).mT)


def _weigh(logits: Tensor, value: Tensor, contrast: float, total: Tensor | None = None) -> Tensor:
    """softmax (contrasted, N = `total` keys) of the logits times the values; a row of -inf gives zeros."""
    lse = logits.logsumexp(-1, keepdim=True)
    unseen = logits == float("-inf")
    weights = (logits - lse.masked_fill(lse == float("-inf"), 0)).exp()
    if contrast != 1.0:
        total = (
            torch.full_like(lse, logits.shape[-1])
            if total is None
            else total.clamp(min=1)[..., None, None].to(lse.dtype)
        )
        weights = contrast_weights(weights, contrast, total)
    weights = weights.masked_fill(unseen, 0).to(value.dtype)
    return product(weights.to(lse.dtype), value.to(lse.dtype)).to(value.dtype)


def topk_attention(query, key, value, index, *, scale, contrast=1.0, batch_index=None) -> Tensor:
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    key, value = key.to(accumulate), value.to(accumulate)
    if batch_index is not None:
        key, value = key[batch_index.long()], value[batch_index.long()]
    rows = index.clamp(min=0).long().expand(-1, query.shape[1], -1, -1)
    key, value = (
        x.unsqueeze(2).expand(-1, -1, query.shape[2], -1, -1).take_along_dim(rows.unsqueeze(-1), dim=3)
        for x in (key, value)
    )
    logits = scale * (query.to(accumulate).unsqueeze(3) * key).sum(-1)
    logits = logits.masked_fill(index < 0, float("-inf"))
    weights = _weigh_rows(logits, contrast).to(query.dtype)
    return (weights.to(accumulate).unsqueeze(-1) * value).sum(3).to(query.dtype)


def _weigh_rows(logits: Tensor, contrast: float) -> Tensor:
    """softmax over the k candidates (contrasted with N = k); absent candidates weigh nothing."""
    absent = logits == float("-inf")
    probabilities = logits.softmax(-1).masked_fill(absent.all(-1, keepdim=True), 0)
    if contrast != 1.0:
        probabilities = contrast_weights(
            probabilities, contrast, torch.full_like(logits[..., :1], logits.shape[-1])
        )
    return probabilities.masked_fill(absent, 0)
