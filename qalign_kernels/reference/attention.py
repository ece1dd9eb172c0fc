"""attention as its formula reads.

1. The logits of all segments, side by side.
2. Their softmax with multiplicities.
3. The contrast, if there is one.
4. The weighted sum of the values.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._product import product


class _Segment(NamedTuple):
    """One segment as the batch rows of the queries read it."""

    logits: Tensor  # [B, H, N_q, N_k], -inf where a query does not see a key
    counts: Tensor  # [B, H, 1, N_k], the multiplicities
    value: Tensor  # [B, H, N_k, D_v]


def _segment(query, segment, scale, query_labels, guide, accumulate) -> _Segment:
    rows = slice(None) if segment.batch_index is None else segment.batch_index.long()
    key, value = segment.key.to(accumulate)[rows], segment.value.to(accumulate)[rows]
    logits = segment.logit_scale * scale * product(query.to(accumulate), key.mT) + segment.logit_shift
    if guide is not None:
        logits = logits + guide.strength * product(
            guide.query.to(accumulate), guide.key.to(accumulate)[rows].mT
        )
    if segment.labels is not None:
        seen = (query_labels.unsqueeze(-1) & segment.labels.unsqueeze(-2)) != 0
        logits = logits.masked_fill(~seen.unsqueeze(1), float("-inf"))
    if segment.counts is None:
        counts = torch.ones((query.shape[0], 1, key.shape[2]), device=query.device, dtype=accumulate)
    else:
        counts = segment.counts.to(accumulate)
        logits = logits.masked_fill((segment.counts == 0).unsqueeze(2), float("-inf"))
    return _Segment(logits, counts.expand(-1, query.shape[1], -1).unsqueeze(2), value)


def contrast_weights(probabilities: Tensor, contrast: float, total: Tensor) -> Tensor:
    """clip(c·(p - 1/N) + 1/N, 0, 1), not renormalised."""
    return (contrast * (probabilities - 1 / total) + 1 / total).clamp(0, 1)


def attention(
    query, segments, *, scale, contrast=1.0, query_labels=None, guide=None, need_lse=True
) -> tuple[Tensor, Tensor]:
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    parts = [_segment(query, segment, scale, query_labels, guide, accumulate) for segment in segments]
    logits, counts, value = (torch.cat(part, dim) for part, dim in zip(zip(*parts), (3, 3, 2)))
    lse = (logits + counts.log()).logsumexp(-1)
    unseen = logits == float("-inf")
    probabilities = (logits - lse.masked_fill(lse == float("-inf"), 0).unsqueeze(-1)).exp()
    weights = (
        probabilities
        if contrast == 1.0
        else contrast_weights(probabilities, contrast, counts.sum(-1, keepdim=True).clamp(min=1))
    )
    weights = (counts * weights).masked_fill(unseen, 0).to(query.dtype)
    return product(weights.to(accumulate), value).to(query.dtype), lse
