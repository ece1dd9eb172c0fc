"""Which implementation serves a call, and why.

An explicit backend never falls back: it raises where it cannot run. "auto" takes Triton on a GPU that it serves and the tiled
PyTorch path everywhere else, and logs each reason once.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _contracts
from ._triton._configs import version_numbers

BACKENDS = ("auto", "triton", "tiled", "reference")
TRITON_OLDEST = (3, 6)  # 3.5 does not compile 26 of the kernels
INTERPRETER_ON_NUMPY_2_4 = (3, 7)  # older interpreters convert one-element arrays as numpy 2.4 no longer does
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_HEAD_DIMS = (16, 32, 40, 48, 64, 80, 96, 128, 160)
TRITON_MAX_K = 64
TRITON_MAX_LABELS = 128

_log = logging.getLogger("qalign_kernels")
_default = os.environ.get("QALIGN_BACKEND", "auto")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend for every call inside the block that names none.

    The setting is for the whole process, and blocks may be nested. The environment variable QALIGN_BACKEND sets
    the default outside all blocks.

    Args:
        name: "auto", "triton", "tiled" or "reference". "auto" uses Triton on a GPU where it serves the call, and
            tiled PyTorch otherwise. The others never fall back: they raise if they cannot run.

    Raises:
        ValueError: `name` is not one of the four.

    Example:
        >>> from qalign_kernels import Segment, attention, use_backend
        >>> query, key, value = torch.randn(3, 1, 8, 64, 40)
        >>> with use_backend("reference"):
        ...     output = attention(query, Segment(key, value))
        >>> output.shape
        torch.Size([1, 8, 64, 40])
    """
    global _default
    _contracts.check_choice("backend", name, BACKENDS)
    previous, _default = _default, name
    try:
        yield
    finally:
        _default = previous


def requested(backend: str | None) -> str:
    """The backend asked for: the argument, else the innermost `use_backend`, else QALIGN_BACKEND, else "auto"."""
    name = _default if backend is None else backend
    _contracts.check_choice("QALIGN_BACKEND" if backend is None else "backend", name, BACKENDS)
    return name


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs its kernels on CPU tensors (TRITON_INTERPRET=1, set before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@functools.cache
def triton_problem() -> str | None:
    """Why Triton cannot be used on this machine at all, or None."""
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # a broken installation may raise anything
        return f"triton does not import ({type(error).__name__}: {error})".splitlines()[0]
    version = sys.modules["triton"].__version__
    if version_numbers(version) < TRITON_OLDEST:
        return f"Triton {version} is not supported, only {TRITON_OLDEST[0]}.{TRITON_OLDEST[1]} and newer"
    return None


@functools.cache
def interpreter_problem() -> str | None:
    """Why Triton's interpreter cannot run the kernels beside the installed numpy, or None."""
    try:
        triton, numpy = sys.modules["triton"].__version__, importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError:  # torch does without
        return "Triton's interpreter needs numpy, which is not installed"
    if version_numbers(triton) < INTERPRETER_ON_NUMPY_2_4 and version_numbers(numpy) >= (2, 4):
        return f"the interpreter of Triton {triton} does not work with numpy {numpy}: numpy 2.3 or Triton 3.7 mends it"
    return None


def triton_refusal(
    tensor: Tensor,
    head_dims: tuple[int, ...],
    differentiable: bool = False,
    max_k: int = 1,
    num_labels: int = 1,
) -> str | None:
    """Why the Triton kernels cannot serve this call, or None."""
    if problem := triton_problem():
        return problem
    if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and interpreted()):
        return f"device {tensor.device.type} has no Triton (set TRITON_INTERPRET=1 to interpret the kernels on the CPU)"
    if interpreted() and (problem := interpreter_problem()):
        return problem
    if tensor.dtype.is_floating_point and tensor.dtype not in TRITON_DTYPES:
        return f"dtype {str(tensor.dtype).removeprefix('torch.')} is not served, only float16, bfloat16 and float32"
    if tensor.dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter has no correct bfloat16"
    if any(dim not in TRITON_HEAD_DIMS for dim in head_dims):
        return f"head_dim {head_dims} is not served, only {TRITON_HEAD_DIMS}"
    if max_k > TRITON_MAX_K:
        return f"k={max_k} is not served, only k up to {TRITON_MAX_K}"
    if num_labels > TRITON_MAX_LABELS:
        return f"num_labels={num_labels} is not served, only up to {TRITON_MAX_LABELS}"
    if differentiable:
        return "the Triton kernels have no backward of this call; gradients take the tiled path"
    return None


@functools.cache
def _log_once(op: str, reason: str) -> None:
    _log.info("%s: tiled PyTorch instead of Triton: %s", op, reason)


def select(op: str, backend: str, tensor: Tensor, head_dims: tuple[int, ...], **limits: Any) -> str:
    """ "triton" or "tiled" for this call of `op`; raises where an explicit "triton" cannot run. `tensor` gives device and dtype."""
    if backend == "tiled":
        return "tiled"
    refusal = triton_refusal(tensor, head_dims, **limits)
    if backend == "triton":
        if refusal:
            raise RuntimeError(f"backend: expected one that can run {op} here, got 'triton': {refusal}")
        return "triton"
    if tensor.device.type == "cpu":
        return "tiled"  # the interpreter is for tests: only an explicit request takes it
    if refusal:
        _log_once(op, refusal)
        return "tiled"
    return "triton"


def require_gradient(op: str, backend: str, tensor: Tensor, head_dims: tuple[int, ...]) -> None:
    """`select` for a call of plain PyTorch that torch.compile may trace: raises under an explicit "triton", whose kernels have no backward."""
    if not torch.compiler.is_compiling():
        select(op, backend, tensor, head_dims, differentiable=True)
    elif backend == "triton":
        raise RuntimeError(
            f"backend: expected one that can run {op} here, got 'triton': its kernels have no backward"
        )


@functools.cache
def implementation(backend: str, stem: str) -> Any:
    """The functions that implement `stem` for "triton", "tiled" or "reference"; those of Triton launch again what they launched before."""
    package = {"triton": "_triton", "tiled": "tiled", "reference": "reference"}[backend]
    module = importlib.import_module(f"qalign_kernels.{package}.{stem}")
    if backend != "triton":
        return module
    return importlib.import_module("qalign_kernels._triton._replay").replayed(module)
