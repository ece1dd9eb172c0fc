"""What follows a match: counts of the reference tokens, or gathered keys and values."""

from torch import Tensor

from . import _ambient, _backends, _contracts, _library
from .tiled import rearrange as tiled


@_ambient.public
def match_counts(index: Tensor, num_tokens: int, *, backend: str | None = None) -> Tensor:
    """Count how often each reference token was matched.

    counts_j = #{i : index_i = j}

    Args:
        index: int32 [B, 1 or H, N_q], the index of a `Match` from `similarity_argmax`. Entries outside
            of [0, num_tokens) are not counted.
        num_tokens: N_k, the number of reference tokens.
        backend: "auto", "triton", "tiled" or "reference". None: the default of `use_backend`.

    Returns:
        int32 [B, 1 or H, N_k]. Each row sums to the number of matched query tokens.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: `backend` cannot run this call.

    Example:
        >>> from qalign_kernels import match_counts
        >>> index = torch.tensor([[[0, 2, 2, -1]]], dtype=torch.int32)
        >>> match_counts(index, num_tokens=3).tolist()
        [[[1, 0, 2]]]

    Memory: O(N). Deterministic, because the sums are of integers. No gradient.
    Source: Q-Align, arXiv 2508.21090. Attention over rearranged keys equals attention over the original keys
    with these counts.
    """
    if not isinstance(index, Tensor):
        _contracts.fail("index", "int32 [B, 1 or H, N_q]", index, error=TypeError)
    _contracts.check_dense("index", index)
    if index.dim() != 3 or any(size == 0 for size in index.shape):
        _contracts.fail("index", "int32 [B, 1 or H, N_q] with every size at least 1", index)
    _contracts.check_integers(
        "index",
        index,
        [(f"{name}={{}}", size) for name, size in zip(("B", "G", "N_q"), index.shape)],
        index.device,
    )
    num_tokens = _contracts.count("num_tokens", num_tokens)
    backend = _backends.requested(backend)
    if backend == "reference":
        return _backends.implementation("reference", "rearrange").match_counts(index, num_tokens)
    return _counts_op(index, num_tokens, backend)


@_ambient.public
def rearrange_kv(
    key: Tensor, value: Tensor, index: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Gather keys and values by a match map.

    K̃_i = K_{index_i},  Ṽ_i = V_{index_i}

    Attention over the gathered keys equals `attention` over the original ones with the counts of
    `match_counts`. The counts cost less, and `qalign_attention` uses them. The gather is for methods that
    need the order of the tokens.

    Args:
        key: [B, H, N_k, D], float16, bfloat16, float32 or float64, any strides.
        value: [B, H, N_k, D_v], same dtype and device as `key`.
        index: int32 [B, 1 or H, N_q], the token to take for each query. -1, or any other number
            outside of [0, N_k), gives a row of zeros.
        backend: "auto", "triton", "tiled" or "reference". None: the default of `use_backend`.

    Returns:
        (key [B, H, N_q, D], value [B, H, N_q, D_v]), both contiguous.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: `backend` cannot run this call.

    Example:
        >>> from qalign_kernels import rearrange_kv
        >>> key, value = torch.randn(1, 8, 64, 40), torch.randn(1, 8, 64, 48)
        >>> index = torch.zeros(1, 1, 256, dtype=torch.int32)
        >>> new_key, new_value = rearrange_kv(key, value, index)
        >>> new_key.shape, new_value.shape
        (torch.Size([1, 8, 256, 40]), torch.Size([1, 8, 256, 48]))

    Memory: the two results. Deterministic. Differentiable in `key` and `value`.
    Source: Q-Align, arXiv 2508.21090 (key-value rearrangement).
    """
    _contracts.check_features("key", key)
    _contracts.check_features("value", value)
    _contracts.check_like("value", value, "key", key)
    _contracts.check_sizes("value", value, batch=key.shape[0], heads=key.shape[1], tokens=key.shape[2])
    batch, heads = key.shape[:2]
    if isinstance(index, Tensor):
        _contracts.check_dense("index", index)
    tokens = index.shape[-1] if isinstance(index, Tensor) and index.dim() == 3 else 0
    sizes = [("B={}", batch), ("1 or H={}", heads), ("N_q", tokens or -1)]
    _contracts.check_integers("index", index, sizes, key.device)
    if _backends.requested(backend) == "reference":
        return _backends.implementation("reference", "rearrange").rearrange_kv(key, value, index)
    return take_rows(key, index, backend=backend), take_rows(value, index, backend=backend)


def take_rows(x: Tensor, index: Tensor, *, backend: str | None = None) -> Tensor:
    """Gather the tokens of [B, H, N_k, D] by a match map [B, 1 or H, N_q], zeros for -1; tiled or Triton."""
    backend = _backends.requested(backend)
    if _library.wants_gradient(x):
        backend = _backends.with_gradient("rearrange_kv", backend, x, ())
    return _take_rows_op(x, index, backend)


def take_batch_rows(x: Tensor, batch_index: Tensor | None) -> Tensor:
    """x[batch_index]; a gradient sums over the query rows that read the same row in the accumulate dtype."""
    if batch_index is None:
        return x
    batch_index = batch_index.clamp(0, x.shape[0] - 1)
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
