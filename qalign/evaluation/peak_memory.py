"""The peak memory of a piece of work."""

import contextlib
import ctypes
import gc
import sys
import threading

import torch

MIB = 2**20


class PeakMemory:
    """Measure the peak memory inside a `with` block, above the level at its start.

    On CUDA this is torch's own count. Elsewhere a thread reads the resident set every 2 ms.

    >>> with PeakMemory(torch.device("cpu")) as memory:
    ...     _ = torch.ones(16 * MIB // 4).sum()
    >>> memory.peak_mib > 8
    True

    Args:
        device: where the work runs.

    Attributes:
        peak_mib: the peak in MiB, known after the block.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak_mib = device, 0.0
        self._stop = threading.Event()

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        import psutil

        if sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):  # musl has no malloc_trim
                ctypes.CDLL(None).malloc_trim(0)
        self._process = psutil.Process()
        self._before = self._highest = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            self._highest = torch.cuda.max_memory_allocated(self.device)
        else:
            self._stop.set()
            self._thread.join()
        self.peak_mib = (self._highest - self._before) / MIB
