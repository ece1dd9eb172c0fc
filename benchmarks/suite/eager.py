"""The ops in eager PyTorch, as people write them today; scores are materialised, 1024 query rows a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, normalize, one_hot, scaled_dot_product_attention

from qalign_kernels.bench.checks import STRENGTH, TOPK, learned
from qalign_kernels.bench.measure import NUM_LABELS, Inputs
from qalign_kernels.bench.ops import CONTRAST

ROWS = 1024


def peer(op_name: str) -> Callable[[Inputs], Any]:
    """Give the function of this module for an op of `qalign_kernels.bench.ops`."""
    same = {
        "similarity_argmax_packed": similarity_argmax_per_head,
        "qalign_attention_correlated": qalign_attention,
    }
    return same.get(op_name) or globals()[op_name]


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.split(ROWS, dim=2)


def _joint_unit(x: Tensor) -> Tensor:
    return normalize(x.transpose(1, 2).flatten(2).unsqueeze(1), dim=-1)


def similarity_argmax(x: Inputs) -> tuple[Tensor, Tensor]:
    return _argmax(_joint_unit(x.query), _joint_unit(x.ref_query))


def similarity_argmax_per_head(x: Inputs) -> tuple[Tensor, Tensor]:
    return _argmax(x.query, x.ref_query)


def _argmax(query: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    best = [(rows @ reference.mT).max(-1) for rows in _chunks(query)]
    return torch.cat([b.indices for b in best], 2), torch.cat([b.values for b in best], 2)


def similarity_topk(x: Inputs) -> tuple[Tensor, Tensor]:
    query, reference = _joint_unit(x.query), _joint_unit(x.ref_query)
    best = [(rows @ reference.mT).topk(TOPK, -1) for rows in _chunks(query)]
    return torch.cat([b.indices for b in best], 2), torch.cat([b.values for b in best], 2)


def match_counts(x: Inputs) -> Tensor:
    index = x.match_map.long()
    return torch.zeros_like(index).scatter_add_(2, index, torch.ones_like(index)).int()


def rearrange_kv(x: Inputs) -> tuple[Tensor, Tensor]:
    return _gather(x.key, x.match_map), _gather(x.value, x.match_map)


def _gather(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.gather(2, index.long().unsqueeze(-1).expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def attention(x: Inputs) -> Tensor:
    return _attend(x.query, x.key, x.value)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, contrast: float = 1.0
) -> Tensor:
    """Attend in chunks; `bias` [B, 1, 1 or N_q, N_k] is added to the logits."""
    result, start = [], 0
    for rows in _chunks(query * query.shape[-1] ** -0.5):
        logits = rows @ key.mT
        if bias is not None:
            logits = logits + (bias if bias.shape[2] == 1 else bias[:, :, start : start + rows.shape[2]])
        weights = logits.softmax(-1)
        if contrast != 1.0:
            mean = 1 / key.shape[2]
            weights = (contrast * (weights - mean) + mean).clamp(0, 1)
        result.append(weights @ value)
        start += rows.shape[2]
    return torch.cat(result, 2)


def attention_counts(x: Inputs) -> Tensor:
    return _attend(x.query, x.key, x.value, bias=x.counts.to(x.query.dtype).log().unsqueeze(2))


def attention_contrast(x: Inputs) -> Tensor:
    return _attend(x.query, x.key, x.value, contrast=CONTRAST)


def attention_labels(x: Inputs) -> Tensor:
    return _attend_where_sets_meet(x, x.bit_sets)


def attention_half_labels(x: Inputs) -> Tensor:
    return _attend_where_sets_meet(x, x.half_sets)


def _attend_where_sets_meet(x: Inputs, sets: Tensor) -> Tensor:
    seen = (sets.unsqueeze(-1) & sets.unsqueeze(-2)) != 0
    return _attend(
        x.query,
        x.key,
        x.value,
        bias=torch.zeros_like(seen, dtype=x.query.dtype).masked_fill(~seen, float("-inf")).unsqueeze(1),
    )


def attention_segments(x: Inputs) -> Tensor:
    return _attend(x.query, torch.cat((x.ref_query, x.key), 2), torch.cat((x.value, x.value), 2))


def label_mass(x: Inputs) -> Tensor:
    members = one_hot(x.classes.long(), NUM_LABELS).to(x.query.dtype).unsqueeze(1)
    return _attend(x.query, x.key, members.expand(-1, x.key.shape[1], -1, -1))


def mean_attention_map(x: Inputs) -> Tensor:
    scale = x.query.shape[-1] ** -0.5
    return torch.cat([(rows @ x.key.mT * scale).softmax(-1).mean(1) for rows in _chunks(x.query)], 1)


def qalign_attention(x: Inputs) -> Tensor:
    index = similarity_argmax(x)[0]
    return _attend(x.query, _gather(x.key, index), _gather(x.value, index))


def qalign_attention_by_sdpa(x: Inputs) -> Tensor:
    index = similarity_argmax(x)[0]
    return scaled_dot_product_attention(x.query, _gather(x.key, index), _gather(x.value, index))


def qalign_attention_warped_output(x: Inputs) -> Tensor:
    return _gather(_attend(x.ref_query, x.key, x.value), similarity_argmax(x)[0])


def qalign_attention_guided(x: Inputs) -> Tensor:
    query, reference = normalize(x.query, dim=-1), normalize(x.ref_query, dim=-1)
    scale = x.query.shape[-1] ** -0.5
    pairs = zip(_chunks(x.query), _chunks(query))
    return torch.cat(
        [
            (scale * (rows @ x.key.mT) + STRENGTH * (unit @ reference.mT)).softmax(-1) @ x.value
            for rows, unit in pairs
        ],
        2,
    )


def qalign_attention_topk(x: Inputs) -> Tensor:
    index = similarity_topk(x)[0]
    result = []
    for rows, chosen in zip(_chunks(x.query), _chunks(index)):
        key, value = (_gather(t, chosen.flatten(2)).unflatten(2, chosen.shape[2:]) for t in (x.key, x.value))
        weights = ((rows.unsqueeze(3) * key).sum(-1) * rows.shape[-1] ** -0.5).softmax(-1)
        result.append((weights.unsqueeze(-1) * value).sum(3))
    return torch.cat(result, 2)


def attention_gradient(x: Inputs) -> tuple[Tensor, ...]:
    """Compute the gradients by SDPA."""
    return gradient(scaled_dot_product_attention, x)


def gradient(attend: Callable[..., Tensor], x: Inputs) -> tuple[Tensor, ...]:
    """Compute the gradients of query, key and value, for an output weighted by `output_gradient`."""
    leaves = learned(x.query, x.key, x.value)
    with torch.enable_grad():
        return torch.autograd.grad(attend(*leaves), leaves, grad_outputs=x.output_gradient)


def distillation_step(x: Inputs) -> tuple[Tensor, ...]:
    """Compute Attention Distillation by two SDPA calls and an L1.

    Returns:
        The gradients of query, key and value, and the loss.
    """
    leaves = learned(x.query, x.key, x.value)
    ideal = scaled_dot_product_attention(x.query, x.ref_query, x.value)
    with torch.enable_grad():
        query, key, value = leaves
        loss = l1_loss(scaled_dot_product_attention(query, key, value), ideal)
        return *torch.autograd.grad(loss, leaves), loss.detach()
