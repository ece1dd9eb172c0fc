"""Fixtures: the three backends, on the GPU if there is one, else with Triton in its interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read when Triton is imported, which no test module does before this

if (
    "PYTEST_XDIST_WORKER_COUNT" in os.environ
):  # full thread pools wait for each other: a worker, and what it starts, takes its share
    share = max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(share)
    os.environ["OMP_NUM_THREADS"] = str(share)

from qalign_kernels import _backends
from qalign_kernels.testing import poisoned_memory, random_features
from tests.tiers import pytest_addoption, pytest_runtest_call, pytest_runtest_setup  # noqa: F401

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _skip_where_refused(backend: str, dtype: torch.dtype) -> None:
    refusal = (
        _backends.triton_refusal(torch.empty(1, dtype=dtype, device=DEVICE), ())
        if backend == "triton"
        else None
    )
    if refusal:
        pytest.skip(refusal)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=("reference", "tiled", "triton"))
def backend(request: pytest.FixtureRequest) -> str:
    _skip_where_refused(request.param, torch.float32)
    return request.param


@pytest.fixture(params=[f"{backend}-{dtype}" for backend in ("tiled", "triton") for dtype in DTYPES])
def precision(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    """A backend and a dtype that it serves here."""
    backend, dtype = request.param.split("-")
    _skip_where_refused(backend, DTYPES[dtype])
    return backend, DTYPES[dtype]


@pytest.fixture
def poisoned():
    """Memory that an op allocates and does not write holds NaN."""
    with poisoned_memory():
        yield


@pytest.fixture
def far(poisoned, device: str) -> torch.Tensor:
    """float16 [1, 3, 24, 32] whose last head begins 2^31 elements in. The memory is reserved, not touched."""
    stride = 2**30
    try:
        torch.utils.deterministic.fill_uninitialized_memory = False
        storage = torch.empty(2 * stride + 4096, dtype=torch.float16, device=device)
    except (RuntimeError, MemoryError):
        pytest.skip("4 GiB cannot be reserved here")
    far = storage.as_strided((1, 3, 24, 32), (0, stride, 32, 1))
    return far.copy_(random_features(1, 3, 24, 32, seed=14))
