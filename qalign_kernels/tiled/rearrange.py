"""match_counts by integer scatter, take_rows by one gather. The gradient of a gather sums in float32."""

import torch
from torch import Tensor

from ._blocks import accumulate_dtype


def match_counts(index: Tensor, num_tokens: int) -> Tensor:
    slots = index.long().add_(1)  # slot 0 takes the unmatched
    counts = index.new_zeros((*index.shape[:2], num_tokens + 1))
    return counts.scatter_add_(2, slots, torch.ones_like(index)).narrow(2, 1, num_tokens).contiguous()


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    batch, heads = places(x, index)
    return x[batch, heads, index.clamp(min=0).long()].contiguous().masked_fill_((index < 0).unsqueeze(-1), 0)


def take_rows_backward(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """The gradient of x [B, H, N_k, D]: `grad` [B, H, N_q, D], summed over the queries that took a token."""
    total = grad.new_zeros((*grad.shape[:2], num_tokens, grad.shape[3]), dtype=accumulate_dtype(grad))
    added = grad.to(total.dtype).masked_fill((index < 0).unsqueeze(-1), 0)
    add_rows(total, index, added)
    return total.to(grad.dtype)


def add_rows(total: Tensor, index: Tensor, added: Tensor, batch_index: Tensor | None = None) -> None:
    """Add `added` [B, H, N_q, ..., D] to the tokens of `total` [B_r, H, N_k, D] that `index` names.

    `index` is [B, 1 or H, N_q, ...]. Its -1 adds to token 0: let `added` be zero there. Deterministic.
    """
    batch, heads = places(total, index, batch_index)
    total.index_put_((batch, heads, index.clamp(min=0).long()), added, accumulate=True)


def places(x: Tensor, index: Tensor, batch_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What indexes batch row and head of x [B_r, H, N_k, D] beside `index` [B, 1 or H, N_q, ...]."""
    after = [1] * (index.dim() - 2)
    rows = torch.arange(index.shape[0], device=x.device) if batch_index is None else batch_index.long()
    return rows.view(-1, 1, *after), torch.arange(x.shape[1], device=x.device).view(-1, *after)
