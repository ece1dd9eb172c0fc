"""label_mass is attention over an indicator of the classes; mean_attention_map adds head after head."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from ._blocks import accumulate_dtype, blocks
from .attention import attention, attention_backward


def label_mass(
    query: Tensor,
    key: Tensor,
    key_labels: Tensor,
    num_labels: int,
    *,
    scale: float,
    counts: Tensor | None = None,
) -> Tensor:
    segment = _indicator(key.to(accumulate_dtype(key)), key_labels, num_labels, counts)
    query = query.to(segment.key.dtype)
    return attention(
        query, [segment], scale=scale, contrast=1.0, query_labels=None, guide=None, need_lse=False
    )[0]


def label_mass_backward(
    grad_mass: Tensor,
    mass: Tensor,
    query: Tensor,
    key: Tensor,
    key_labels: Tensor,
    num_labels: int,
    *,
    scale: float,
    counts: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of query and key that are needed."""
    segment = _indicator(key, key_labels, num_labels, counts)
    return attention_backward(
        grad_mass,
        None,
        mass,
        None,
        query,
        [segment],
        scale=scale,
        contrast=1.0,
        query_labels=None,
        guide=None,
        needs=[*needs, False],
    )[:2]


def _indicator(key: Tensor, key_labels: Tensor, num_labels: int, counts: Tensor | None) -> SimpleNamespace:
    """A segment whose values are 1 where a key belongs to a class, else 0."""
    members = (key_labels.unsqueeze(-1) == torch.arange(num_labels, device=key.device)).to(key.dtype)
    members = members.unsqueeze(1).expand(key.shape[0], key.shape[1], -1, -1)
    return SimpleNamespace(
        key=key, value=members, counts=counts, labels=None, batch_index=None, logit_scale=1.0, logit_shift=0.0
    )


def mean_attention_map(query: Tensor, key: Tensor, *, scale: float) -> Tensor:
    dtype, (batch, heads, queries, _), tokens = accumulate_dtype(query), query.shape, key.shape[2]
    result = query.new_zeros((batch, queries, tokens), dtype=dtype)
    for b in range(batch):
        for h in range(heads):
            keys = key[b, h].to(dtype).mT
            for _, rows in blocks(1, queries, 2 * dtype.itemsize * tokens, query.device):
                logits = (query[b, h, rows].to(dtype) * scale) @ keys
                result[b, rows] += logits.softmax(-1)
    return result.div_(heads)


def mean_attention_map_backward(
    grad: Tensor, query: Tensor, key: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of query and key, from that of the map, recomputing it block by block."""
    dtype, (batch, heads, queries, _), tokens = accumulate_dtype(query), query.shape, key.shape[2]
    grad_query, grad_key = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key))
    for b in range(batch):
        for h in range(heads):
            keys = key[b, h].to(dtype)
            for _, rows in blocks(1, queries, 3 * dtype.itemsize * tokens, query.device):
                scaled = query[b, h, rows].to(dtype) * scale
                map_rows = (scaled @ keys.mT).softmax(-1)
                gain = grad[b, rows] / heads
                offset = torch.einsum("rn,rn->r", map_rows, gain).unsqueeze(-1)
                grad_logits = (gain - offset).mul_(map_rows)
                grad_query[b, h, rows] = (grad_logits @ keys).mul_(scale)
                grad_key[b, h].addmm_(grad_logits.mT, scaled)
    return grad_query.to(query.dtype), grad_key.to(key.dtype)
