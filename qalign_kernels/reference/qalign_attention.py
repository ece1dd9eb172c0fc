"""Q-Align with each of its seven refinements, as their formulas read.

Every map of scores is materialised, and matched keys and values are gathered.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._product import pairs
from .attention import attention, batch_rows, contrast_weights, weigh
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

    def unit(self) -> "Alignment":
        """The cosine as the dot product of normalised features, rounded to the dtype of the input."""
        if self.similarity != "cosine":
            return self
        return self._replace(query=_unit(self.query), reference=_unit(self.reference), similarity="dot")


class Call(NamedTuple):
    """One call of `qalign_attention`, the batch rows of its reference taken."""

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
    if batch_index is not None:
        accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
        ref_query, ref_key, ref_value = (
            x.to(accumulate)[batch_rows(batch_index, x)].to(x.dtype) for x in (ref_query, ref_key, ref_value)
        )
    joint = heads == "joint" and refinement not in ("guided", "soft")
    alignment_query = query if match_query is None else match_query
    alignment = Alignment(alignment_query, ref_query, similarity, joint, query_labels, ref_labels)
    call = Call(query, ref_query, ref_key, ref_value, own_key, alignment, topk, strength, scale, contrast)
    return FORMULAS[refinement](call)


def _topk(call: Call) -> Tensor:
    query, reference, *others = call.alignment
    index, score = similarity_topk(query, reference, call.topk, *others)
    settings = {"scale": call.scale, "contrast": call.contrast}
    output = topk_attention(call.query, call.key, call.value, index, **settings)
    return _unmatchable_to_nan(output, score[..., 0])


def _guided(call: Call) -> Tensor:
    features, ref_features = call.alignment.unit()[:2]
    return attention(
        call.query,
        [_Segment(call.key, call.value, labels=call.alignment.reference_labels)],
        scale=call.scale,
        contrast=call.contrast,
        query_labels=call.alignment.query_labels,
        guide=_Guide(features, ref_features, call.strength),
    )[0]


def _soft(call: Call) -> Tensor:
    features, ref_features, *_, query_labels, ref_labels = call.alignment.unit()
    key, value = (
        attention(
            features,
            [_Segment(ref_features, x, labels=ref_labels)],
            scale=call.strength,
            query_labels=query_labels,
        )[0]
        for x in (call.key, call.value)
    )
    present = None
    if query_labels is not None and ref_labels is not None:
        present = ((query_labels.unsqueeze(-1) & ref_labels.unsqueeze(-2)) != 0).any(-1)
        present = present.int().unsqueeze(1).expand(call.query.shape[0], -1, -1)
    segment = _Segment(key, value, counts=present)
    return attention(call.query, [segment], scale=call.scale, contrast=call.contrast)[0]


def _warped_output(call: Call) -> Tensor:
    index, score = similarity_argmax(*call.alignment)
    labels = call.alignment.reference_labels
    segment = _Segment(call.key, call.value, labels=labels)
    output = attention(call.ref_query, [segment], scale=call.scale, query_labels=labels)[0]
    return _unmatchable_to_nan(rearrange_kv(output, output, index)[0], score)


def _none(call: Call) -> Tensor:
    index, score = similarity_argmax(*call.alignment)
    return _unmatchable_to_nan(rearrange_kv(call.key, call.value, index)[1], score)


def _warped_values(call: Call) -> Tensor:
    index, score = similarity_argmax(*call.alignment)
    value = _unmatchable_to_nan(rearrange_kv(call.key, call.value, index)[1], score)
    segment = _Segment(call.own_key, value, counts=(index >= 0).int())
    return attention(call.query, [segment], scale=call.scale, contrast=call.contrast)[0]


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
    accumulate = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    query, key, value = (x.to(accumulate) for x in (call.query, key, value))
    logits = (call.scale * pairs(query, key, seen)).masked_fill(~seen, float("-inf"))
    counts = matched.to(accumulate).unsqueeze(2)
    output, _ = weigh(logits, value, seen, counts, call.contrast, call.query.dtype)
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


class _Segment(NamedTuple):
    """What `attention` reads of a segment."""

    key: Tensor | None
    value: Tensor
    counts: Tensor | None = None
    labels: Tensor | None = None
    batch_index: Tensor | None = None
    logit_scale: float = 1.0
    logit_shift: float = 0.0


class _Guide(NamedTuple):
    """What `attention` reads of a guide."""

    query: Tensor
    key: Tensor
    strength: float


def _unmatchable_to_nan(rows: Tensor, score: Tensor) -> Tensor:
    return rows.masked_fill(score.isnan().unsqueeze(-1), float("nan"))


def _unit(x: Tensor) -> Tensor:
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    return unit(x.to(accumulate)).to(x.dtype)


def topk_attention(query, key, value, index, *, scale, contrast=1.0, batch_index=None) -> Tensor:
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
    weights = _weigh_rows(logits, absent, contrast).to(query.dtype)
    return (weights.to(accumulate).unsqueeze(-1) * value).sum(3).to(query.dtype)


def _weigh_rows(logits: Tensor, absent: Tensor, contrast: float) -> Tensor:
    """Softmax over the k candidates, contrasted with N = k. Absent candidates have weight 0."""
    probabilities = logits.masked_fill(absent.all(-1, keepdim=True), 0).softmax(-1)
    if contrast != 1.0:
        probabilities = contrast_weights(
            probabilities, contrast, torch.full_like(logits[..., :1], logits.shape[-1])
        )
    return probabilities.masked_fill(absent, 0)
