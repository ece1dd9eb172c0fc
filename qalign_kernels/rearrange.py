"""A match map as multiplicities of the reference tokens, and the explicit gather that Q-Align does not need."""

from torch import Tensor

from . import _ambient, _backends, _contracts, _library
from .tiled import rearrange as tiled


@_ambient.public
def match_counts(index: Tensor, num_tokens: int, *, backend: str | None = None) -> Tensor:
    """How often each reference token was chosen.

    counts_j = #{i : index_i = j}

    Args:
        index: int32 [B, 1 or H, N_q] as `similarity_argmax` returns it; -1 counts nowhere.
        num_tokens: N_k, the number of reference tokens.
        backend: "auto", "triton", "tiled" or "reference".

    Returns:
        int32 [B, 1 or H, N_k]; each row sums to the number of matched query tokens.

    Raises:
        TypeError, ValueError: a bad argument, named. RuntimeError: a `backend` that cannot run here.

    Memory: O(N). Deterministic (integer sums). No gradient.
    Source: the multiplicity identity behind Q-Align, arXiv 2508.21090.
    """
    if not isinstance(index, Tensor):
        _contracts.fail("index", "int32 [B, 1 or H, N_q]", index, error=TypeError)
    if index.dim() != 3 or any(size == 0 for size in index.shape):
        _contracts.fail("index", "int32 [B, 1 or H, N_q] with every size at least 1", index)
    _contracts.check_integers(
        "index",
        index,
        [(f"{name}={{}}", size) for name, size in zip(("B", "G", "N_q"), index.shape)],
        index.device,
    )
    _contracts.check_count("num_tokens", num_tokens)
    backend = _backends.requested(backend)
    if backend == "reference":
        return _backends.implementation("reference", "rearrange").match_counts(index, num_tokens)
    return _counts_op(index, num_tokens, backend)


@_ambient.public
def rearrange_kv(
    key: Tensor, value: Tensor, index: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Gather keys and values by a match map: K̃_i = K_{index_i}, Ṽ_i = V_{index_i}.

    `attention` over these equals `attention` over the originals with `counts=match_counts(index, N_k)`, which costs less and is what
    `qalign_attention` does; the gather is here for readers and for methods that need the order.

    Args:
        key: [B, H, N_k, D], value: [B, H, N_k, D_v], same dtype and device, any strides.
        index: int32 [B, 1 or H, N_q]; -1 gives a row of zeros.
        backend: "auto", "triton", "tiled" or "reference".

    Returns:
        (key [B, H, N_q, D], value [B, H, N_q, D_v]), contiguous.

    Raises:
        TypeError, ValueError: a bad argument, named. RuntimeError: a `backend` that cannot run here.

    Memory: the two results. Deterministic. Differentiable in `key` and `value`.
    Source: Q-Align, arXiv 2508.21090 (key-value rearrangement).
    """
    _contracts.check_features("key", key)
    _contracts.check_features("value", value)
    _contracts.check_like("value", value, "key", key)
    _contracts.check_sizes("value", value, batch=key.shape[0], heads=key.shape[1], tokens=key.shape[2])
    batch, heads = key.shape[:2]
    tokens = index.shape[-1] if isinstance(index, Tensor) and index.dim() == 3 else 0
    sizes = [("B={}", batch), ("1 or H={}", heads), ("N_q", tokens or -1)]
    _contracts.check_integers("index", index, sizes, key.device)
    if _backends.requested(backend) == "reference":
        return _backends.implementation("reference", "rearrange").rearrange_kv(key, value, index)
    return take_rows(key, index, backend=backend), take_rows(value, index, backend=backend)


def take_rows(x: Tensor, index: Tensor, *, backend: str | None = None) -> Tensor:
    """The tokens of [B, H, N_k, D] that a match map [B, 1 or H, N_q] names; zeros for -1. Tiled or Triton."""
    backend = _backends.requested(backend)
    if _library.wants_gradient(x):
        _backends.require_gradient("rearrange_kv", backend, x, ())
        backend = "tiled"
    return _take_rows_op(x, index, backend)


def take_batch_rows(x: Tensor, batch_index: Tensor | None) -> Tensor:
    """x[batch_index]; a gradient sums over the query rows that read the same row in the accumulate dtype."""
    if batch_index is None:
        return x
    if not _library.wants_gradient(x):
        return x.index_select(0, batch_index)
    return x.to(_library.accumulate_dtype(x)).index_select(0, batch_index).to(x.dtype)


def _counts_implementation(index, num_tokens, backend):
    chosen = _backends.select("match_counts", backend, index, ())
    return _backends.implementation(chosen, "rearrange").match_counts(index, num_tokens)


def _take_rows_implementation(x, index, backend):
    chosen = _backends.select("rearrange_kv", backend, x, ())
    return _backends.implementation(chosen, "rearrange").take_rows(x, index)


def _counts_fake(index, num_tokens, backend):
    return index.new_empty((*index.shape[:2], num_tokens))


def _take_rows_fake(x, index, backend):
    return x.new_empty((*x.shape[:2], index.shape[2], x.shape[3]))


def _setup_context(ctx, inputs, output):
    x, index, _ = inputs
    ctx.tokens = x.shape[2]
    ctx.save_for_backward(index)


def _backward(ctx, grad):
    return _take_rows_backward_op(grad, *ctx.saved_tensors, ctx.tokens), None, None


_take_rows_backward_op = _library.register(
    "take_rows_backward",
    "(Tensor grad, Tensor index, SymInt num_tokens) -> Tensor",
    tiled.take_rows_backward,
    lambda grad, index, num_tokens: grad.new_empty((*grad.shape[:2], num_tokens, grad.shape[3])),
    **_library.no_second_derivative("rearrange_kv", "only backend='reference' has every derivative"),
)
_counts_op = _library.register(
    "match_counts",
    "(Tensor index, SymInt num_tokens, str backend) -> Tensor",
    _counts_implementation,
    _counts_fake,
)
_take_rows_op = _library.register(
    "take_rows",
    "(Tensor x, Tensor index, str backend) -> Tensor",
    _take_rows_implementation,
    _take_rows_fake,
    setup_context=_setup_context,
    backward=_backward,
)
