"""Softmax attention over segments of keys, with counts, labels, scale, shift and contrast. Differentiable."""

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ambient, _backends, _contracts, _library
from .segments import Guide, Segment, checked_segments


class AttentionWithLse(NamedTuple):
    """Attention output and the log-sum-exp of its logits.

    Attributes:
        output: [B, H, N_q, D_v] in the dtype of the query.
        lse: float32 [B, H, N_q] (float64 for float64 input), the natural logarithm; -inf for a query that
            sees no key.

    Example:
        >>> from qalign_kernels import Segment, attention_with_lse
        >>> query, key, value = torch.randn(3, 1, 8, 256, 40)
        >>> output, lse = attention_with_lse(query, Segment(key, value))
        >>> output.shape, lse.shape
        (torch.Size([1, 8, 256, 40]), torch.Size([1, 8, 256]))
    """

    output: Tensor
    lse: Tensor


@_ambient.public
def attention(
    query: Tensor,
    segments: Segment | Sequence[Segment],
    *,
    scale: float | None = None,
    contrast: float = 1.0,
    query_labels: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute softmax attention over one or several segments of keys.

    l_ij = logit_scale · scale · q_i·k_j + logit_shift,  Z_i = Σ_j m_j e^{l_ij},  p_ij = e^{l_ij} / Z_i
    output_i = Σ_j m_j w_ij v_j
    w_ij = p_ij for contrast 1, else clip(contrast · (p_ij - 1/N) + 1/N, 0, 1),  N = Σ_j m_j

    m_j is the multiplicity of key j (`Segment.counts`). The sums run over the keys that query i sees, in all
    segments together: the result is that of their concatenation. Contrasted weights are not renormalised, and
    N counts every key, seen or not.

    Args:
        query: [B, H, N_q, D], float16, bfloat16 or float32, any strides. The reference and tiled backends
            also take float64.
        segments: a `Segment` or a sequence of them, with the dtype and device of `query` and one common D_v.
        scale: factor of the dot product. None: 1/sqrt(D).
        contrast: above 0. 1.0 is softmax attention; Cross-Image attention uses 1.67.
        query_labels: int32 bit sets [B or 1, N_q]. Required if a segment has labels. A background token that
            sees every key has -1, which is all bits. None: no restriction.
        backend: "auto", "triton", "tiled" or "reference". None: the default of `use_backend`.

    Returns:
        [B, H, N_q, D_v] in the dtype of `query`, contiguous. A query that sees no key gives zeros. NaN in
        what a query reads gives NaN.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: `backend` cannot run this call or its second derivative; only the reference has one.

    Example:
        >>> from qalign_kernels import Segment, attention
        >>> query, own_key, own_value = torch.randn(3, 1, 8, 256, 40)
        >>> ref_key, ref_value = torch.randn(2, 1, 8, 64, 40)
        >>> attention(query, Segment(own_key, own_value)).shape
        torch.Size([1, 8, 256, 40])
        >>> segments = [Segment(own_key, own_value), Segment(ref_key, ref_value, logit_scale=1.2)]
        >>> attention(query, segments).shape
        torch.Size([1, 8, 256, 40])

    Precision: scores, softmax and sums are float32. Probabilities are rounded to the input dtype before they
    are multiplied by the values.
    Memory: O(N), never N_q×N_k. Deterministic, gradients too. Differentiable once in query, keys and values,
    on the same backend. With a contrast the gradient takes the tiled path, so "triton" raises.
    Source: Cross-Image attention, arXiv 2311.03335 (contrast); StyleAligned, arXiv 2312.02133 (shared
    segments, scale and shift); Q-Align, arXiv 2508.21090 (counts).
    """
    return _attend(query, segments, scale, contrast, query_labels, None, False, backend)[0]


@_ambient.public
def attention_with_lse(
    query: Tensor,
    segments: Segment | Sequence[Segment],
    *,
    scale: float | None = None,
    contrast: float = 1.0,
    query_labels: Tensor | None = None,
    backend: str | None = None,
) -> AttentionWithLse:
    """Compute `attention` and the natural log-sum-exp of its logits.

    lse_i = log Z_i, with Z_i as in `attention`

    The outputs of disjoint segments can be merged:
    output = Σ_s w_s output_s,  w_s = exp(lse_s) / Σ_r exp(lse_r)

    Args:
        query: [B, H, N_q, D], float16, bfloat16 or float32, any strides. The reference and tiled backends
            also take float64.
        segments: a `Segment` or a sequence of them, with the dtype and device of `query` and one common D_v.
        scale: factor of the dot product. None: 1/sqrt(D).
        contrast: above 0, as in `attention`; it does not change the log-sum-exp. 1.0 is softmax attention.
        query_labels: int32 bit sets [B or 1, N_q]. Required if a segment has labels. None: no restriction.
        backend: "auto", "triton", "tiled" or "reference". None: the default of `use_backend`.

    Returns:
        AttentionWithLse(output [B, H, N_q, D_v], lse float32 [B, H, N_q]). lse is float64 for float64 input,
        and -inf for a query that sees no key.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: `backend` cannot run this call or its second derivative; only the reference has one.

    Example:
        >>> from qalign_kernels import Segment, attention_with_lse
        >>> query, key, value = torch.randn(3, 1, 8, 256, 40)
        >>> whole = attention_with_lse(query, Segment(key, value))
        >>> whole.output.shape, whole.lse.shape
        (torch.Size([1, 8, 256, 40]), torch.Size([1, 8, 256]))
        >>> parts = [Segment(key[:, :, :100], value[:, :, :100]), Segment(key[:, :, 100:], value[:, :, 100:])]
        >>> lse = torch.stack([attention_with_lse(query, part).lse for part in parts])
        >>> torch.allclose(lse.logsumexp(0), whole.lse, atol=1e-5)
        True

    Memory: O(N), never N_q×N_k. Deterministic, gradients too. Both results are differentiable.
    Source: the online softmax, arXiv 1805.02867.
    """
    return AttentionWithLse(*_attend(query, segments, scale, contrast, query_labels, None, True, backend))


def guided_attention(
    query: Tensor,
    segment: Segment,
    guide: Guide,
    *,
    scale=None,
    contrast=1.0,
    query_labels=None,
    backend=None,
) -> Tensor:
    """Compute the "guided" refinement of `qalign_attention`: attention with a guide added to the logits."""
    return _attend(query, segment, scale, contrast, query_labels, guide, False, backend)[0]


def _attend(
    query, segments, scale, contrast, query_labels, guide, need_lse, backend
) -> tuple[Tensor, Tensor]:
    if not isinstance(segments, (Segment, list, tuple)):
        _contracts.fail("segments", "a Segment or a sequence of them", segments, error=TypeError)
    segments = (segments,) if isinstance(segments, Segment) else tuple(segments)
    _contracts.check_features("query", query)
    scale = _library.scale_of(query, scale)
    segments = checked_segments(query, segments, query_labels, scale)
    contrast = _contracts.number("contrast", contrast, above=0)
    backend = _backends.requested(backend)
    if backend == "reference":
        module = _backends.implementation("reference", "attention")
        return module.attention(
            query, segments, scale=scale, contrast=contrast, query_labels=query_labels, guide=guide
        )
    call = _Call(
        query,
        [s.key for s in segments],
        [s.value for s in segments],
        [] if guide is None else [guide.query, guide.key],
        [_or_absent(s.counts, query) for s in segments],
        [_or_absent(s.labels, query) for s in segments],
        [_or_absent(s.batch_index, query) for s in segments],
        query_labels,
        [s.logit_scale for s in segments],
        [s.logit_shift for s in segments],
        0.0 if guide is None else guide.strength,
        scale,
        contrast,
    )
    differentiable = _library.wants_gradient(query, *call.keys, *call.values, *call.guide_tensors)
    return _attention_op(*call, need_lse, differentiable, backend)


class _Call(NamedTuple):
    """What the registered op and its gradient both take, in the order of their schemas.

    A schema has no list of optional tensors, so an empty tensor stands for an absent one.
    """

    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    guide_tensors: list[Tensor]
    counts: list[Tensor]
    labels: list[Tensor]
    batch_index: list[Tensor]
    query_labels: Tensor | None
    logit_scale: list[float]
    logit_shift: list[float]
    guide_strength: float
    scale: float
    contrast: float

    @property
    def head_dims(self) -> tuple[int, int]:
        return self.query.shape[3], self.values[0].shape[3]

    @property
    def uses_saved_output(self) -> bool:
        """Whether the gradient is computed from the output and its log-sum-exp."""
        return self.contrast == 1.0 and not self.guide_tensors

    def segments(self) -> tuple[Segment, ...]:
        parts = zip(
            self.keys,
            self.values,
            *([_or_none(x) for x in tensors] for tensors in (self.counts, self.labels, self.batch_index)),
            self.logit_scale,
            self.logit_shift,
        )
        return tuple(
            Segment(
                key,
                value,
                counts=counts,
                labels=labels,
                batch_index=rows,
                logit_scale=logit_scale,
                logit_shift=logit_shift,
            )
            for key, value, counts, labels, rows, logit_scale, logit_shift in parts
        )

    def settings(self) -> dict[str, Any]:
        guide = None
        if self.guide_tensors:
            query, key = self.guide_tensors
            guide = Guide(query, key, self.guide_strength)
        return {
            "scale": self.scale,
            "contrast": self.contrast,
            "query_labels": self.query_labels,
            "guide": guide,
        }


def _or_absent(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.int32) if tensor is None else tensor


def _or_none(tensor: Tensor) -> Tensor | None:
    return None if tensor.numel() == 0 else tensor


def _implementation(*arguments) -> tuple[Tensor, Tensor]:
    *shared, need_lse, differentiable, backend = arguments
    call = _Call(*shared)
    saved = differentiable and call.uses_saved_output
    chosen = _backends.select(
        "attention", backend, call.query, call.head_dims, differentiable=differentiable and not saved
    )
    output, lse = _backends.implementation(chosen, "attention").attention(
        call.query, call.segments(), **call.settings(), need_lse=need_lse or saved
    )
    return output, _absent_lse(call.query) if lse is None else lse


def _absent_lse(query: Tensor) -> Tensor:
    return query.new_empty(0, dtype=_library.accumulate_dtype(query))


def _fake(*arguments) -> tuple[Tensor, Tensor]:
    *shared, need_lse, differentiable, _ = arguments
    call = _Call(*shared)
    shape, lse = call.query.shape[:3], _absent_lse(call.query)
    present = need_lse or (differentiable and call.uses_saved_output)
    return call.query.new_empty((*shape, call.head_dims[1])), lse.new_empty(shape) if present else lse


def _backward_implementation(grad_output, grad_lse, output, lse, *arguments) -> list[Tensor]:
    *shared, needs, backend = arguments
    call = _Call(*shared)
    chosen = _backends.select(
        "attention", backend, call.query, call.head_dims, differentiable=not call.uses_saved_output
    )
    grads = _backends.implementation(chosen, "attention").attention_backward(
        grad_output, grad_lse, output, lse, call.query, call.segments(), **call.settings(), needs=needs
    )
    return [call.query.new_empty(0) if grad is None else grad for grad in grads]


def _backward_fake(grad_output, grad_lse, output, lse, *arguments) -> list[Tensor]:
    *shared, needs, _ = arguments
    call = _Call(*shared)
    inputs = (call.query, *call.keys, *call.values, *call.guide_tensors)
    return [x.new_empty(x.shape if needed else 0) for x, needed in zip(inputs, needs)]


_SEGMENT_SCHEMA = (
    "Tensor query, Tensor[] keys, Tensor[] values, Tensor[] guide_tensors, Tensor[] counts, Tensor[] labels, "
    "Tensor[] batch_index, Tensor? query_labels, float[] logit_scale, float[] logit_shift, "
    "float guide_strength, float scale, float contrast"
)

_backward_op = _library.register(
    "attention_backward",
    f"(Tensor grad_output, Tensor? grad_lse, Tensor? output, Tensor? lse, {_SEGMENT_SCHEMA}, "
    "bool[] needs, str backend) -> Tensor[]",
    _backward_implementation,
    _backward_fake,
    **_library.no_second_derivative("attention", "only backend='reference' has every derivative"),
)


def _setup_context(ctx, inputs, output):
    *shared, ctx.need_lse, _, ctx.backend = inputs
    call = _Call(*shared)
    ctx.segments, ctx.guided, ctx.numbers = len(call.keys), len(call.guide_tensors), call[8:]
    results = output if call.uses_saved_output else (None, None)
    lists = chain(call.keys, call.values, call.guide_tensors, call.counts, call.labels, call.batch_index)
    ctx.save_for_backward(*results, call.query_labels, call.query, *lists)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_lse):
    (output, lse, query_labels, query, *saved), n = ctx.saved_tensors, ctx.segments
    lists = [list(islice(part, size)) for part in [iter(saved)] for size in (n, n, ctx.guided, n, n, n)]
    call = _Call(query, *lists, query_labels, *ctx.numbers)
    needs = list(ctx.needs_input_grad[: 1 + 2 * n + ctx.guided])
    if grad_output is None:
        grad_output = query.new_zeros((*query.shape[:3], call.head_dims[1]))
    grad_lse = grad_lse if ctx.need_lse else None
    grads = _backward_op(grad_output, grad_lse, output, lse, *call, needs, ctx.backend)
    return tuple(grad if needed else None for grad, needed in zip(grads, needs))


_attention_op = _library.register(
    "attention",
    f"({_SEGMENT_SCHEMA}, bool need_lse, bool differentiable, str backend) -> (Tensor, Tensor)",
    _implementation,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
