"""match_counts and rearrange_kv: exact on every backend."""

import pytest
import torch

from qalign_kernels import match_counts, rearrange_kv
from qalign_kernels.testing import judge, random_features, random_integers

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 70, 33), (1, 2, 33, 150), (3, 1, 300, 7)])
def test_counts_are_a_histogram(backend, shape, device):
    batch, groups, tokens, ref_tokens = shape
    index = random_integers(-1, ref_tokens, batch, groups, tokens, seed=0, device=device)
    counts = match_counts(index, ref_tokens, backend=backend)
    assert counts.dtype == torch.int32
    for row in range(batch):
        for group in range(groups):
            chosen = index[row, group]
            assert torch.equal(
                counts[row, group], torch.bincount(chosen[chosen >= 0], minlength=ref_tokens).int()
            )


def test_counts_sum_to_the_matched_tokens(backend, device):
    index = random_integers(-1, 40, 2, 2, 90, seed=1, device=device)
    assert torch.equal(match_counts(index, 40, backend=backend).sum(-1), (index >= 0).sum(-1))


def test_counts_do_not_depend_on_order(backend, device):
    index = random_integers(-1, 40, 2, 2, 90, seed=2, device=device)
    assert torch.equal(
        match_counts(index.flip(-1), 40, backend=backend), match_counts(index, 40, backend=backend)
    )


def test_counts_of_permutations_are_ones_without_matches_zeros(backend, device):
    index = torch.randperm(65, generator=torch.Generator().manual_seed(3)).int().view(1, 1, 65).to(device)
    assert torch.equal(match_counts(index, 65, backend=backend), torch.ones_like(index))
    assert torch.equal(match_counts(torch.full_like(index, -1), 65, backend=backend), torch.zeros_like(index))


def test_counts_of_strided_and_shared_maps(backend, device):
    index = random_integers(-1, 30, 2, 50, 3, seed=4, device=device).permute(0, 2, 1)
    assert torch.equal(
        match_counts(index, 30, backend=backend), match_counts(index.contiguous(), 30, backend="reference")
    )
    shared = index[:1, :1, ::2].expand(4, 2, -1)
    assert torch.equal(
        match_counts(shared, 30, backend=backend), match_counts(shared.contiguous(), 30, backend="reference")
    )


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("widths", [(40, 40), (64, 48), (160, 32)])
def test_gather_is_indexing(precision, groups, widths, device):
    backend, dtype = precision
    key, value = (
        random_features(2, 3, 37, width, seed=width + i, dtype=dtype, device=device)
        for i, width in enumerate(widths)
    )
    index = random_integers(0, 37, 2, groups, 50, seed=5, device=device)
    gathered = rearrange_kv(key, value, index, backend=backend)
    for source, result in zip((key, value), gathered):
        assert result.is_contiguous() and result.dtype == dtype
        for row in range(2):
            for head in range(3):
                assert torch.equal(result[row, head], source[row, head][index[row, head % groups].long()])


def test_no_match_gathers_zeros(backend, device):
    key = random_features(1, 2, 20, 40, seed=6, device=device)
    key[:, :, 0] = float("nan")  # what an unmatched token must not read
    index = torch.tensor([[[3, -1, 19]]], dtype=torch.int32, device=device)
    for result in rearrange_kv(key, key, index, backend=backend):
        assert torch.equal(result[:, :, 1], torch.zeros_like(result[:, :, 1]))
        assert torch.equal(result[:, :, ::2], key[:, :, [3, 19]])


def test_a_permutation_and_its_inverse_round_trip(backend, device):
    key, value = (random_features(2, 2, 45, 40, seed=s, device=device) for s in (7, 8))
    order = torch.randperm(45, generator=torch.Generator().manual_seed(9))
    there, back = (x.int().view(1, 1, 45).expand(2, -1, -1).to(device) for x in (order, order.argsort()))
    again = rearrange_kv(*rearrange_kv(key, value, there, backend=backend), back, backend=backend)
    assert torch.equal(again[0], key) and torch.equal(again[1], value)


def test_gather_from_strided_and_shared_features(backend, device):
    packed = random_features(2, 37, 2, 2, 48, seed=10, device=device)
    key, value = packed[..., 3:43].permute(2, 0, 3, 1, 4)
    index = random_integers(0, 37, 2, 1, 20, seed=11, device=device)
    for source in (key, value, key[:1].expand(2, -1, -1, -1)):
        result = rearrange_kv(source, source, index, backend=backend)[0]
        assert torch.equal(result, source.take_along_dim(index.long().unsqueeze(-1), dim=2))


def test_nan_and_infinity_are_copied(backend, device):
    key = random_features(1, 1, 5, 32, seed=12, device=device)
    key[0, 0, 2, :2] = torch.tensor([float("nan"), float("-inf")])
    result = rearrange_kv(
        key, key, torch.tensor([[[2, 1]]], dtype=torch.int32, device=device), backend=backend
    )[0]
    assert torch.equal(result.isnan(), key[:, :, [2, 1]].isnan()) and result[0, 0, 0, 1] == float("-inf")


def test_gradient_sums_over_tokens_that_chose_a_key(device):
    key, value = (random_features(2, 2, 30, 40, seed=s, device=device).requires_grad_() for s in (13, 14))
    index = random_integers(-1, 30, 2, 1, 80, seed=15, device=device)
    weights = [random_features(2, 2, 80, 40, seed=s, device=device) for s in (16, 17)]

    def gradients(key, value, backend):
        outputs = rearrange_kv(key, value, index, backend=backend)
        return torch.autograd.grad(sum((x * w).sum() for x, w in zip(outputs, weights)), (key, value))

    doubles = [x.detach().double().requires_grad_() for x in (key, value)]
    for actual, same, truth in zip(
        gradients(key, value, "tiled"), gradients(key, value, "reference"), gradients(*doubles, "reference")
    ):
        assert judge(actual, same, truth, 80).passed
