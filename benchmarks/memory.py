"""Peak memory of one call beyond its inputs, its output included."""

import ctypes
import multiprocessing
import resource
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MIB = 2**20
_WARM_UP_TOKENS = 64


def cuda_peak_mib(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def cpu_rise_mib(call: Callable[[], Any]) -> float:
    """The rise of the peak resident size of this process."""
    before = _settle()
    result = call()
    rise = (_peak_bytes() - before) / MIB
    del result
    return rise


def saved_mib(call: Callable[[], Any], inputs: Sequence[Tensor]) -> tuple[float, Any]:
    """What autograd keeps for the backward pass of what `call` does, each storage once and none of the `inputs`; and the result."""
    found: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = call()
    given = {x.untyped_storage().data_ptr() for x in inputs}
    return sum(size for pointer, size in found.items() if pointer not in given) / MIB, result


def cpu_peak_mib(provider: str, op_name: str, shape: tuple, dtype: torch.dtype, threads: int) -> float | None:
    """The rise of the peak resident size in a fresh process; None where that process came to no result."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "benchmarks.providers"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, provider, op_name, shape, dtype, threads))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()


def _measure(sender: Connection, provider: str, op_name: str, shape: tuple, dtype: torch.dtype, threads: int) -> None:
    from .providers import build, op_named
    from .shapes import Shape, make_inputs

    torch.set_num_threads(threads)
    op, measured = op_named(op_name), Shape(*shape)
    small = measured._replace(batch=1, tokens=_WARM_UP_TOKENS)
    with torch.no_grad():
        build(provider, op, make_inputs(small, op.correlated, dtype, "cpu"))()
        call = build(provider, op, make_inputs(measured, op.correlated, dtype, "cpu"))
        sender.send(cpu_rise_mib(call))


def _settle() -> int:
    """Hand freed memory back, restart the peak where the system can, and return the resident size in bytes."""
    if not sys.platform.startswith("linux"):
        return _peak_bytes()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak_bytes() -> int:
    if sys.platform.startswith("linux"):
        return _status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _status_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
