"""Q-Align with each of its seven refinements, as their formulas read.

Every map of scores is materialised, and matched keys and values are gathered.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._product import pairs, rounded
from .attention import PlainSegment, batch_rows, contrast_weights, weigh, wide_attention
from .rearrange import rearrange_kv
from .similarity import similarity_argmax, similarity_topk, unit


class Alignment(NamedTuple):
    """What is matched with what, in the order of the arguments of `scores`."""

    query: Tensor
    reference: Tensor
    similarity: str
    joint: bool
    query_labels: Tensor | None
    reference_labels: Tensor | None

    def unit(self, dtype: torch.dtype) -> "Alignment":
        """The cosine as the dot product of normalised features that `dtype` holds."""
        if self.similarity != "cosine":
            return self
        query, reference = (rounded(unit(x), dtype) for x in (self.query, self.reference))
        return self._replace(query=query, reference=reference, similarity="dot")


class Call(NamedTuple):
    """One call of `qalign_attention` in float32 (float64), the batch rows of its reference taken."""

    query: Tensor
    ref_query: Tensor
    key: Tensor
    value: Tensor
    own_key: Tensor | None
    alignment: Alignment
    topk: int | None
    strength: float
    scale: float
    contrast: float
    dtype: torch.dtype  # of the tensors as they were given, which are float32 here


def qalign_attention(
    query,
    ref_query,
    ref_key,
    ref_value,
    *,
    similarity,
    heads,
    refinement,
    match_query,
    own_key,
    topk,
    strength,
    scale,
    contrast,
    query_labels,
    ref_labels,
    batch_index,
) -> Tensor:
    """Its parameters are those of the public op, so that both can be compared."""
    dtype = query.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    query, match_query, own_key = (
        None if x is None else x.to(accumulate) for x in (query, match_query, own_key)
    )
    ref_query, ref_key, ref_value = (
        x.to(accumulate)[batch_rows(batch_index, x)] for x in (ref_query, ref_key, ref_value)
    )
    joint = heads == "joint" and refinement not in ("guided", "soft")
    alignment_query = query if match_query is None else match_query
    alignment = Alignment(alignment_query, ref_query, similarity, joint, query_labels, ref_labels)
    call = Call(
        query, ref_query, ref_key, ref_value, own_key, alignment, topk, strength, scale, contrast, dtype
    )
    return FORMULAS[refinement](call).to(dtype)


def _topk(call: Call) -> Tensor:
    query, reference, *others = call.alignment
    index, score = similarity_topk(query, reference, call.topk, *others)
    output = topk_attention(
        call.query, call.key, call.value, index, scale=call.scale, contrast=call.contrast, dtype=call.dtype
    )
    return _unmatchable_to_nan(output, score[..., 0])


def _guided(call: Call) -> Tensor:
    features, ref_features = call.alignment.unit(call.dtype)[:2]
    return wide_attention(
        call.query,
        [PlainSegment(call.key, call.value, labels=call.alignment.reference_labels)],
        call.dtype,
        scale=call.scale,
        contrast=call.contrast,
        query_labels=call.alignment.query_labels,
        guide=_Guide(features, ref_features, call.strength),
    )[0]


def _soft(call: Call) -> Tensor:
    features, ref_features, *_, query_labels, ref_labels = call.alignment.unit(call.dtype)
    key, value = (
        wide_attention(
            features,
            [PlainSegment(ref_features, x, labels=ref_labels)],
            call.dtype,
            scale=call.strength,
            query_labels=query_labels,
        )[0]
        for x in (call.key, call.value)
    )
    present = None
    if query_labels is not None and ref_labels is not None:
        present = ((query_labels.unsqueeze(-1) & ref_labels.unsqueeze(-2)) != 0).any(-1)
        present = present.int().unsqueeze(1).expand(call.query.shape[0], -1, -1)
    segment = PlainSegment(key, value, counts=present)
    return wide_attention(call.query, [segment], call.dtype, scale=call.scale, contrast=call.contrast)[0]


def _warped_output(call: Call) -> Tensor:
    index, score = similarity_argmax(*call.alignment)
    labels = call.alignment.reference_labels
    segment = PlainSegment(call.key, call.value, labels=labels)
    settings = {"scale": call.scale, "query_labels": labels}
    output, _ = wide_attention(call.ref_query, [segment], call.dtype, **settings)
    return _unmatchable_to_nan(rearrange_kv(output, output, index)[0], score)


def _none(call: Call) -> Tensor:
    index, score = similarity_argmax(*call.alignment)
    return _unmatchable_to_nan(rearrange_kv(call.key, call.value, index)[1], score)


def _warped_values(call: Call) -> Tensor:
    index, score = similarity_argmax(*call.alignment)
    value = _unmatchable_to_nan(rearrange_kv(call.key, call.value, index)[1], score)
    segment = PlainSegment(call.own_key, value, counts=(index >= 0).int())
    return wide_attention(call.query, [segment], call.dtype, scale=call.scale, contrast=call.contrast)[0]


def _rearranged(call: Call) -> Tensor:
    """Softmax over the rearranged keys. Each carries the label set of the token it was taken from."""
    index, score = similarity_argmax(*call.alignment)
    key, value = rearrange_kv(call.key, call.value, index)
    matched = index >= 0
    seen = matched.unsqueeze(2)
    query_labels, ref_labels = call.alignment.query_labels, call.alignment.reference_labels
    if query_labels is not None and ref_labels is not None:
        tokens = index.clamp(min=0).long()
        labels = ref_labels.expand(call.query.shape[0], -1).unsqueeze(1).take_along_dim(tokens, dim=2)
        seen = seen & ((query_labels.unsqueeze(1).unsqueeze(-1) & labels.unsqueeze(2)) != 0)
    seen = seen.expand(*call.query.shape[:3], key.shape[2])
    logits = (call.scale * pairs(call.query, key, seen)).masked_fill(~seen, float("-inf"))
    counts = matched.to(logits.dtype).unsqueeze(2)
    output, _ = weigh(logits, value, seen, counts, call.contrast, call.dtype)
    return _unmatchable_to_nan(output, score)


FORMULAS = {
    "rearranged": _rearranged,
    "warped_values": _warped_values,
    "warped_output": _warped_output,
    "none": _none,
    "topk": _topk,
    "guided": _guided,
    "soft": _soft,
}


class _Guide(NamedTuple):
    """What `attention` reads of a guide."""

    query: Tensor
    key: Tensor
    strength: float


def _unmatchable_to_nan(rows: Tensor, score: Tensor) -> Tensor:
    return rows.masked_fill(score.isnan().unsqueeze(-1), float("nan"))


def topk_attention(
    query, key, value, index, *, scale, contrast=1.0, batch_index=None, dtype: torch.dtype | None = None
) -> Tensor:
    """Weights are rounded to `dtype`, that of the query by default."""
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    key, value = (x.to(accumulate)[batch_rows(batch_index, x)] for x in (key, value))
    absent = ((index < 0) | (index >= key.shape[2])).expand(-1, query.shape[1], -1, -1)
    tokens = index.clamp(0, key.shape[2] - 1).long().expand(-1, query.shape[1], -1, -1)
    key, value = (
        x.unsqueeze(2)
        .expand(-1, -1, query.shape[2], -1, -1)
        .take_along_dim(tokens.unsqueeze(-1), dim=3)
        .masked_fill(absent.unsqueeze(-1), 0)
        for x in (key, value)
    )
    logits = scale * (query.to(accumulate).unsqueeze(3) * key).sum(-1)
    logits = logits.masked_fill(absent, float("-inf"))
    weights = rounded(_weigh_rows(logits, absent, contrast), dtype or query.dtype)
    return (weights.unsqueeze(-1) * value).sum(3).to(query.dtype)


def _weigh_rows(logits: Tensor, absent: Tensor, contrast: float) -> Tensor:
    """Softmax over the k candidates, contrasted with N = k. Absent candidates have weight 0."""
    probabilities = logits.masked_fill(absent.all(-1, keepdim=True), 0).softmax(-1)
    if contrast != 1.0:
        probabilities = contrast_weights(
            probabilities, contrast, torch.full_like(logits[..., :1], logits.shape[-1])
        )
    return probabilities.masked_fill(absent, 0)
