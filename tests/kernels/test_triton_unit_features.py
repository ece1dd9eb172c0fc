"""unit_features on Triton, in the interpreter, against torch's normalisation."""

import pytest
import torch

from qalign_kernels import testing
from qalign_kernels._triton.qalign_attention import unit_features
from qalign_kernels.unit_features import unit


@pytest.fixture(autouse=True)
def _poisoned():
    with testing.poisoned_memory():
        yield


def _hold(*tensors):
    for actual, x in zip(unit_features(*tensors), tensors, strict=True):
        assert actual.dtype == x.dtype and actual.is_contiguous()
        torch.testing.assert_close(actual, unit(x), rtol=4 * torch.finfo(x.dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [16, 40, 160])
def test_unit_features_of_any_strides(dim, dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn((2, 300, 3, dim), generator=generator).to(dtype).transpose(1, 2)
    reference = torch.randn((1, 3, 70, 2 * dim), generator=generator).to(dtype)[..., ::2]
    _hold(query, reference)


@pytest.mark.parametrize("special", [0.0, float("nan"), float("inf"), 1e-14, 1e-25])
def test_unit_features_of_special_values(special):
    query, reference = torch.ones((1, 1, 5, 16)), torch.ones((1, 1, 3, 16))
    query[..., 2, :], reference[..., 1, 3] = special, special
    _hold(query, reference)
