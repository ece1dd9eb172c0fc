"""match_counts and rearrange_kv as their formulas read."""

import torch
from torch import Tensor


def match_counts(index: Tensor, num_tokens: int) -> Tensor:
    tokens = torch.arange(num_tokens, device=index.device)
    return (index.unsqueeze(-1) == tokens).sum(2).int()


def rearrange_kv(key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    rows = index.clamp(0, key.shape[2] - 1).long().expand(-1, key.shape[1], -1).unsqueeze(-1)
    unmatched = ((index < 0) | (index >= key.shape[2])).unsqueeze(-1)
    # in the accumulate dtype, in which a gradient sums over the queries that took the same token
    accumulate = torch.float64 if key.dtype == torch.float64 else torch.float32
    wide = (x.to(accumulate).take_along_dim(rows, dim=2).masked_fill(unmatched, 0) for x in (key, value))
    rearranged_key, rearranged_value = (x.to(key.dtype) for x in wide)
    return rearranged_key, rearranged_value
