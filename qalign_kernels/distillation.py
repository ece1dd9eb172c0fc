"""Attention distillation: the distance of an attention output from attention to reference images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _ambient, _backends, _contracts, _library
from .segments import Segment


@_ambient.public
def distillation_loss(
    output: Tensor,
    query: Tensor,
    ref_key: Tensor | Sequence[Tensor],
    ref_value: Tensor | Sequence[Tensor],
    *,
    scale: float | None = None,
    query_labels: Tensor | None = None,
    ref_labels: Tensor | Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the mean absolute difference between an attention output and an ideal one.

    loss = mean |output - sg(ideal)|
    ideal = attention(query, [Segment(ref_key, ref_value, labels=ref_labels), ...])

    The ideal output attends to the reference images. sg stops the gradient: dloss/doutput =
    sign(output - ideal) / numel(output), and query, keys and values have no gradient here.

    Args:
        output: [B, H, N_q, D_v], float16, bfloat16 or float32, any strides. The reference and tiled backends
            also take float64.
        query: [B, H, N_q, D], same dtype and device as `output`.
        ref_key: [B or 1, H, N_k, D], same dtype and device. A single row serves the whole batch without a
            copy. For several reference images, a sequence of such tensors; their keys are attended to
            together.
        ref_value: [B or 1, H, N_k, D_v], a tensor or a sequence as `ref_key` is.
        scale: factor of the dot product. None: 1/sqrt(D).
        query_labels: int32 bit sets [B or 1, N_q]. Required if `ref_labels` is given. None: no restriction.
        ref_labels: int32 bit sets [B or 1, N_k]. A query sees a key only if their sets share a bit. For
            several reference images, a sequence, with None for an image that every query sees. None: no
            restriction.
        backend: "auto", "triton", "tiled" or "reference". None: the default of `use_backend`.

    Returns:
        The loss, a float32 scalar (float64 for float64 input). The ideal output is rounded to the dtype of
        `query`. A query that sees no key has ideal 0. NaN gives NaN.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: `backend` cannot run this call, or a second derivative is needed.

    Example:
        >>> from qalign_kernels import Segment, attention, distillation_loss
        >>> query, ref_key, ref_value = torch.randn(3, 1, 8, 256, 40)
        >>> output = torch.zeros(1, 8, 256, 40, requires_grad=True)
        >>> loss = distillation_loss(output, query, ref_key, ref_value)
        >>> loss.shape
        torch.Size([])
        >>> ideal = attention(query, Segment(ref_key, ref_value))
        >>> torch.allclose(loss, ideal.abs().mean())
        True

    Memory: one int8 sign for each element of `output` if it needs a gradient. The ideal output exists one
    tile at a time, and no N_q×N_k map is stored. Deterministic. Differentiable once, in `output`.
    Source: Attention Distillation, arXiv 2502.20235. There, a query that sees no key has ideal NaN, not 0.
    """
    keys, values, labels = _check(output, query, ref_key, ref_value, query_labels, ref_labels)
    scale = _library.scale_of(query, scale)
    backend = _backends.requested(backend)
    if backend == "reference":
        segments = _segments(keys, values, labels, query.shape[0])
        module = _backends.implementation("reference", "distillation")
        return module.distillation_loss(output, query, segments, scale=scale, query_labels=query_labels)
    absent = query.new_empty(0, dtype=torch.int32)
    return _distillation_loss_op(
        output,
        query.detach(),
        [key.detach() for key in keys],
        [value.detach() for value in values],
        [absent if sets is None else sets for sets in labels],
        query_labels,
        scale,
        _library.wants_gradient(output),
        backend,
    )[0]


