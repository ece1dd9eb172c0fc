"""Checks of measured results: sampled query rows against float64, under the error budget."""

from typing import Any

import torch
from torch import Tensor

import qalign_kernels as qk

from .. import Segment, _backends, testing
from ..segments import Guide
from ..unit_features import unit
from .measure import Inputs

CHECKED_ROWS = 256
TOPK, STRENGTH = 8, 20.0


def sampled_rows(x: Inputs) -> Tensor:
    """Choose query rows at equal distances, with the first and the last."""
    tokens = x.query.shape[2]
    return torch.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS), device=x.query.device).long()


def _double(*tensors: Tensor) -> list[Tensor]:
    return [x.double() for x in tensors]


def _reference(stem: str) -> Any:
    return _backends.implementation("reference", stem)


def _scores(x: Inputs, similarity: str, joint: bool, labels: bool) -> tuple[Tensor, Tensor]:
    """Compute the scores of the sampled rows in the input dtype and in float64."""
    rows = sampled_rows(x)
    query, sets = x.query[:, :, rows], (x.query_bit_sets[:, rows], x.bit_sets) if labels else ()
    return tuple(
        _reference("similarity").scores(*pair, similarity, joint, *sets)
        for pair in ((query, x.ref_query), _double(query, x.ref_query))
    )


def check_match(
    x: Inputs, match: Any, similarity: str, joint: bool, packed: bool = False, labels: bool = False
) -> bool:
    reduction = x.query.shape[3] * (x.query.shape[1] if joint else 1)
    index, score = (part[:, :, sampled_rows(x)] for part in match)
    return testing.judge_match(
        index, score, *_scores(x, similarity, joint, labels), reduction, packed=packed
    ).passed


def check_attention(
    x: Inputs,
    output: Tensor,
    segments: list[Segment],
    contrast: float = 1.0,
    labels: Tensor | None = None,
    guide: Guide | None = None,
) -> bool:
    rows = sampled_rows(x)
    query = x.query[:, :, rows]
    restricted = {"query_labels": None if labels is None else labels[:, rows]}
    scale, reduction = query.shape[-1] ** -0.5, sum(s.key.shape[2] for s in segments)
    results = []
    for dtype in (query.dtype, torch.float64):
        parts = [
            Segment(s.key.to(dtype), s.value.to(dtype), counts=s.counts, labels=s.labels) for s in segments
        ]
        guided = (
            None
            if guide is None
            else Guide(guide.query[:, :, rows].to(dtype), guide.key.to(dtype), guide.strength)
        )
        results.append(
            _reference("attention").attention(
                query.to(dtype), parts, scale=scale, contrast=contrast, guide=guided, **restricted
            )[0]
        )
    same, truth = results
    return testing.judge(output[:, :, rows], same, truth, reduction).passed


def _check_counted(x: Inputs, output: Tensor, index: Tensor) -> bool:
    counts = torch.zeros((*index.shape[:2], x.key.shape[2]), device=index.device, dtype=torch.int32)
    counts.scatter_add_(2, index.long(), torch.ones_like(index))
    return check_attention(x, output, [Segment(x.key, x.value, counts=counts)])


def joint_map(x: Inputs, backend: str) -> qk.Match:
    return qk.similarity_argmax(x.query, x.ref_query, backend=backend)


def check_qalign(x: Inputs, output: Tensor, backend: str) -> bool:
    match = joint_map(x, backend)
    return check_match(x, match, "cosine", True) and _check_counted(x, output, match.index)


def check_warped_output(x: Inputs, output: Tensor, backend: str) -> bool:
    match, rows = joint_map(x, backend), sampled_rows(x)
    index = match.index[:, :, rows].long().unsqueeze(-1)
    matched_query = x.ref_query.gather(2, index.expand(-1, x.ref_query.shape[1], -1, x.ref_query.shape[3]))
    reference, scale = _reference("attention").attention, x.query.shape[3] ** -0.5
    parts = (matched_query, x.key, x.value)
    same, truth = (
        reference(query, [Segment(key, value)], scale=scale)[0]
        for query, key, value in (parts, _double(*parts))
    )
    return (
        check_match(x, match, "cosine", True)
        and testing.judge(output[:, :, rows], same, truth, x.query.shape[3] + x.key.shape[2]).passed
    )


def check_guided(x: Inputs, output: Tensor, backend: str) -> bool:
    return check_attention(
        x, output, [Segment(x.key, x.value)], guide=Guide(unit(x.query), unit(x.ref_query), STRENGTH)
    )


