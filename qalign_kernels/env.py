"""The environment report for bug reports: `python -m qalign_kernels.env`."""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Sequence

import torch

from . import __version__, _backends, _command_line

OPS = (
    "similarity_argmax",
    "similarity_topk",
    "match_counts",
    "rearrange_kv",
    "attention",
    "topk_attention",
    "distillation_loss",
    "label_mass",
    "mean_attention_map",
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[str]:
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        architecture = (
            properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
        )
        yield f"cuda:{i} {properties.name}, {architecture}, {properties.total_memory / 2**20:.0f} MiB"
    if torch.backends.mps.is_available():
        yield "mps"
    yield f"cpu {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _triton() -> str:
    if problem := _backends.triton_problem():
        return problem
    state = "on: TRITON_INTERPRET is set" if _backends.interpreted() else "off"
    broken = _backends.interpreter_problem()
    return f"{sys.modules['triton'].__version__}, interpreter {state}{f'; {broken}' if broken else ''}"


def _default_backend() -> str:
    name = os.environ.get("QALIGN_BACKEND")
    if name is None:
        return "not set, so auto"
    return (
        name
        if name in _backends.BACKENDS
        else f"{name}, which is not one of {', '.join(_backends.BACKENDS)}; every call raises"
    )


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choices(device: torch.device) -> dict[tuple[str, str], tuple[str, str]]:
    """The backend that "auto" uses on `device` and the reason, by (op, dtype), for head dim 64 and no
    gradients.

    float64 is absent on mps, which has none.
    """
    table = {}
    for op in OPS:
        integers = op == "match_counts"
        for dtype in (torch.int32,) if integers else DTYPES:
            if dtype == torch.float64 and device.type == "mps":
                continue
            tensor = torch.empty(1, dtype=dtype, device=device)
            head_dims = () if integers or op == "rearrange_kv" else (64,)
            chosen = _backends.select(op, "auto", tensor, head_dims)
            reason = "the Triton kernels support it"
            if chosen == "tiled":
                cpu = '"auto" uses PyTorch on the CPU; the interpreter needs an explicit backend="triton"'
                reason = cpu if device.type == "cpu" else str(_backends.triton_refusal(tensor, head_dims))
            table[op, str(dtype).removeprefix("torch.")] = chosen, reason
    return table


def report() -> str:
    """The report, one fact in each line."""
    lines = [
        f"qalign_kernels  {__version__}",
        f"python          {platform.python_version()}",
        f"torch           {torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}",
        f"triton          {_triton()}",
        *(f"{name:15s} {_version(name)}" for name in ("numpy", "diffusers", "transformers")),
        f"system          {platform.platform()}",
        *(f"device          {line}" for line in _devices()),
        f"QALIGN_BACKEND  {_default_backend()}",
        "",
        f'Backend that "auto" uses on {_device()}. With gradients it is the same for distillation_loss,',
        "label_mass and attention without contrast, and tiled for the other ops.",
    ]
    lines += [
        f"{op:20s} {dtype:9s} {chosen:7s} {reason}"
        for (op, dtype), (chosen, reason) in choices(_device()).items()
    ]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    top = _command_line.Parser(
        "python -m qalign_kernels.env",
        description="Report versions, devices and the backend of each op, for bug reports.",
    )
    _command_line.add_command(top, sys.modules[__name__])
    return top


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no options of its own."""


def run(options: argparse.Namespace) -> int:
    print(report())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit status."""
    return _command_line.main(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
