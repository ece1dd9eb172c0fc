"""match_counts by integer scatter, take_rows by one gather. The gradient of a gather sums in float32."""

import torch
from torch import Tensor

from ._blocks import accumulate_dtype


def match_counts(index: Tensor, num_tokens: int) -> Tensor:
    slots = index.long().add_(1).masked_fill_(absent(index, num_tokens), 0)  # slot 0 takes the unmatched
    counts = index.new_zeros((*index.shape[:2], num_tokens + 1))
    return counts.scatter_add_(2, slots, torch.ones_like(index)).narrow(2, 1, num_tokens).contiguous()


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    taken = x[(*places(x, index), tokens_of(index, x.shape[2]))].contiguous()
    return taken.masked_fill_(absent(index, x.shape[2]).unsqueeze(-1), 0)


def take_rows_backward(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """The gradient of x [B, H, N_k, D]: `grad` [B, H, N_q, D], summed over the queries that took a token."""
    total = grad.new_zeros((*grad.shape[:2], num_tokens, grad.shape[3]), dtype=accumulate_dtype(grad))
    add_rows(total, index, grad.to(total.dtype))
    return total.to(grad.dtype)


def add_rows(total: Tensor, index: Tensor, added: Tensor, batch_index: Tensor | None = None) -> None:
    """Add `added` [B, H, N_q, ..., D] to the tokens of `total` [B_r, H, N_k, D] that `index` names.

    `index` is [B, 1 or H, N_q, ...]. An index that names no token adds nothing. Deterministic.
    """
    batch, heads = places(total, index, batch_index)
    added = added.masked_fill(absent(index, total.shape[2]).unsqueeze(-1), 0)
    total.index_put_((batch, heads, tokens_of(index, total.shape[2])), added, accumulate=True)


def absent(index: Tensor, tokens: int) -> Tensor:
    """Whether an index names none of the tokens."""
    return (index < 0) | (index >= tokens)


def tokens_of(index: Tensor, tokens: int) -> Tensor:
    """The tokens that an index names; some token where it names none."""
    return index.clamp(0, tokens - 1).long()


def places(x: Tensor, index: Tensor, batch_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What indexes batch row and head of x [B_r, H, N_k, D] beside `index` [B, 1 or H, N_q, ...]."""
    after = [1] * (index.dim() - 2)
    rows = torch.arange(index.shape[0], device=x.device)
    if batch_index is not None:
        rows = batch_index.long().clamp(0, x.shape[0] - 1)
    return rows.view(-1, 1, *after), torch.arange(x.shape[1], device=x.device).view(-1, *after)
