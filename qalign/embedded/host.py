"""The machine that a training run uses: its description for the record, and settings of the process."""

import contextlib
import ctypes
import platform
from pathlib import Path
from typing import Any

import torch


def describe(device: torch.device) -> dict[str, Any]:
    """Describe device, threads and versions for the record of a training run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16. One that does not is twice as fast in float32."""
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def prepare_process() -> None:
    """Set the process up for fast training on a CPU.

    Two things would cost more than the arithmetic. Adam's second moments become denormal numbers, which a
    CPU handles slowly. And glibc returns every large block of memory to the system, which must then clear
    it again.
    """
    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        library.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
