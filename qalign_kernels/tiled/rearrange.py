"""match_counts by integer scatter, take_rows by one gather."""

import torch
from torch import Tensor


def match_counts(index: Tensor, num_tokens: int) -> Tensor:
    slots = index.long().add_(1)  # slot 0 takes the unmatched
    counts = index.new_zeros((*index.shape[:2], num_tokens + 1))
    return counts.scatter_add_(2, slots, torch.ones_like(index)).narrow(2, 1, num_tokens).contiguous()


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    batch = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1)
    heads = torch.arange(x.shape[1], device=x.device).view(-1, 1)
    return x[batch, heads, index.clamp(min=0).long()].contiguous().masked_fill_((index < 0).unsqueeze(-1), 0)
