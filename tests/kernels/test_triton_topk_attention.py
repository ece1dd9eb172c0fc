"""topk_attention on Triton, in the interpreter, against float64."""

import pytest
import torch

from qalign_kernels import testing
from qalign_kernels._triton.qalign_attention import topk_attention
from qalign_kernels.reference.qalign_attention import topk_attention as reference


@pytest.fixture(autouse=True)
def _poisoned():
    with testing.poisoned_memory():
        yield


def _inputs(
    dims=(40, 40),
    k=5,
    maps=1,
    dtype=torch.float32,
    batch=2,
    reference_batch=2,
    tokens=21,
    reference_tokens=33,
    seed=0,
):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn((batch, 3, tokens, dims[0]), generator=generator).to(dtype)
    key, value = (
        torch.randn((reference_batch, 3, reference_tokens, dim), generator=generator).to(dtype)
        for dim in dims
    )
    index = torch.randint(
        -1, reference_tokens, (batch, maps, tokens, k), generator=generator, dtype=torch.int32
    )
    return query, key, value, index


def _hold(query, key, value, index, scale=0.3, contrast=1.0, batch_index=None):
    settings = {"scale": scale, "contrast": contrast, "batch_index": batch_index}
    actual = topk_attention(query, key, value, index, **settings)
    truth = reference(query.double(), key.double(), value.double(), index, **settings)
    verdict = testing.judge(
        actual, reference(query, key, value, index, **settings), truth, max(query.shape[3], index.shape[3])
    )
    assert verdict.passed, verdict
    assert actual.dtype == query.dtype and actual.is_contiguous()
    return actual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("maps", [1, 3])
@pytest.mark.parametrize("contrast", [1.0, 1.67])
def test_topk_attention(dtype, maps, contrast):
    _hold(*_inputs(maps=maps, dtype=dtype), contrast=contrast)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(16, 160), (32, 48), (64, 80), (80, 64), (96, 128), (128, 96), (160, 32)])
def test_topk_attention_at_every_head_dim(dims):
    _hold(*_inputs(dims, k=3))


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 17])
def test_topk_attention_of_any_k(k):
    _hold(*_inputs(k=k), contrast=1.3)


def test_topk_attention_with_batch_index():
    _hold(*_inputs(batch=3), batch_index=torch.tensor([1, 1, 0], dtype=torch.int32))


def test_topk_attention_of_any_strides():
    query, key, value, index = _inputs()
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    key, value = key[:1].expand(2, -1, -1, -1), value.mT.contiguous().mT
    _hold(query, key, value, index.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))


@pytest.mark.parametrize("contrast", [1.0, 1.67])
def test_queries_without_candidates_give_zeros(contrast):
    query, key, value, index = _inputs()
    index[0, 0, 7], index[1] = -1, -1
    actual = _hold(query, key, value, index, contrast=contrast)
    assert not actual[0, :, 7].any() and not actual[1].any() and actual[0].any()


def test_one_candidate_gives_its_value():
    query, key, value, index = _inputs(k=1)
    index.clamp_(min=0)
    rows = index.long().expand(-1, 3, -1, -1)
    assert torch.equal(
        topk_attention(query, key, value, index, scale=1.0, contrast=1.0), value.take_along_dim(rows, dim=2)
    )


@pytest.mark.parametrize("contrast", [1.0, 1.67])
def test_nan_stays_with_its_query(contrast):
    query, key, value, index = _inputs()
    index.clamp_(min=0)
    query[0, 1, 4, 3] = float("nan")
    key[1, 2, 9, 0] = float("nan")
    actual = topk_attention(query, key, value, index, scale=0.3, contrast=contrast)
    nan = torch.zeros(actual.shape[:3], dtype=torch.bool)
    nan[0, 1, 4], nan[1, 2] = True, (index[1, 0] == 9).any(-1)
    assert (
        torch.equal(actual.isnan(), nan.unsqueeze(-1).expand_as(actual))
        and nan[1].any()
        and not nan[1, 2].all()
    )
