"""Attention of each query over k keys of its own."""

from torch import Tensor

from . import _backends, _library
from .tiled import qalign_attention as tiled


def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    *,
    scale: float | None = None,
    contrast: float = 1.0,
    batch_index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the attention of each query over k keys of its own.

    output_i = Σ_t w_it v_{index_it},  w_i = softmax_t(scale · q_i·k_{index_it})

    Args:
        query: [B, H, N_q, D].
        key: [B_r, H, N_k, D], same dtype and device as `query`. B_r = B unless `batch_index` is given.
        value: [B_r, H, N_k, D_v], same dtype and device.
        index: int32 [B, 1 or H, N_q, k], the keys of each query; -1 is absent.
        scale: factor of the dot product. None: 1/sqrt(D).
        contrast: as in `attention`, with N = k. 1.0 is softmax attention.
        batch_index: int32 [B], the row of `key` and `value` that each query row reads. None: its own row.
        backend: "auto", "triton", "tiled" or "reference". None: the default of `use_backend`.

    Returns:
        [B, H, N_q, D_v] in the dtype of `query`.

    Raises:
        RuntimeError: `backend` cannot run this call.

    Example:
        >>> from qalign_kernels import similarity_topk
        >>> from qalign_kernels.topk_attention import topk_attention
        >>> query, key, value = torch.randn(3, 1, 8, 64, 40)
        >>> index = similarity_topk(query, key, 4).index
        >>> topk_attention(query, key, value, index).shape
        torch.Size([1, 8, 64, 40])

    Memory: O(N k). Differentiable in query, key and value, on the tiled path.
    Source: the "topk" refinement of `qalign_attention`.
    """
    scale = _library.scale_of(query, scale)
    backend = _backends.requested(backend)
    if backend == "reference":
        module = _backends.implementation("reference", "qalign_attention")
        return module.topk_attention(
            query, key, value, index, scale=scale, contrast=contrast, batch_index=batch_index
        )
    if _library.wants_gradient(query, key, value):
        backend = _backends.with_gradient("topk_attention", backend, query, (query.shape[3], value.shape[3]))
    return _topk_attention_op(query, key, value, index, scale, contrast, batch_index, backend)


def _topk_attention_implementation(query, key, value, index, scale, contrast, batch_index, backend):
    dims = (query.shape[3], value.shape[3])
    chosen = _backends.select("topk_attention", backend, query, dims, max_k=index.shape[3])
    module = _backends.implementation(chosen, "qalign_attention")
    return module.topk_attention(
        query, key, value, index, scale=scale, contrast=contrast, batch_index=batch_index
    )


def _topk_attention_fake(query, key, value, index, scale, contrast, batch_index, backend):
    return query.new_empty((*query.shape[:3], value.shape[3]))


def _backward_implementation(grad, query, key, value, index, scale, contrast, batch_index):
    return tiled.topk_attention_backward(
        grad, query, key, value, index, scale=scale, contrast=contrast, batch_index=batch_index
    )


def _setup_context(ctx, inputs, output):
    query, key, value, index, ctx.scale, ctx.contrast, batch_index, _ = inputs
    ctx.save_for_backward(query, key, value, index, batch_index)


def _backward(ctx, grad):
    *tensors, batch_index = ctx.saved_tensors
    grads = _backward_op(grad, *tensors, ctx.scale, ctx.contrast, batch_index)
    return *(x if needed else None for x, needed in zip(grads, ctx.needs_input_grad)), *[None] * 5


_backward_op = _library.register(
    "topk_attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor index, float scale, float contrast, "
    "Tensor? batch_index) -> (Tensor, Tensor, Tensor)",
    _backward_implementation,
    lambda grad, query, key, value, *_: tuple(x.new_empty(x.shape) for x in (query, key, value)),
    **_library.no_second_derivative("topk_attention", "only backend='reference' has every derivative"),
)
_topk_attention_op = _library.register(
    "topk_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor index, float scale, float contrast, "
    "Tensor? batch_index, str backend) -> Tensor",
    _topk_attention_implementation,
    _topk_attention_fake,
    setup_context=_setup_context,
    backward=_backward,
)
