"""label_mass and mean_attention_map as their formulas read."""

import torch
from torch import Tensor

from ._product import product


def _weighted_probabilities(query: Tensor, key: Tensor, scale: float, counts: Tensor | None = None) -> Tensor:
    """m_j p_ij [B, H, N_q, N_k] in float32 (float64 for float64 input)."""
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    logits = scale * product(query.to(accumulate), key.to(accumulate).mT)
    if counts is None:
        return logits.softmax(-1)
    empty = (counts == 0).all(-1)[:, :, None, None]
    logits = logits + counts.to(accumulate).log().unsqueeze(2)
    return logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


def label_mass(
    query: Tensor,
    key: Tensor,
    key_labels: Tensor,
    num_labels: int,
    *,
    scale: float,
    counts: Tensor | None = None,
) -> Tensor:
    probabilities = _weighted_probabilities(query, key, scale, counts)
    members = key_labels.unsqueeze(-1) == torch.arange(num_labels, device=key.device)
    members = members.unsqueeze(1).to(probabilities.dtype).expand(*probabilities.shape[:2], -1, -1)
    return product(probabilities, members)


def mean_attention_map(query: Tensor, key: Tensor, *, scale: float) -> Tensor:
    return _weighted_probabilities(query, key, scale).mean(1)
