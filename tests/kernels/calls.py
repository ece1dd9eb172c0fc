"""Calls of every public op with each optional argument that changes its way, for sweeps over all ops."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import qalign_kernels as qk
from qalign_kernels import Segment
from qalign_kernels.qalign_attention import REFINEMENTS


class Inputs(NamedTuple):
    """Small tensors that every call takes what it needs of."""

    query: Tensor  # [B, H, N, D]
    reference: Tensor
    key: Tensor
    value: Tensor
    labels: Tensor  # int32 [B, N], bit sets 1 to 3
    counts: Tensor  # int32 [B, 1, N], 0 to 2
    rows: Tensor  # int32 [B], all zero

    def leaves(self) -> list[Tensor]:
        return list(self[:4])

    def of(self, leaves: list[Tensor]) -> "Inputs":
        return Inputs(*leaves, *self[4:])


def inputs(
    batch: int = 2, tokens: int = 12, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    leaves = torch.randn(4, batch, 2, tokens, 16, generator=generator).to(device, dtype).unbind(0)
    labels = torch.arange(tokens, dtype=torch.int32, device=device).remainder(3).add(1).expand(batch, -1)
    counts = torch.arange(tokens, dtype=torch.int32, device=device).remainder(3).expand(batch, 1, -1)
    rows = torch.zeros(batch, dtype=torch.int32, device=device)
    return Inputs(*leaves, labels.contiguous(), counts.contiguous(), rows)


Call = Callable[[Inputs, str | None], Tensor]


def _attention(x: Inputs, backend: str | None, *, segments: int = 1, **settings: Any) -> Tensor:
    names = ("counts", "batch_index", "logit_scale", "logit_shift", "labels")
    own = {name: settings.pop(name) for name in names if name in settings}
    given = {name: value(x) if callable(value) else value for name, value in own.items()}
    parts = [Segment(x.key, x.value, **given), Segment(x.reference, x.value)][:segments]
    labels = x.labels if "labels" in given else None
    return qk.attention(x.query, parts, query_labels=labels, backend=backend, **settings)


def _similarity(
    x: Inputs, backend: str | None, *, labelled: bool = False, rows: bool = False, k: int = 0, **settings: Any
) -> Tensor:
    if labelled:
        settings |= {"query_labels": x.labels, "reference_labels": x.labels}
    settings |= {"batch_index": x.rows} if rows else {}
    if k:
        return qk.similarity_topk(x.query, x.reference, k, backend=backend, **settings).score
    return qk.similarity_argmax(x.query, x.reference, backend=backend, **settings).score


def _qalign(
    x: Inputs, backend: str | None, *, labelled: bool = False, rows: bool = False, **settings: Any
) -> Tensor:
    settings |= {"query_labels": x.labels, "ref_labels": x.labels} if labelled else {}
    settings |= {"batch_index": x.rows} if rows else {}
    settings |= {"own_key": x.key} if settings.get("refinement") == "warped_values" else {}
    return qk.qalign_attention(x.query, x.reference, x.key, x.value, topk=3, backend=backend, **settings)


def _match(x: Inputs) -> Tensor:
    return qk.similarity_argmax(x.query.detach(), x.reference.detach(), backend="reference").index


CALLS: dict[str, Call] = {
    "similarity_argmax": _similarity,
    "similarity_argmax per head": functools.partial(_similarity, heads="per_head"),
    "similarity_argmax dot": functools.partial(_similarity, similarity="dot"),
    "similarity_argmax labels": functools.partial(_similarity, labelled=True),
    "similarity_argmax rows": functools.partial(_similarity, rows=True),
    "similarity_topk": functools.partial(_similarity, k=3),
    "similarity_topk labels": functools.partial(_similarity, k=3, labelled=True),
    "match_counts": lambda x, backend: (
        qk.match_counts(_match(x), x.reference.shape[2], backend=backend).float() * x.query.mean()
    ),
    "rearrange_kv": lambda x, backend: torch.cat(qk.rearrange_kv(x.key, x.value, _match(x), backend=backend)),
    "attention": _attention,
    "attention scale": functools.partial(_attention, scale=0.3),
    "attention contrast": functools.partial(_attention, contrast=1.67),
    "attention segments": functools.partial(_attention, segments=2),
    "attention counts": functools.partial(_attention, counts=lambda x: x.counts),
    "attention labels": functools.partial(_attention, labels=lambda x: x.labels),
    "attention rows": functools.partial(_attention, batch_index=lambda x: x.rows),
    "attention logits": functools.partial(_attention, logit_scale=0.7, logit_shift=0.2),
    "attention_with_lse": lambda x, backend: (
        qk.attention_with_lse(x.query, Segment(x.key, x.value), backend=backend).lse
    ),
    "label_mass": lambda x, backend: qk.label_mass(x.query, x.key, x.labels, 4, backend=backend),
    "label_mass counts": lambda x, backend: qk.label_mass(
        x.query, x.key, x.labels, 4, scale=0.3, counts=x.counts, backend=backend
    ),
    "mean_attention_map": lambda x, backend: qk.mean_attention_map(x.query, x.key, backend=backend),
    "distillation_loss": lambda x, backend: qk.distillation_loss(
        x.value, x.query, x.key, x.reference, backend=backend
    ),
    "distillation_loss labels": lambda x, backend: qk.distillation_loss(
        x.value, x.query, x.key, x.reference, query_labels=x.labels, ref_labels=x.labels, backend=backend
    ),
    **{f"qalign_attention {name}": functools.partial(_qalign, refinement=name) for name in REFINEMENTS},
    **{
        f"qalign_attention {name} labels rows": functools.partial(
            _qalign, refinement=name, labelled=True, rows=True
        )
        for name in REFINEMENTS
    },
    "qalign_attention contrast": functools.partial(_qalign, contrast=1.67),
    "qalign_attention topk contrast": functools.partial(_qalign, refinement="topk", contrast=1.67),
}


def gradients(call: Call, x: Inputs, backend: str | None) -> list[Tensor | None]:
    """The gradients of a weighted sum of the output, one for each leaf that the call reads."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in x.leaves()]
    output = call(x.of(leaves), backend)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    return list(torch.autograd.grad((output * weight.view(output.shape)).sum(), leaves, allow_unused=True))
