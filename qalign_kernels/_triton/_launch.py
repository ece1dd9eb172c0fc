"""The one door through which kernels are launched, so that a launch can also be recorded and compiled for a GPU that is not here."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """A kernel, its named arguments (constexprs included) and its compile options, as a launch would take them."""

    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


class _Thread(threading.local):
    """Who watches the launches of this thread."""

    watcher: Callable | None = None


_recorded: list[Launch] | None = None
_assumed_target: str | None = None
_thread = _Thread()


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int, num_stages: int, **arguments: Any) -> None:
    """Run `kernel` over `grid` on the device of its tensors, or note the launch inside `recording`."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, num_warps, num_stages))
    else:
        with torch.cuda.device_of(
            next(x for x in arguments.values() if isinstance(x, torch.Tensor))
        ):  # Triton launches on the current device
            compiled = kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
        if _thread.watcher is not None:
            _thread.watcher(kernel, grid, arguments, compiled)


def compiled(kernel: Any, *, num_warps: int, num_stages: int, **arguments: Any) -> Any:
    """Compile and load `kernel` as `launch` would take it; None in the interpreter and inside `recording`."""
    tensor = next(x for x in arguments.values() if isinstance(x, torch.Tensor))
    if _recorded is not None or target_of(tensor.device) == "interpreter":
        return None
    with torch.cuda.device_of(tensor):
        made = kernel.warmup(grid=(1,), **arguments, num_warps=num_warps, num_stages=num_stages)
        _ = made.run  # Triton loads the kernel, and counts its registers, when it is first looked at
    return made


def plain() -> bool:
    """Whether launches of this thread only run: they are not noted, nor watched."""
    return _recorded is None and _thread.watcher is None


@contextlib.contextmanager
def watching(watcher: Callable[[Any, tuple[int, ...], dict[str, Any], Any], None]) -> Iterator[None]:
    """Inside, each launch of this thread is followed by `watcher(kernel, grid, arguments, compiled kernel)`."""
    _thread.watcher = watcher
    try:
        yield
    finally:
        _thread.watcher = None


@contextlib.contextmanager
def recording(target: str) -> Iterator[list[Launch]]:
    """Inside, launchers run nothing: they choose their configuration for `target` ("sm_90", "gfx942") and the launches are collected.

    Tensors may live on the meta device.
    """
    global _recorded, _assumed_target
    previous = _recorded, _assumed_target
    _recorded, _assumed_target = [], target
    try:
        yield _recorded
    finally:
        _recorded, _assumed_target = previous


def target_of(device: torch.device) -> str:
    """The architecture that a launch on `device` compiles for: "sm_90", "gfx942", or "interpreter" for the CPU."""
    if _assumed_target is not None:
        return _assumed_target
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
