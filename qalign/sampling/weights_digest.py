"""A digest of all weights of a model, computed once and kept until they change."""

import contextlib
import hashlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 16  # values of each tensor that a fingerprint holds
_PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size, type(None))
_kept: weakref.WeakKeyDictionary[nn.Module, tuple[str, str]] = weakref.WeakKeyDictionary()


def weights_digest(model: nn.Module) -> str:
    """Hash the state dict of a model by sha256.

    Args:
        model: any module: also quantised, or with weights that accelerate offloads one by one.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: some weights cannot be read.

    Example:
        >>> before = weights_digest(pipe.unet)
        >>> with torch.no_grad():
        ...     _ = pipe.unet.conv_out.bias.add_(1)
        >>> weights_digest(pipe.unet) == before
        False

    Notes:
        The digest is kept with a fingerprint: names, types, shapes, versions, some values of each tensor, and
        the sum of all its bits. A change of weights changes the fingerprint, also one that PyTorch does not
        count, such as `parameter.data += 1`. The fingerprint reads memory once; sha256 takes ten times as
        long.
    """
    fingerprint = _hash(model, _fingerprint)
    known, found = _kept.get(model, ("", ""))
    if known != fingerprint:
        found = _hash(model, tensor_bytes)
        _kept[model] = fingerprint, found
    return found


def tensor_bytes(tensor: Tensor) -> Any:
    """Return the values of a dense tensor as a buffer."""
    return _flat_bytes(tensor).cpu().numpy()


def _fingerprint(tensor: Tensor) -> bytes:
    """A few values of a tensor, the sum of its bits modulo 2^64, and its version where it counts any."""
    flat = _flat_bytes(tensor)
    whole = len(flat) // 8 * 8
    total = int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].sum())
    size = tensor.element_size()
    some = flat.view(-1, size)[:: max(len(flat) // size // SAMPLES, 1)][:SAMPLES]
    version = None if tensor.is_inference() else tensor._version
    return repr((total, version, some.tolist())).encode()


def _flat_bytes(tensor: Tensor) -> Tensor:
    """uint8 [bytes], aligned to 8."""
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8 or not flat.is_contiguous():
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def _hash(model: nn.Module, read: Any) -> str:
    whole = hashlib.sha256()
    for name, value in _state(model):
        for kind, part in _parts(name, value):
            whole.update(f"{name} {kind}\n".encode())
            if isinstance(part, Tensor):
                whole.update(read(part))
    return whole.hexdigest()


def _state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The entries of the state dict; of an offloaded model module by module, each loaded for its turn."""
    if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        yield from model.state_dict().items()
        return
    from accelerate.utils import align_module_device

    for prefix, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        loaded = (
            align_module_device(module, torch.device("cpu"))
            if any(tensor.is_meta for tensor in own) and hasattr(module, "_hf_hook")
            else contextlib.nullcontext()
        )
        with loaded:
            state: dict[str, Any] = {}
            module._save_to_state_dict(state, f"{prefix}." if prefix else "", False)
            yield from state.items()


def _parts(name: str, value: Any) -> Iterator[tuple[str, Tensor | None]]:
    """What a value consists of: descriptions, and dense tensors with theirs."""
    if isinstance(value, _PLAIN):
        yield repr(value), None
    elif isinstance(value, dict):
        for key, each in value.items():
            yield repr(key), None
            yield from _parts(name, each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _parts(name, each)
    elif isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):  # a quantised one of torchao
        names, context = value.__tensor_flatten__()
        yield f"{type(value).__name__} {context}", None
        for each in names:
            yield from _parts(name, getattr(value, each))
    elif isinstance(value, Tensor) and value.is_quantized:
        yield f"{value.qscheme()} {value.dtype}", value.int_repr()
        if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield repr((value.q_scale(), value.q_zero_point())), None
        else:
            yield f"axis {value.q_per_channel_axis()}", value.q_per_channel_scales()
            yield "zero points", value.q_per_channel_zero_points()
    elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
        yield f"{value.dtype} {list(value.shape)}", value.as_subclass(Tensor)
    else:
        got = (
            f"{name} on the meta device"
            if getattr(value, "is_meta", False)
            else f"{type(value).__name__} {name}"
        )
        raise ValueError(f"cache: expected a UNet with weights that can be read, got {got}")
