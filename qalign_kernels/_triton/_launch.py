"""All kernels are launched here.

Therefore every launch can also be recorded, and compiled for a GPU that this machine does not have.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """A recorded launch: the kernel, its arguments by name with constexprs, and its compile options."""

    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


class _Thread(threading.local):
    """The watcher of the launches of this thread."""

    watcher: Callable | None = None


_recorded: list[Launch] | None = None
_assumed_target: str | None = None
_thread = _Thread()


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int, num_stages: int, **arguments: Any) -> None:
    """Run `kernel` over `grid` on the device of its tensors; inside `recording`, only note the launch."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, num_warps, num_stages))
    else:
        tensor = next(x for x in arguments.values() if isinstance(x, torch.Tensor))
        with torch.cuda.device_of(tensor):  # Triton launches on the current device
            compiled = kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
        if _thread.watcher is not None:
            _thread.watcher(kernel, grid, arguments, compiled)


def compiled(kernel: Any, *, num_warps: int, num_stages: int, **arguments: Any) -> Any:
    """The kernel, compiled and loaded as for `launch`; None in the interpreter and inside `recording`."""
    tensor = next(x for x in arguments.values() if isinstance(x, torch.Tensor))
    if _recorded is not None or target_of(tensor.device) == "interpreter":
        return None
    with torch.cuda.device_of(tensor):
        made = kernel.warmup(grid=(1,), **arguments, num_warps=num_warps, num_stages=num_stages)
        _ = made.run  # Triton loads the kernel, and counts its registers, when it is first looked at
    return made


def plain() -> bool:
    """Whether launches of this thread are neither recorded nor watched."""
    return _recorded is None and _thread.watcher is None


@contextlib.contextmanager
def watching(watcher: Callable[[Any, tuple[int, ...], dict[str, Any], Any], None]) -> Iterator[None]:
    """Inside, `watcher(kernel, grid, arguments, compiled kernel)` follows each launch of this thread."""
    _thread.watcher = watcher
    try:
        yield
    finally:
        _thread.watcher = None


@contextlib.contextmanager
def recording(target: str) -> Iterator[list[Launch]]:
    """Inside, launches are collected and nothing runs. Tensors may live on the meta device.

    Tiles and kernels are those for `target` ("sm_90", "gfx942").
    """
    global _recorded, _assumed_target
    previous = _recorded, _assumed_target
    _recorded, _assumed_target = [], target
    try:
        yield _recorded
    finally:
        _recorded, _assumed_target = previous


def target_of(device: torch.device) -> str:
    """The architecture that a launch compiles for: "sm_90", "gfx942"; "interpreter" on the CPU."""
    if _assumed_target is not None:
        return _assumed_target
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
