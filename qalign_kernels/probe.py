"""Where attention goes: its mass on each class of keys, and its map averaged over heads."""

from torch import Tensor

from . import _ambient, _backends, _contracts, _library
from .tiled import probe as tiled


@_ambient.public
def label_mass(
    query: Tensor,
    key: Tensor,
    key_labels: Tensor,
    num_labels: int,
    *,
    scale: float | None = None,
    counts: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Measure how much of each query's attention falls on each class of keys.

    mass_il = Σ_{j : label_j = l} m_j e^{l_ij} / Σ_j m_j e^{l_ij},  l_ij = scale · q_i·k_j

    Args:
        query: [B, H, N_q, D], float16, bfloat16 or float32, any strides. The reference and tiled backends
            also take float64.
        key: [B, H, N_k, D], same dtype and device as `query`, any strides.
        key_labels: int32 class numbers [B or 1, N_k] in [0, num_labels). A key outside that range belongs to
            no class, but still takes part in the softmax.
        num_labels: L, the number of classes, at least 1. The Triton kernel serves L ≤ 128.
        scale: factor of the dot product. None: 1/sqrt(D).
        counts: int32 [B, 1 or H, N_k], the multiplicity m_j of each key. None: every key counts once.
        backend: "auto", "triton", "tiled" or "reference". None: the default of `use_backend`.

    Returns:
        float32 [B, H, N_q, L] (float64 for float64 input). A row sums to 1 if every key has a class, and is 0
        if every key has multiplicity 0.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: `backend` cannot run this call or its second derivative; only the reference has one.

    Example:
        >>> from qalign_kernels import label_mass
        >>> query, key = torch.randn(1, 8, 256, 40), torch.randn(1, 8, 64, 40)
        >>> key_labels = (torch.arange(64, dtype=torch.int32) // 16).unsqueeze(0)  # four classes of 16 keys
        >>> mass = label_mass(query, key, key_labels, num_labels=4)
        >>> mass.shape
        torch.Size([1, 8, 256, 4])
        >>> torch.allclose(mass.sum(-1), torch.ones(1, 8, 256))
        True

    Memory: O(N L), never N_q×N_k. Deterministic, gradients too. Differentiable once in `query` and `key`, on
    the same backend.
    Source: Bounded Attention, arXiv 2403.16990 (the attention of a query to a region).
    """
    _check(query, key)
    _contracts.check_token_labels("key_labels", key_labels, query.shape[0], key.shape[2], "N_k", query.device)
    num_labels = _contracts.count("num_labels", num_labels)
    if counts is not None:
        _contracts.check_counts("counts", counts, query.shape[0], query.shape[1], key.shape[2], query.device)
    scale = _library.scale_of(query, scale)
    backend = _backends.requested(backend)
    if backend == "reference":
        return _backends.implementation("reference", "probe").label_mass(
            query, key, key_labels, num_labels, scale=scale, counts=counts
        )
    return _label_mass_op(query, key, key_labels, num_labels, scale, counts, backend)


@_ambient.public
def mean_attention_map(
    query: Tensor, key: Tensor, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Compute the attention map, averaged over heads.

    map_ij = 1/H Σ_h softmax_j(scale · q_hi·k_hj)

    Args:
        query: [B, H, N_q, D], float16, bfloat16 or float32, any strides. The reference and tiled backends
            also take float64.
        key: [B, H, N_k, D], same dtype and device as `query`, any strides.
        scale: factor of the dot product. None: 1/sqrt(D).
        backend: "auto", "triton", "tiled" or "reference". None: the default of `use_backend`.

    Returns:
        float32 [B, N_q, N_k] (float64 for float64 input). Each row sums to 1.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: `backend` cannot run this call.

    Example:
        >>> from qalign_kernels import mean_attention_map
        >>> query, key = torch.randn(1, 8, 256, 40), torch.randn(1, 8, 64, 40)
        >>> mean_attention_map(query, key).shape
        torch.Size([1, 256, 64])

    Memory: the result, which is the only N_q×N_k tensor of this library, and O(N) besides. With gradients,
    one head's map more. Deterministic. Differentiable in `query` and `key`, on the tiled path.
    Source: self-segmentation, arXiv 2303.11306; Cross-Image attention, arXiv 2311.03335.
    """
    _check(query, key)
    scale = _library.scale_of(query, scale)
    backend = _backends.requested(backend)
    if backend == "reference":
        return _backends.implementation("reference", "probe").mean_attention_map(query, key, scale=scale)
    if _library.wants_gradient(query, key):
        backend = _backends.with_gradient("mean_attention_map", backend, query, (query.shape[3],))
    return _mean_map_op(query, key, scale, backend)


def _check(query: Tensor, key: Tensor) -> None:
    _contracts.check_features("query", query)
    _contracts.check_features("key", key)
    _contracts.check_like("key", key, "query", query)
    _contracts.check_sizes("key", key, batch=query.shape[0], heads=query.shape[1], head_dim=query.shape[3])


def _label_mass_implementation(query, key, key_labels, num_labels, scale, counts, backend):
    chosen = _backends.select("label_mass", backend, query, (query.shape[3],), num_labels=num_labels)
    return _backends.implementation(chosen, "probe").label_mass(
        query, key, key_labels, num_labels, scale=scale, counts=counts
    )


def _mean_map_implementation(query, key, scale, backend):
    chosen = _backends.select("mean_attention_map", backend, query, (query.shape[3],))
    return _backends.implementation(chosen, "probe").mean_attention_map(query, key, scale=scale)


def _label_mass_fake(query, key, key_labels, num_labels, scale, counts, backend):
    return query.new_empty((*query.shape[:3], num_labels), dtype=_library.accumulate_dtype(query))


def _mean_map_fake(query, key, scale, backend):
    return query.new_empty(
        (query.shape[0], query.shape[2], key.shape[2]), dtype=_library.accumulate_dtype(query)
    )


def _label_mass_backward_implementation(
    grad_mass, mass, query, key, key_labels, num_labels, scale, counts, needs, backend
):
    chosen = _backends.select("label_mass", backend, query, (query.shape[3],), num_labels=num_labels)
    grads = _backends.implementation(chosen, "probe").label_mass_backward(
        grad_mass, mass, query, key, key_labels, num_labels, scale=scale, counts=counts, needs=needs
    )
    return [query.new_empty(0) if grad is None else grad for grad in grads]


def _label_mass_backward_fake(
    grad_mass, mass, query, key, key_labels, num_labels, scale, counts, needs, backend
):
    return [x.new_empty(x.shape if needed else 0) for x, needed in zip((query, key), needs)]


_label_mass_backward_op = _library.register(
    "label_mass_backward",
    "(Tensor grad_mass, Tensor mass, Tensor query, Tensor key, Tensor key_labels, SymInt num_labels, "
    "float scale, Tensor? counts, bool[] needs, str backend) -> Tensor[]",
    _label_mass_backward_implementation,
    _label_mass_backward_fake,
    **_library.no_second_derivative("label_mass", "only backend='reference' has every derivative"),
)


def _setup_context(ctx, inputs, output):
    query, key, key_labels, ctx.num_labels, ctx.scale, counts, ctx.backend = inputs
    ctx.save_for_backward(output, query, key, key_labels, counts)


def _label_mass_backward(ctx, grad_mass):
    (mass, query, key, key_labels, counts), needs = ctx.saved_tensors, list(ctx.needs_input_grad[:2])
    grads = _label_mass_backward_op(
        grad_mass, mass, query, key, key_labels, ctx.num_labels, ctx.scale, counts, needs, ctx.backend
    )
    return *(grad if needed else None for grad, needed in zip(grads, needs)), *[None] * 5


_label_mass_op = _library.register(
    "label_mass",
    "(Tensor query, Tensor key, Tensor key_labels, SymInt num_labels, float scale, Tensor? counts, "
    "str backend) -> Tensor",
    _label_mass_implementation,
    _label_mass_fake,
    setup_context=_setup_context,
    backward=_label_mass_backward,
)


def _setup_map_context(ctx, inputs, output):
    query, key, ctx.scale, _ = inputs
    ctx.save_for_backward(query, key)


def _mean_map_backward(ctx, grad):
    grads = _mean_map_backward_op(grad, *ctx.saved_tensors, ctx.scale)
    return *(x if needed else None for x, needed in zip(grads, ctx.needs_input_grad)), None, None


_mean_map_backward_op = _library.register(
    "mean_attention_map_backward",
    "(Tensor grad, Tensor query, Tensor key, float scale) -> (Tensor, Tensor)",
    lambda grad, query, key, scale: tiled.mean_attention_map_backward(grad, query, key, scale=scale),
    lambda grad, query, key, scale: (query.new_empty(query.shape), key.new_empty(key.shape)),
    **_library.no_second_derivative("mean_attention_map", "only backend='reference' has every derivative"),
)
_mean_map_op = _library.register(
    "mean_attention_map",
    "(Tensor query, Tensor key, float scale, str backend) -> Tensor",
    _mean_map_implementation,
    _mean_map_fake,
    setup_context=_setup_map_context,
    backward=_mean_map_backward,
)
