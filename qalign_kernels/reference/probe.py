"""label_mass and mean_attention_map as their formulas read."""

import torch
from torch import Tensor

from ._product import product
from .attention import PlainSegment, attention


def label_mass(
    query: Tensor,
    key: Tensor,
    key_labels: Tensor,
    num_labels: int,
    *,
    scale: float,
    counts: Tensor | None = None,
) -> Tensor:
    """Attention over values that are 1 where a key belongs to a class, else 0."""
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    members = key_labels.unsqueeze(-1) == torch.arange(num_labels, device=key.device)
    members = members.unsqueeze(1).to(accumulate).expand(*key.shape[:2], -1, -1)
    segment = PlainSegment(key, members, counts=counts)
    return attention(query.to(accumulate), [segment], scale=scale)[0]


def mean_attention_map(query: Tensor, key: Tensor, *, scale: float) -> Tensor:
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (scale * product(query.to(accumulate), key.to(accumulate).mT)).softmax(-1).mean(1)
