"""Clocks that pytest-benchmark reads before and after each round."""

import time
from typing import Any

import torch

FLUSH_MIB = 256
_flush: torch.Tensor | None = None


class CudaStamp:
    """A point on the GPU's own time line; the difference of two is in seconds and waits for the later one."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "CudaStamp") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def stamp() -> Any:
    """Seconds on the CPU, a `CudaStamp` where CUDA is the device measured."""
    return CudaStamp() if _flush is not None else time.perf_counter()


def use_cuda() -> None:
    """Measure on the GPU's time line, with an empty L2 cache before every round."""
    global _flush
    _flush = torch.empty(FLUSH_MIB << 20, dtype=torch.int8, device="cuda")


def before_round() -> None:
    """Empty the L2 cache; the launches of the round queue behind it, so that the host's delay is hidden as in a busy stream."""
    if _flush is not None:
        _flush.zero_()
