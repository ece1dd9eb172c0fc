"""Indices, rows and counts out of range: one result on all backends, and no memory of others is read."""

import pytest
import torch

from qalign_kernels import _backends, match_counts, rearrange_kv, similarity_argmax
from qalign_kernels.topk_attention import topk_attention
from tests.kernels.calls import CALLS, gradients, inputs

FAR = 10**6
ROWS = [name for name in CALLS if "rows" in name]
QUICK = ("attention rows", "similarity_argmax rows")  # of those in the interpreter
COUNTS = [name for name in CALLS if "counts" in name and name != "match_counts"]


def _with_gradients(name, x, backend):
    results = [CALLS[name](x, backend)]
    if backend != "triton":
        results += gradients(CALLS[name], x, backend)
    return results


def _check(name, out_of_range, in_range, backend):
    if backend == "triton" and (refusal := _backends.triton_refusal(torch.empty(1), ())):
        pytest.skip(refusal)
    for found, expected in zip(
        _with_gradients(name, out_of_range, backend), _with_gradients(name, in_range, backend)
    ):
        assert (found is None and expected is None) or torch.equal(found, expected)


def _of_rows(*rows):
    return inputs()._replace(rows=torch.tensor(rows, dtype=torch.int32))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("name", ROWS)
def test_rows_out_of_range_read_the_nearest(name, backend):
    _check(name, _of_rows(-1, FAR), _of_rows(0, 1), backend)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ROWS]
)
def test_interpreted_kernels_read_the_nearest_row(name):
    _check(name, _of_rows(-1, FAR), _of_rows(0, 1), "triton")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention rows", "qalign_attention rearranged labels rows"])
def test_interpreted_gradients_take_the_nearest_row(name):
    if refusal := _backends.triton_refusal(torch.empty(1), ()):
        pytest.skip(refusal)
    found, expected = (gradients(CALLS[name], x, "triton") for x in (_of_rows(FAR, -7), _of_rows(1, 0)))
    assert all(torch.equal(x, y) for x, y in zip(found, expected) if x is not None)


@pytest.mark.parametrize("backend", ["reference", "tiled", "triton"])
@pytest.mark.parametrize("name", COUNTS)
def test_negative_counts_are_zero(name, backend):
    x = inputs()
    negative = x.counts.masked_fill(x.counts == 0, -3)
    _check(name, x._replace(counts=negative), x, backend)


def test_indices_out_of_range_are_no_match(backend, device):
    index = torch.tensor([[[0, 3, 4, FAR, -1, -2, -FAR]]], dtype=torch.int32, device=device)
    assert match_counts(index, 4, backend=backend).tolist() == [[[1, 0, 0, 1]]]
    key = torch.randn(1, 2, 4, 16, device=device)
    moved, _ = rearrange_kv(key, key, index, backend=backend)
    assert torch.equal(moved[:, :, :2], key[:, :, [0, 3]]) and not moved[:, :, 2:].any()
    query, far = torch.randn(1, 2, 7, 16, device=device), index.unsqueeze(-1).expand(-1, -1, -1, 2)
    absent = torch.where((index >= 0) & (index < 4), index, -1).unsqueeze(-1).expand(-1, -1, -1, 2)
    found, expected = (topk_attention(query, key, key, x, backend=backend) for x in (far, absent))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_indices_out_of_range_have_no_gradient(backend):
    key = torch.randn(1, 1, 4, 16, requires_grad=True)
    index = torch.tensor([[[0, 4, FAR, -5]]], dtype=torch.int32)
    (grad,) = torch.autograd.grad(rearrange_kv(key, key, index, backend=backend)[0].sum(), key)
    assert torch.equal(grad[0, 0].sum(-1), torch.tensor([16.0, 0, 0, 0]))


def test_packed_score_of_a_zero_row_is_zero(device):
    if refusal := _backends.triton_refusal(torch.empty(1, device=device), ()):
        pytest.skip(refusal)
    query, reference = torch.randn(2, 1, 2, 40, 32, device=device).unbind(0)
    query[:, :, 3] = 0
    for similarity in ("dot", "cosine"):
        score = similarity_argmax(
            query, reference, similarity=similarity, heads="per_head", exact=False, backend="triton"
        ).score
        assert score[:, :, 3].tolist() == [[0.0, 0.0]] and (score != 0).sum() == 78
