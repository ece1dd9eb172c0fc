"""The choice of an implementation for each call, and the reason for it.

An explicit backend never falls back: it raises if it cannot run. "auto" uses Triton on a GPU where it serves
the call, and tiled PyTorch otherwise. It logs each reason once.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _contracts, reference
from ._triton._configs import version_numbers

BACKENDS = ("auto", "triton", "tiled", "reference")
TRITON_OLDEST = (3, 6)  # Triton 3.5 fails to compile 26 of the kernels
INTERPRETER_ON_NUMPY_2_4 = (3, 7)  # numpy 2.4 removed a conversion that older interpreters use
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_HEAD_DIMS = (16, 32, 40, 48, 64, 80, 96, 128, 160)
TRITON_MAX_K = 64
TRITON_MAX_LABELS = 128

_log = logging.getLogger("qalign_kernels")
_default = os.environ.get("QALIGN_BACKEND", "auto")
_chosen = threading.local()  # `backend` of a thread that is inside `use_backend`


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend for every call inside the block that names none.

    The setting is for the current thread, and blocks may be nested. The environment variable QALIGN_BACKEND
    sets the default outside all blocks.

    Args:
        name: "auto", "triton", "tiled" or "reference". "auto" uses Triton on a GPU where it serves the call,
            and tiled PyTorch otherwise. The others never fall back: they raise if they cannot run.

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
    _contracts.check_choice("backend", name, BACKENDS)
    previous = getattr(_chosen, "backend", None)
    _chosen.backend = name
    try:
        yield
    finally:
        _chosen.backend = previous


def requested(backend: str | None) -> str:
    """The requested backend: the argument, else that of `use_backend`, else QALIGN_BACKEND, else "auto"."""
    name = getattr(_chosen, "backend", None) if backend is None else backend
    if name is None:
        _contracts.check_choice("QALIGN_BACKEND", _default, BACKENDS)
        return _default
    _contracts.check_choice("backend", name, BACKENDS)
    return name


@functools.cache
def interpreted() -> bool:
    """Whether Triton interprets its kernels: TRITON_INTERPRET=1, set before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@functools.cache
def triton_problem() -> str | None:
    """The reason why Triton cannot be used on this machine at all, or None."""
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
    """The reason why Triton's interpreter cannot run the kernels with the installed numpy, or None."""
    try:
        triton, numpy = sys.modules["triton"].__version__, importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError:  # torch does not require numpy
        return "Triton's interpreter needs numpy, which is not installed"
    if version_numbers(triton) < INTERPRETER_ON_NUMPY_2_4 and version_numbers(numpy) >= (2, 4):
        return (
            f"the interpreter of Triton {triton} does not work with numpy {numpy}; "
            "install numpy 2.3 or Triton 3.7"
        )
    return None


def triton_refusal(
    tensor: Tensor,
    head_dims: tuple[int, ...],
    differentiable: bool = False,
    max_k: int = 1,
    num_labels: int = 1,
) -> str | None:
    """The reason why the Triton kernels cannot serve this call, or None."""
    if problem := triton_problem():
        return problem
    if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and interpreted()):
        return (
            f"Triton does not run on device {tensor.device.type} "
            "(TRITON_INTERPRET=1 interprets the kernels on the CPU)"
        )
    if interpreted() and (problem := interpreter_problem()):
        return problem
    if tensor.dtype.is_floating_point and tensor.dtype not in TRITON_DTYPES:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return f"dtype {dtype} is not supported, only float16, bfloat16 and float32"
    if tensor.dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter has no correct bfloat16"
    if any(dim not in TRITON_HEAD_DIMS for dim in head_dims):
        return f"head_dim {head_dims} is not supported, only {TRITON_HEAD_DIMS}"
    if max_k > TRITON_MAX_K:
        return f"k={max_k} is not supported, only k up to {TRITON_MAX_K}"
    if num_labels > TRITON_MAX_LABELS:
        return f"num_labels={num_labels} is not supported, only up to {TRITON_MAX_LABELS}"
    if differentiable:
        return "the Triton kernels have no gradient of this call; the tiled backend has"
    return None


@functools.cache
def _log_once(op: str, reason: str) -> None:
    _log.info("%s runs on tiled PyTorch, not on Triton: %s", op, reason)


def select(op: str, backend: str, tensor: Tensor, head_dims: tuple[int, ...], **limits: Any) -> str:
    """Choose "triton" or "tiled" for a call of `op` on tensors with the device and dtype of `tensor`.

    Raises:
        RuntimeError: "triton" is requested and cannot run this call.
    """
    if backend == "tiled":
        return "tiled"
    refusal = triton_refusal(tensor, head_dims, **limits)
    if backend == "triton":
        if refusal:
            raise RuntimeError(f"backend: expected a backend that can run {op} here, got 'triton': {refusal}")
        return "triton"
    if tensor.device.type == "cpu":
        return "tiled"  # the interpreter is for tests and needs an explicit request
    if refusal:
        _log_once(op, refusal)
        return "tiled"
    return "triton"


def with_gradient(op: str, backend: str, tensor: Tensor, head_dims: tuple[int, ...]) -> str:
    """ "tiled", the backend of a call with a gradient; refuses "triton". torch.compile may trace this."""
    if not torch.compiler.is_compiling():
        select(op, backend, tensor, head_dims, differentiable=True)
    elif backend == "triton":
        raise RuntimeError(
            f"backend: expected a backend that can run {op} here, got 'triton': its kernels have no gradient"
        )
    return "tiled"


def implementation(backend: str, stem: str) -> Any:
    """The module that implements `stem` for "triton", "tiled" or "reference"."""
    return getattr(reference, stem) if backend == "reference" else _imported(backend, stem)


@functools.cache
def _imported(backend: str, stem: str) -> Any:
    """Import a backend at its first call. The functions for Triton replay the launches of earlier calls."""
    package = {"triton": "_triton", "tiled": "tiled"}[backend]
    module = importlib.import_module(f"qalign_kernels.{package}.{stem}")
    if backend != "triton":
        return module
    return importlib.import_module("qalign_kernels._triton._replay").replayed(module)
