"""topk_attention and its gradient by blocks of query rows. Each query gathers its k keys and values."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._blocks import accumulate_dtype, blocks
from .rearrange import absent, add_rows, places, tokens_of


class _Rows(NamedTuple):
    """A block of query rows with the keys and values that each of them attends, in the accumulate dtype."""

    rows: slice
    tokens: Tensor  # int32 [B, 1 or H, r, k]
    query: Tensor  # [B, H, r, D]
    keys: Tensor  # [B, H, r, k, D]
    values: Tensor  # [B, H, r, k, D_v]
    probabilities: Tensor  # [B, H, r, k], 0 where absent
    absent: Tensor  # [B, H, r, k]


def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    *,
    scale: float,
    contrast: float = 1.0,
    batch_index: Tensor | None = None,
) -> Tensor:
    outputs = []
    for part in _parts(query, key, value, index, scale, batch_index):
        weights = _contrasted(part, contrast).clamp(0, 1).masked_fill(part.absent, 0).to(query.dtype)
        outputs.append((weights.to(part.values.dtype).unsqueeze(-1) * part.values).sum(3).to(query.dtype))
    return torch.cat(outputs, 2)


def topk_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    *,
    scale: float,
    contrast: float,
    batch_index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, summed in the accumulate dtype."""
    dtype = accumulate_dtype(query)
    grads = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key, value)]
    for part in _parts(query, key, value, index, scale, batch_index):
        grad = grad_output[:, :, part.rows].to(dtype).unsqueeze(3)
        weights, gain = part.probabilities, (grad * part.values).sum(-1)
        if contrast != 1.0:
            unclipped = _contrasted(part, contrast)
            weights = unclipped.clamp(0, 1).masked_fill(part.absent, 0)
            gain = gain * contrast * ((unclipped >= 0) & (unclipped <= 1))
        gain = gain.masked_fill(part.absent, 0)
        offset = (part.probabilities * gain).sum(-1, keepdim=True)
        grad_logits = (scale * part.probabilities * (gain - offset)).masked_fill(part.absent, 0).unsqueeze(-1)
        grads[0][:, :, part.rows] = (grad_logits * part.keys).sum(3)
        add_rows(grads[1], part.tokens, grad_logits * part.query.unsqueeze(3), batch_index)
        add_rows(grads[2], part.tokens, weights.to(query.dtype).to(dtype).unsqueeze(-1) * grad, batch_index)
    grad_query, grad_key, grad_value = (grad.to(query.dtype) for grad in grads)
    return grad_query, grad_key, grad_value


def _parts(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, scale: float, batch_index: Tensor | None
) -> Iterator[_Rows]:
    batch, heads, queries, k = *query.shape[:3], index.shape[3]
    dtype = accumulate_dtype(query)
    bytes_per_row = 2 * dtype.itemsize * batch * heads * k * (query.shape[3] + value.shape[3])
    for _, rows in blocks(1, queries, bytes_per_row, query.device):
        some = index[:, :, rows]
        tokens = (*places(key, some, batch_index), tokens_of(some, key.shape[2]))
        missing = absent(some, key.shape[2]).expand(batch, heads, -1, -1)
        keys, values = (x[tokens].to(dtype).masked_fill_(missing.unsqueeze(-1), 0) for x in (key, value))
        wide = query[:, :, rows].to(dtype)
        logits = (scale * (wide.unsqueeze(3) * keys).sum(-1)).masked_fill(missing, float("-inf"))
        logits = logits.masked_fill(missing.all(-1, keepdim=True), 0)
        yield _Rows(rows, some, wide, keys, values, logits.softmax(-1).masked_fill(missing, 0), missing)


def _contrasted(part: _Rows, contrast: float) -> Tensor:
    """c (p - 1/k) + 1/k, not yet clipped."""
    if contrast == 1.0:
        return part.probabilities
    return contrast * part.probabilities + (1 - contrast) / part.tokens.shape[3]
