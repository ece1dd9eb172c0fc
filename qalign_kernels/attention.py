"""Softmax attention over segments of keys: multiplicities, label sets, scale and shift per segment, contrast; differentiable."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backends, _contracts, _library


@dataclass(frozen=True, eq=False)
class Segment:
    """Keys and values that a query attends, and how.

    Attributes:
        key: [B_s, H, N_k, D]; value: [B_s, H, N_k, D_v], any strides. B_s = B of the query unless `batch_index` names rows.
        counts: int32 [B, 1 or H, N_k], the multiplicity of each key for each query row; 0 = absent. None: each once.
        labels: int32 bit sets [B or 1, N_k]; a query sees a key iff its set meets the key's. None: seen by every query.
        logit_scale, logit_shift: logits are logit_scale · scale · q·k + logit_shift.
        batch_index: int32 [B], the row of `key` and `value` that each query row reads; no copies are made.
    """

    key: Tensor
    value: Tensor
    counts: Tensor | None = field(default=None, kw_only=True)
    labels: Tensor | None = field(default=None, kw_only=True)
    logit_scale: float = field(default=1.0, kw_only=True)
    logit_shift: float = field(default=0.0, kw_only=True)
    batch_index: Tensor | None = field(default=None, kw_only=True)


class Guide(NamedTuple):
    """A second dot product on the logits of a single segment: + strength · query·key, [B, H, N_q, D_g] against [B_s, H, N_k, D_g]."""

    query: Tensor
    key: Tensor
    strength: float


class AttentionWithLse(NamedTuple):
    """Attention output and the log-sum-exp of its logits."""

    output: Tensor
    lse: Tensor


def attention(
    query: Tensor,
    segments: Segment | Sequence[Segment],
    *,
    scale: float | None = None,
    contrast: float = 1.0,
    query_labels: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention over one or several segments of keys, as over their concatenation.

    l_ij = logit_scale_s · scale · q_i·k_j + logit_shift_s;  Z_i = Σ_j m_j e^{l_ij};  p_ij = e^{l_ij} / Z_i
    output_i = Σ_j m_j w_ij v_j;  w_ij = p_ij for contrast 1, else clip(contrast · (p_ij - 1/N) + 1/N, 0, 1), N = Σ_j m_j

    m_j is the multiplicity (`Segment.counts`, 1 without). Sums run over the keys that query i sees; contrasted weights are not
    renormalised, and N counts every key, seen or not.

    Args:
        query: [B, H, N_q, D], float16, bfloat16 or float32 (float64: reference and tiled), any strides.
        segments: a `Segment` or a sequence of them, all with the same D_v, and the dtype and device of `query`.
        scale: of the dot product; None is 1/sqrt(D).
        contrast: c > 0 above; 1.0 is softmax attention, 1.67 is Cross-Image attention's.
        query_labels: int32 bit sets [B or 1, N_q]; background is -1, all bits. Needed where a segment has labels.
        backend: "auto", "triton", "tiled" or "reference"; None takes the default of `use_backend`.

    Returns:
        [B, H, N_q, D_v] in the dtype of `query`, contiguous. A query with no key to look at gives zeros. NaN gives NaN.

    Raises:
        TypeError, ValueError: a bad argument, named. RuntimeError: a `backend` that cannot run here, or a second derivative of one that can
        but for the reference.

    Precision: scores, softmax and sums in float32; probabilities are rounded to the input dtype before they meet the values.
    Memory: O(N), never N_q×N_k. Deterministic, gradients too. Differentiable in query, keys and values (once): from the saved output
    and log-sum-exp, on the backend of the call; with a contrast on the tiled path, which "triton" refuses.
    Source: Cross-Image attention, arXiv 2311.03335 (contrast); StyleAligned, arXiv 2312.02133 (shared segments, scale and shift);
    the multiplicity identity behind Q-Align, arXiv 2508.21090.
    """
    return _attend(query, segments, scale, contrast, query_labels, None, False, backend)[0]


