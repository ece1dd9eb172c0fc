"""match_counts by integer scatter, rearrange_kv by one gather."""

import torch
from torch import Tensor


def match_counts(index: Tensor, num_tokens: int) -> Tensor:
    slots = index.long().add_(1)  # slot 0 takes the unmatched
    counts = index.new_zeros((*index.shape[:2], num_tokens + 1))
    return counts.scatter_add_(2, slots, torch.ones_like(index)).narrow(2, 1, num_tokens).contiguous()


def rearrange_kv(key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    batch = torch.arange(key.shape[0], device=key.device).view(-1, 1, 1)
    heads = torch.arange(key.shape[1], device=key.device).view(-1, 1)
    tokens = index.clamp(min=0).long()
    unmatched = (index < 0).unsqueeze(-1)
    key, value = (x[batch, heads, tokens].contiguous().masked_fill_(unmatched, 0) for x in (key, value))
    return key, value