def _check(
    output, query, ref_key, ref_value, query_labels, ref_labels
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None]]:
    """Check the arguments; returns keys, values and labels, one of each for every reference image."""
    _contracts.check_features("query", query)
    _contracts.check_features("output", output)
    _contracts.check_like("output", output, "query", query)
    batch, heads, tokens, head_dim = query.shape
    _contracts.check_sizes("output", output, batch=batch, heads=heads, tokens=tokens)
    several = not isinstance(ref_key, Tensor)
    if several and not (isinstance(ref_key, (list, tuple)) and ref_key):
        _contracts.fail(
            "ref_key", "a tensor [B or 1, H, N_k, D] or a sequence of them", ref_key, error=TypeError
        )
    keys, values = (ref_key, ref_value) if several else ([ref_key], [ref_value])
    labels = [None] * len(keys) if ref_labels is None else ref_labels if several else [ref_labels]
    for argument, parts in (("ref_value", values), ("ref_labels", labels)):
        if not isinstance(parts, (list, tuple)) or len(parts) != len(keys):
            _contracts.fail(argument, f"a sequence of {len(keys)}, one for each ref_key", parts)
    if query_labels is not None:
        _contracts.check_token_labels("query_labels", query_labels, batch, tokens, "N_q", query.device)
    for position, (key, value, sets) in enumerate(zip(keys, values, labels)):
        key_name, value_name, labels_name = (
            f"{name}[{position}]" if several else name for name in ("ref_key", "ref_value", "ref_labels")
        )
        for name, tensor in ((key_name, key), (value_name, value)):
            _contracts.check_features(name, tensor)
            _contracts.check_like(name, tensor, "query", query)
        if key.shape[0] not in (1, batch):
            _contracts.fail(key_name, f"batch={batch}, that of query, or 1", key)
        _contracts.check_sizes(key_name, key, heads=heads, head_dim=head_dim)
        _contracts.check_sizes(
            value_name, value, batch=key.shape[0], heads=heads, tokens=key.shape[2], head_dim=output.shape[3]
        )
        if sets is None:
            continue
        _contracts.require_query_labels(query_labels, labels_name, batch, tokens)
        _contracts.check_token_labels(labels_name, sets, batch, key.shape[2], "N_k", query.device)
    return keys, values, labels


def _segments(
    keys: Sequence[Tensor], values: Sequence[Tensor], labels: Sequence[Tensor | None], batch: int
) -> tuple[Segment, ...]:
    """Make one segment for each image. A single row is repeated for the batch with stride 0."""
    rows = (batch, -1, -1, -1)
    return tuple(
        Segment(key.expand(rows), value.expand(rows), labels=sets)
        for key, value, sets in zip(keys, values, labels)
    )


def _implementation(output, query, keys, values, labels, query_labels, scale, differentiable, backend):
    segments = _segments(
        keys, values, [None if sets.numel() == 0 else sets for sets in labels], query.shape[0]
    )
    chosen = _backends.select("distillation_loss", backend, query, (query.shape[3], output.shape[3]))
    loss, signs = _backends.implementation(chosen, "distillation").distillation_loss(
        output, query, segments, scale=scale, query_labels=query_labels, need_signs=differentiable
    )
    return loss, _absent_signs(output) if signs is None else signs


def _absent_signs(output: Tensor) -> Tensor:
    return output.new_empty(0, dtype=torch.int8)


def _fake(output, query, keys, values, labels, query_labels, scale, differentiable, backend):
    signs = output.new_empty(output.shape, dtype=torch.int8) if differentiable else _absent_signs(output)
    return output.new_empty((), dtype=_library.accumulate_dtype(output)), signs


def _setup_context(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


def _backward(ctx, grad_loss, grad_signs):
    (signs,) = ctx.saved_tensors
    return _distillation_loss_backward_op(grad_loss, signs, ctx.dtype)


_distillation_loss_op = _library.register(
    "distillation_loss",
    "(Tensor output, Tensor query, Tensor[] keys, Tensor[] values, Tensor[] labels, Tensor? query_labels, "
    "float scale, bool differentiable, str backend) -> (Tensor, Tensor)",
    _implementation,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


_distillation_loss_backward_op = _library.register(
    "distillation_loss_backward",
    "(Tensor grad_loss, Tensor signs, ScalarType dtype) -> Tensor",
    lambda grad_loss, signs, dtype: torch.mul(signs, grad_loss / signs.numel()).to(dtype),
    lambda grad_loss, signs, dtype: signs.new_empty(signs.shape, dtype=dtype),
    **_library.no_second_derivative("distillation_loss", "the signs of its gradient are constant"),
)