def attention_with_lse(
    query: Tensor,
    segments: Segment | Sequence[Segment],
    *,
    scale: float | None = None,
    contrast: float = 1.0,
    query_labels: Tensor | None = None,
    backend: str | None = None,
) -> AttentionWithLse:
    """`attention` and the natural log-sum-exp of its logits, lse_i = log Z_i.

    Arguments, errors and precision as `attention`. Outputs of disjoint segments merge by their log-sum-exps:
    Σ_s w_s output_s, w_s = exp(lse_s) / Σ_r exp(lse_r).

    Returns:
        AttentionWithLse(output [B, H, N_q, D_v], lse float32 [B, H, N_q]); lse is -inf for a query with no key to look at (float64 for
        float64 input). Both are differentiable.
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
    """`attention` over one segment with logits + strength · guide.query_i·guide.key_j: the guided reading of `qalign_attention`."""
    return _attend(query, segment, scale, contrast, query_labels, guide, False, backend)[0]


def _attend(
    query, segments, scale, contrast, query_labels, guide, need_lse, backend
) -> tuple[Tensor, Tensor]:
    if not isinstance(segments, (Segment, list, tuple)):
        _contracts.fail("segments", "a Segment or a sequence of them", segments, error=TypeError)
    segments = (segments,) if isinstance(segments, Segment) else tuple(segments)
    _check(query, segments, scale, contrast, query_labels)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
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
        [float(s.logit_scale) for s in segments],
        [float(s.logit_shift) for s in segments],
        0.0 if guide is None else float(guide.strength),
        scale,
        float(contrast),
    )
    differentiable = _library.wants_gradient(query, *call.keys, *call.values, *call.guide_tensors)
    return _attention_op(*call, need_lse, differentiable, backend)


def _check(query, segments, scale, contrast, query_labels) -> None:
    _contracts.check_features("query", query)
    batch, _, tokens, _ = query.shape
    if not segments:
        raise ValueError("segments: expected at least one Segment, got none")
    if scale is not None:
        _contracts.check_number("scale", scale)
    _contracts.check_number("contrast", contrast, above=0)
    if query_labels is not None:
        _contracts.check_token_labels("query_labels", query_labels, batch, tokens, "N_q", query.device)
    for position, segment in enumerate(segments):
        if not isinstance(segment, Segment):
            _contracts.fail("segments", "Segment objects", segment, error=TypeError)
        name = "" if len(segments) == 1 else f"segments[{position}]."
        _check_segment(name, segment, query)
        if segment.labels is not None and query_labels is None:
            raise ValueError(
                f"query_labels: expected int32 bit sets [B={batch} or 1, N_q={tokens}] because {name}labels came, got None"
            )
        _contracts.check_sizes(f"{name}value", segment.value, head_dim=segments[0].value.shape[3])


def _check_segment(name: str, segment: Segment, query: Tensor) -> None:
    key, value = segment.key, segment.value
    for part, tensor in (("key", key), ("value", value)):
        _contracts.check_features(name + part, tensor)
        _contracts.check_like(name + part, tensor, "query", query)
    _contracts.check_sizes(f"{name}key", key, heads=query.shape[1], head_dim=query.shape[3])
    _contracts.check_sizes(
        f"{name}value", value, batch=key.shape[0], heads=query.shape[1], tokens=key.shape[2]
    )
    _contracts.check_batch_index(f"{name}batch_index", segment.batch_index, query, key.shape[0], f"{name}key")
    if segment.counts is not None:
        _contracts.check_counts(
            f"{name}counts", segment.counts, query.shape[0], query.shape[1], key.shape[2], query.device
        )
    if segment.labels is not None:
        _contracts.check_token_labels(
            f"{name}labels", segment.labels, query.shape[0], key.shape[2], "N_k", query.device
        )
    _contracts.check_number(f"{name}logit_scale", segment.logit_scale)
    _contracts.check_number(f"{name}logit_shift", segment.logit_shift)


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
    wanted, *needed = ctx.needs_input_grad[:4]
    needs = [wanted, *chain(*needed)]
    if grad_output is None:
        grad_output = query.new_zeros((*query.shape[:3], call.head_dims[1]))
    grad_lse = grad_lse if ctx.need_lse else None
    grads = _backward_op(grad_output, grad_lse, output, lse, *call, needs, ctx.backend)
    each = iter([grad if needed else None for grad, needed in zip(grads, needs)])
    return (
        next(each),
        *(list(islice(each, size)) for size in (n, n, ctx.guided)),
        *([None] * n for _ in range(3)),
        *[None] * 9,
    )


_attention_op = _library.register(
    "attention",
    f"({_SEGMENT_SCHEMA}, bool need_lse, bool differentiable, str backend) -> (Tensor, Tensor)",
    _implementation,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
