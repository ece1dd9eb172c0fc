"""topk_attention by blocks of query rows. Each query gathers its k keys and values."""

import torch
from torch import Tensor

from ._blocks import accumulate_dtype, blocks


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
    """Plain PyTorch, differentiable. Without gradients the memory is that of one block."""
    batch, heads, queries, k = *query.shape[:3], index.shape[3]
    dtype = accumulate_dtype(query)
    bytes_per_row = 2 * dtype.itemsize * batch * heads * k * (query.shape[3] + value.shape[3])
    batch_rows = torch.arange(batch, device=query.device) if batch_index is None else batch_index.long()
    position = (batch_rows.view(-1, 1, 1, 1), torch.arange(heads, device=query.device).view(-1, 1, 1))
    outputs = []
    for _, rows in blocks(1, queries, bytes_per_row, query.device):
        tokens = index[:, :, rows].long()
        absent = tokens < 0
        tokens = tokens.clamp(min=0)
        keys, values = (x[(*position, tokens)].to(dtype) for x in (key, value))
        logits = scale * (query[:, :, rows].to(dtype).unsqueeze(3) * keys).sum(-1)
        weights = (
            _weights(logits.masked_fill(absent, float("-inf")), absent, contrast).to(query.dtype).to(dtype)
        )
        outputs.append((weights.unsqueeze(-1) * values).sum(3).to(query.dtype))
    return torch.cat(outputs, 2)


def _weights(logits: Tensor, absent: Tensor, contrast: float) -> Tensor:
    """Softmax over the k candidates, contrasted with N = k. Absent candidates have weight 0."""
    absent = absent.expand_as(logits)
    probabilities = logits.masked_fill(absent.all(-1, keepdim=True), 0).softmax(-1)
    if contrast != 1.0:
        probabilities = (contrast * probabilities + (1 - contrast) / logits.shape[-1]).clamp(0, 1)
    return probabilities.masked_fill(absent, 0)
