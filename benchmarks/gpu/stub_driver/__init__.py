"""Launch the kernels without a GPU: Triton's own driver code, on a CUDA driver whose H100 does nothing.

>>> with stub_driver(Path("stub")) as stub:
...     output = qalign_attention(query, ref_query, ref_key, ref_value, backend="triton")
...     stub.launches
4

Tensors are on the CPU. Kernels are compiled for sm_90 and not executed, so results are undefined memory. The
stub shows the host's part of a launch: its time, its grid, and the kernel's parameters.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from qalign_kernels import _backends

SOURCE = Path(__file__).with_name("libcuda.c")
TARGET, CAPABILITY, MULTIPROCESSORS = "sm_90", (9, 0), 132
RECORD_BYTES = 1 << 20


class Call(NamedTuple):
    """A launch as the CUDA driver receives it; `parameters` are packed as the kernel reads them."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    function: int
    parameters: bytes


class Stub:
    """The counters and the records of the driver."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.stream = 0
        """The current stream's handle, as the ops see it."""

    @property
    def launches(self) -> int:
        """How many kernels were launched in this process."""
        return self._library.stub_launches()

    @property
    def registers(self) -> int:
        """How many registers a thread of any kernel takes that is loaded from now on."""
        return ctypes.c_int.in_dll(self._library, "stub_registers").value

    @registers.setter
    def registers(self, count: int) -> None:
        """How many registers per thread the driver reports for kernels that are loaded from now on."""
        ctypes.c_int.in_dll(self._library, "stub_registers").value = count

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Call]]:
        """Collect the launches inside; the list is filled at the end."""
        buffer, calls = ctypes.create_string_buffer(RECORD_BYTES), list[Call]()
        self._library.stub_record(buffer, ctypes.c_long(RECORD_BYTES))
        try:
            yield calls
        finally:
            recorded = buffer.raw[: self._library.stub_recorded()]
            self._library.stub_record(None, ctypes.c_long(0))
        while recorded:
            *sizes, parameter_bytes = (int.from_bytes(recorded[i : i + 4], "little") for i in range(0, 32, 4))
            stream, function = (int.from_bytes(recorded[i : i + 8], "little") for i in (32, 40))
            end = 48 + parameter_bytes
            grid, block = (sizes[0], sizes[1], sizes[2]), (sizes[3], sizes[4], sizes[5])
            calls.append(Call(grid, block, sizes[6], stream, function, recorded[48:end]))
            recorded = recorded[end:]


def missing() -> str | None:
    """Give the reason why the stub cannot be built on this machine, or None."""
    return _backends.triton_problem() or (None if _compiler() else "no C compiler (gcc, clang or CC)")


def problem() -> str | None:
    """Give the reason why the stub cannot replace a GPU in this process, or None."""
    if reason := missing():
        return reason
    if _backends.interpreted():
        return "TRITON_INTERPRET is set: kernels would be interpreted, not launched"
    return "this machine has a GPU" if torch.cuda.is_available() else None


@contextlib.contextmanager
def stub_driver(folder: Path) -> Iterator[Stub]:
    """Inside, ops with backend="triton" take CPU tensors and launch on a GPU that does nothing.

    Afterwards the process keeps kernels that no GPU can run.

    Args:
        folder: keeps the driver and the compiled kernels; made where it is missing. A second use compiles
            nothing.

    Raises:
        RuntimeError: `problem` gives a reason.
    """
    if reason := problem():
        raise RuntimeError(
            f"stub_driver: expected a machine with Triton and a C compiler but no GPU, got {reason}"
        )
    library = ctypes.CDLL(
        str(_build(folder)), mode=ctypes.RTLD_GLOBAL
    )  # Triton's dlopen finds the library by its name
    library.stub_launches.restype = library.stub_recorded.restype = ctypes.c_long
    stub = Stub(library)

    from triton.runtime import driver

    from qalign_kernels._triton import _launch

    environment = {"TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        for name, replacement in _torch_cuda(stub).items():
            owner = torch._C if name.startswith("_") else torch.cuda
            stack.enter_context(mock.patch.object(owner, name, replacement, create=True))
        stack.enter_context(
            mock.patch.object(_backends, "triton_refusal", _refusal_of_a_gpu(_backends.triton_refusal))
        )
        stack.enter_context(mock.patch.object(_launch, "_assumed_target", TARGET))
        stack.enter_context(mock.patch.object(driver, "_active", _nvidia_driver()))
        yield stub


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def _build(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    library, built = folder / "libcuda.so.1", folder / f"libcuda.{os.getpid()}"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        flags = ["-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([str(_compiler()), str(SOURCE), *flags, "-o", str(built)], check=True)
        built.replace(library)
    return library


def _nvidia_driver() -> Any:
    from triton.backends.nvidia.driver import CudaDriver

    return CudaDriver()


def _torch_cuda(stub: Stub) -> dict[str, Any]:
    """Replace the functions of torch.cuda that Triton's driver calls."""
    properties = types.SimpleNamespace(
        name="NVIDIA H100 (stub)",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=MULTIPROCESSORS,
    )
    return {
        "_cuda_getCurrentRawStream": lambda device: stub.stream,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: properties,
    }


class _OnGpu(NamedTuple):
    """The attributes that `triton_refusal` reads, of a tensor on a GPU."""

    dtype: torch.dtype
    device: torch.device = torch.device("cuda")


def _refusal_of_a_gpu(refusal: Any) -> Any:
    return lambda tensor, *limits, **more: refusal(_OnGpu(tensor.dtype), *limits, **more)
