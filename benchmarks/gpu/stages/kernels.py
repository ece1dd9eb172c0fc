"""The kernels of one call, from torch's profiler."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from qalign_kernels.bench import measure

ROUNDS = 10
NOT_OURS = re.compile("memset|FillFunctor", re.IGNORECASE)  # kernels that empty the cache between calls
SDPA_KERNELS = (
    ("FA4", "cute.*flash|flash.*cute|FlashAttentionForwardSm"),
    ("FA3", "FlashAttnFwdSm90|flash.*Sm90"),
    ("FA2", "flash_fwd"),
    ("cuDNN", "cudnn"),
    ("memory-efficient", "fmha_cutlass|AttentionKernel"),
    ("math", "softmax"),
)


class Kernel(NamedTuple):
    """A kernel's time of one launch in µs, and its launches in one call."""

    name: str
    microseconds: float
    launches: float


def kernels(call: Callable[[], Any], rounds: int = ROUNDS) -> list[Kernel]:
    """List the kernels of a call, the longest first."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(rounds):
            measure.before_round()
            call()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.device_time_total]
    found = [
        Kernel(event.key, round(event.device_time_total / event.count, 2), event.count / rounds)
        for event in events
        if not NOT_OURS.search(event.key)
    ]
    return sorted(found, key=lambda kernel: -kernel.microseconds * kernel.launches)


def sdpa_implementation(names: Iterable[str]) -> str:
    """Name the implementation of SDPA by its kernels.

    >>> sdpa_implementation(["void pytorch_flash::flash_fwd_kernel<...>"])
    'FA2'
    """
    text = "\n".join(names)
    found = (name for name, pattern in SDPA_KERNELS if re.search(pattern, text, re.IGNORECASE))
    return next(found, f"unknown: {text.splitlines()[0][:60]}" if text else "unknown")