def check_topk_attention(x: Inputs, output: Tensor, backend: str) -> bool:
    match = qk.similarity_topk(x.query, x.ref_query, TOPK, backend=backend)
    rows = sampled_rows(x)
    index, reference, scale = (
        match.index[:, :, rows],
        _reference("qalign_attention").topk_attention,
        x.query.shape[3] ** -0.5,
    )
    parts = (x.query[:, :, rows], x.key, x.value)
    same, truth = reference(*parts, index, scale=scale), reference(*_double(*parts), index, scale=scale)
    return (
        check_match(x, match, "cosine", True) and testing.judge(output[:, :, rows], same, truth, TOPK).passed
    )


def check_probe(x: Inputs, result: Tensor, name: str, *more: Any, token_axis: int) -> bool:
    rows, function, scale = sampled_rows(x), getattr(_reference("probe"), name), x.query.shape[3] ** -0.5
    query = x.query[:, :, rows]
    same, truth = (
        function(query, x.key, *more, scale=scale),
        function(*_double(query, x.key), *more, scale=scale),
    )
    return testing.judge(result.index_select(token_axis, rows), same, truth, x.key.shape[2]).passed


def check_gather(x: Inputs, result: tuple[Tensor, Tensor], backend: str) -> bool:
    truth = _reference("rearrange").rearrange_kv(x.key, x.value, x.match_map)
    return all(torch.equal(mine, theirs) for mine, theirs in zip(result, truth))


def gradient(x: Inputs, backend: str, shared: bool = False) -> tuple[Tensor, ...]:
    """Compute the gradients of query, key and value for an output weighted by `output_gradient`.

    With `shared`, each query row reads its keys through a batch index.
    """
    leaves = learned(x.query, x.key, x.value)
    batch_index = torch.arange(x.query.shape[0], device=x.query.device, dtype=torch.int32) if shared else None
    with torch.enable_grad():
        output = qk.attention(leaves[0], Segment(*leaves[1:], batch_index=batch_index), backend=backend)
        return torch.autograd.grad(output, leaves, grad_outputs=x.output_gradient)


def check_gradient(x: Inputs, gradients: tuple[Tensor, ...], backend: str, shared: bool = False) -> bool:
    """Check the gradients of the sampled queries, and those of keys and values in a second call.

    The gradients of keys and values are sums over all queries, so the second call has the sampled queries
    alone.
    """
    rows = sampled_rows(x)
    few = x._replace(query=x.query[:, :, rows], output_gradient=x.output_gradient[:, :, rows])
    names = ("query", "key", "value", "output_gradient")
    doubled = few._replace(**{name: getattr(few, name).double() for name in names})
    ours = (gradients[0][:, :, rows], *gradient(few, backend, shared)[1:])
    return all(
        testing.judge(*three, 4 * x.key.shape[2]).passed
        for three in zip(ours, gradient(few, "reference"), gradient(doubled, "reference"))
    )


def _loss_scale(x: Inputs) -> float:
    """The initial scale of torch's GradScaler for float16, whose smallest number is 6e-8, else 1."""
    return 65536.0 if x.query.dtype == torch.float16 else 1.0


def distillation_step(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    """Compute the distillation loss of an attention output and its gradients in query, key and value.

    Returns:
        The gradients of the loss times `_loss_scale`, and the loss itself.
    """
    leaves = learned(x.query, x.key, x.value)
    with torch.enable_grad():
        output = qk.attention(leaves[0], Segment(*leaves[1:]), backend=backend)
        loss = qk.distillation_loss(output, x.query, x.ref_query, x.value, backend=backend)
        return *torch.autograd.grad(loss * _loss_scale(x), leaves), loss.detach()


def check_step(x: Inputs, result: tuple[Tensor, ...], backend: str) -> bool:
    """Check the loss, and the gradients for the signs that the backend itself computes."""
    # with gradients attention may differ in bits from attention without
    leaves = learned(x.query, x.key, x.value)
    with torch.enable_grad():
        output = qk.attention(leaves[0], Segment(*leaves[1:]), backend=backend).detach().requires_grad_()
        loss = qk.distillation_loss(output, x.query, x.ref_query, x.value, backend=backend)
        (signs,) = torch.autograd.grad(loss * _loss_scale(x), output)
    rows = sampled_rows(x)
    few = output.detach()[:, :, rows], x.query[:, :, rows], x.ref_query, x.value
    ours, same, truth = (
        qk.distillation_loss(*parts, backend=name).to(parts[0].dtype)
        for parts, name in ((few, backend), (few, "reference"), (_double(*few), "reference"))
    )
    right = testing.judge(ours, same, truth, x.key.shape[2]).passed and bool(result[3].isfinite())
    return right and check_gradient(x._replace(output_gradient=signs), result[:3], backend)


def learned(*tensors: Tensor) -> list[Tensor]:
    """Copy tensors to leaves that require gradients."""
    return [x.detach().requires_grad_() for x in tensors]
