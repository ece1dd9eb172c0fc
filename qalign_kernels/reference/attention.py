"""attention as its formula reads.

1. The logits of all segments, side by side.
2. Their softmax with multiplicities.
3. The contrast, if there is one.
4. The weighted sum of the values that a query sees.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._product import pairs, product, rounded


class PlainSegment(NamedTuple):
    """What `attention` reads of a segment."""

    key: Tensor | None
    value: Tensor
    counts: Tensor | None = None
    labels: Tensor | None = None
    batch_index: Tensor | None = None
    logit_scale: float = 1.0
    logit_shift: float = 0.0


class _Segment(NamedTuple):
    """One segment as the batch rows of the queries read it."""

    logits: Tensor  # [B, H, N_q, N_k], -inf where a query does not see a key
    seen: Tensor  # [B, H, N_q, N_k], whether it does
    counts: Tensor  # [B, H, 1, N_k], the multiplicities
    value: Tensor  # [B, H, N_k, D_v]


def _segment(query, segment, scale, query_labels, guide, accumulate) -> _Segment:
    rows = batch_rows(segment.batch_index, segment.key)
    key, value = segment.key.to(accumulate)[rows], segment.value.to(accumulate)[rows]
    seen = _seen(query, segment, query_labels)
    logits = segment.logit_scale * scale * pairs(query.to(accumulate), key, seen) + segment.logit_shift
    if guide is not None:
        guide_query, guide_key = guide.query.to(accumulate), guide.key.to(accumulate)[rows]
        logits = logits + guide.strength * pairs(guide_query, guide_key, seen)
    if seen is None:
        seen = torch.ones((), dtype=torch.bool, device=query.device)
    else:
        logits = logits.masked_fill(~seen, float("-inf"))
    if segment.counts is None:
        counts = torch.ones((query.shape[0], 1, key.shape[2]), device=query.device, dtype=accumulate)
    else:
        counts = segment.counts.to(accumulate).clamp(min=0)
    return _Segment(
        logits, seen.expand(logits.shape), counts.expand(-1, query.shape[1], -1).unsqueeze(2), value
    )


def _seen(query: Tensor, segment, query_labels: Tensor | None) -> Tensor | None:
    """Which keys a query sees, by their labels and counts; None: all."""
    seen = None
    if segment.labels is not None and query_labels is not None:
        seen = ((query_labels.unsqueeze(-1) & segment.labels.unsqueeze(-2)) != 0).unsqueeze(1)
    if segment.counts is not None:
        present = (segment.counts > 0).unsqueeze(2)
        seen = present if seen is None else seen & present
    shape = (*query.shape[:3], segment.key.shape[2])
    return None if seen is None else seen.expand(shape)


def batch_rows(batch_index: Tensor | None, source: Tensor) -> slice | Tensor:
    """The rows of `source` that query rows read."""
    return slice(None) if batch_index is None else batch_index.long().clamp(0, source.shape[0] - 1)


def contrast_weights(probabilities: Tensor, contrast: float, total: Tensor) -> Tensor:
    """clip(c·(p - 1/N) + 1/N, 0, 1), not renormalised."""
    return (contrast * (probabilities - 1 / total) + 1 / total).clamp(0, 1)


def weigh(
    logits: Tensor, value: Tensor, seen: Tensor | None, counts: Tensor, contrast: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Σ_j m_j w_ij v_j over the values that are seen, and the log-sum-exp; `dtype` rounds all but that."""
    lse = (logits + counts.log()).logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == float("-inf"), 0).unsqueeze(-1)).exp()
    if contrast != 1.0:
        weights = contrast_weights(weights, contrast, counts.sum(-1, keepdim=True).clamp(min=1))
    weights = counts * weights
    if seen is not None:
        weights = weights.masked_fill(~seen, 0)
    return rounded(product(rounded(weights, dtype), value, seen), dtype), lse


def attention(query, segments, *, scale, **settings) -> tuple[Tensor, Tensor]:
    output, lse = wide_attention(query, segments, query.dtype, scale=scale, **settings)
    return output.to(query.dtype), lse


def wide_attention(
    query, segments, dtype, *, scale, contrast=1.0, query_labels=None, guide=None
) -> tuple[Tensor, Tensor]:
    """Attention with results that `dtype` holds, in float32 (float64 for float64 input)."""
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    parts = [_segment(query, segment, scale, query_labels, guide, accumulate) for segment in segments]
    logits, seen, counts, value = (torch.cat(part, dim) for part, dim in zip(zip(*parts), (3, 3, 3, 2)))
    hidden = any(segment.labels is not None or segment.counts is not None for segment in segments)
    return weigh(logits, value, seen if hidden else None, counts, contrast, dtype)
