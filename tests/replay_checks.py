"""What replayed launches are compared with, in a process on the stub driver: those of Triton's own launch."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qalign_kernels._triton import _replay


class Allocations(TorchDispatchMode):
    """The bytes of each allocation inside by its address; all are kept."""

    def __init__(self):
        super().__init__()
        self.kept, self.bytes = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "empty" in str(function) and result.numel():
            self.kept.append(result)
            self.bytes[result.data_ptr()] = result.numel() * result.element_size()
        return result


def features(
    *shape: int, dtype: torch.dtype = torch.bfloat16, count: int = 4, offset: int = 0
) -> list[Tensor]:
    """[B, H, N, D] views of [B, N, H, D] storage, as attention processors have them, `offset` elements in."""
    batch, heads, tokens, dim = shape
    sizes = (batch, tokens, heads, dim)
    flat = [torch.zeros(offset + batch * tokens * heads * dim, dtype=dtype)[offset:] for _ in range(count)]
    return [x.view(sizes).transpose(1, 2) for x in flat]


def difference(stub: Any, run: Callable[[], Any], calls: int = 4) -> str | None:
    """Where the last of some calls, which is replayed, differs from an ordinary one, or None."""
    with (
        mock.patch.object(_replay, "_possible", lambda: False),
        Allocations() as own,
        stub.recording() as expected,
    ):
        wanted = _tensors(run())
    for _ in range(calls - 1):
        run()
    with (
        mock.patch.object(_replay, "_replay", wraps=_replay._replay) as replayed,
        stub.recording() as launched,
    ):
        got = _tensors(run())
    if not replayed.called:
        return "not replayed"
    if [_form(x) for x in wanted] != [_form(x) for x in got]:
        return f"outputs {[_form(x) for x in got]}, expected {[_form(x) for x in wanted]}"
    if [call[:-1] for call in launched] != [call[:-1] for call in expected]:
        return f"launches {[call[:-1] for call in launched]}, expected {[call[:-1] for call in expected]}"
    same = {
        x.data_ptr(): y.data_ptr() for x, y in zip(wanted, got)
    }  # the address there of an allocation here
    for ours, theirs in zip(launched, expected):
        for word in range(0, len(theirs.parameters), 8):
            a, b = theirs.parameters[word : word + 8], ours.parameters[word : word + 8]
            address, moved = (int.from_bytes(x, "little") for x in (a, b))
            if a != b and (
                address not in own.bytes or moved % 16 or same.setdefault(address, moved) != moved
            ):
                return f"bytes {word} of {ours.grid}: {b.hex()}, expected {a.hex()}"
    spans = sorted((moved, moved + own.bytes[address]) for address, moved in same.items())
    overlap = any(end > start for (_, end), (start, _) in zip(spans, spans[1:]))
    return "allocations overlap" if overlap else None


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if x is not None]


def _form(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.stride(), str(x.dtype), x.data_ptr() % 16
