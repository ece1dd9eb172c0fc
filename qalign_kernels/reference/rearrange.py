"""match_counts and rearrange_kv as their formulas read."""

import torch
from torch import Tensor


def match_counts(index: Tensor, num_tokens: int) -> Tensor:
    tokens = torch.arange(num_tokens, device=index.device)
    return (index.unsqueeze(-1) == tokens).sum(2).int()


def rearrange_kv(key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    rows = index.clamp(min=0).long().expand(-1, key.shape[1], -1).unsqueeze(-1)
    unmatched = (index < 0).unsqueeze(-1)
    key, value = (x.take_along_dim(rows, dim=2).masked_fill(unmatched, 0) for x in (key, value))
    return key, value
