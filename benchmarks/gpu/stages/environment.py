"""Stage "environment": a description of the machine. Clocks and power are read, never set."""

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from typing import Any

import torch

from qalign_kernels import __version__
from qalign_kernels.bench.measure import triton_version

from ...suite.rows import commit
from ..running import arguments

FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "utilization.gpu",
    "memory.used",
    "mig.mode.current",
    "clocks_event_reasons.active",
)
PACKAGES = (
    "fa3-fwd",
    "flash-kmeans",
    "sageattention",
    "diffusers",
    "numpy",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
)


def nvidia_smi(*fields: str) -> dict[str, str]:
    """Read fields of the first GPU by nvidia-smi; empty without it, or where a field is unknown."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(", ")]
    return dict(zip(fields, values)) if done.returncode == 0 and len(values) == len(fields) else {}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    readings: dict[str, str] = {}
    for field in FIELDS:  # one by one, because drivers know different fields
        readings |= nvidia_smi(field)
    return {
        "device": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton_version(),
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "qalign_kernels": __version__,
        "commit": commit(),
        "packages": {package: _version(package) for package in PACKAGES},
        "nvidia_smi": readings,
    }


def main() -> int:
    options = arguments.parser(__doc__).parse_args()
    arguments.write(options.out, "environment", **facts())
    return 0
