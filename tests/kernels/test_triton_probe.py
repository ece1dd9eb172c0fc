"""label_mass and mean_attention_map on Triton, in the interpreter, against the reference in float64."""

import pytest
import torch

from qalign_kernels import testing
from qalign_kernels._triton import probe as kernels
from qalign_kernels.reference import probe as truth

DTYPES = [torch.float32, torch.float16]
BATCH, HEADS, QUERIES, KEYS = 2, 2, 37, 45


def _features(dtype, dim):
    return [
        2 * testing.random_features(BATCH, HEADS, tokens, dim, seed=tokens, dtype=dtype)
        for tokens in (QUERIES, KEYS)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim,num_labels", [(16, 1), (40, 5), (80, 20)])
@pytest.mark.parametrize("counted", [False, True])
def test_label_mass(dtype, dim, num_labels, counted):
    """Ids outside the range belong to no class."""
    labels = testing.random_integers(-1, num_labels + 1, 1 if counted else BATCH, KEYS, seed=1)
    counts = testing.random_integers(0, 3, BATCH, HEADS, KEYS, seed=2) if counted else None
    with testing.poisoned_memory():
        actual = kernels.label_mass(
            *_features(dtype, dim), labels, num_labels, scale=dim**-0.5, counts=counts
        )

    def formula(query, key):
        return truth.label_mass(query, key, labels, num_labels, scale=dim**-0.5, counts=counts)

    verdict = testing.judge_formula(actual, formula, *_features(dtype, dim), reduction=KEYS)
    assert actual.dtype == torch.float32 and actual.is_contiguous() and verdict.passed, verdict


def test_masses_sum_to_one():
    labels = testing.random_integers(0, 128, BATCH, KEYS, seed=1)
    mass = kernels.label_mass(*_features(torch.float16, 32), labels, 128, scale=0.2, counts=None)
    ones = torch.ones(BATCH, HEADS, QUERIES)
    assert testing.worst_error(mass.sum(-1), ones) <= testing.error_budget(ones, ones, KEYS)


def test_label_mass_without_keys():
    counts = torch.zeros((BATCH, 1, KEYS), dtype=torch.int32)
    assert not kernels.label_mass(
        *_features(torch.float32, 16), torch.zeros((1, KEYS), dtype=torch.int32), 3, scale=1.0, counts=counts
    ).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim,scale", [(16, 0.15), (40, -0.15), (160, 0.1)])
def test_mean_attention_map(dtype, dim, scale):
    with testing.poisoned_memory():
        actual = kernels.mean_attention_map(*_features(dtype, dim), scale=scale)

    def formula(query, key):
        return truth.mean_attention_map(query, key, scale=scale)

    verdict = testing.judge_formula(actual, formula, *_features(dtype, dim), reduction=KEYS)
    assert actual.dtype == torch.float32 and verdict.passed, verdict


def test_views():
    storage = testing.random_features(BATCH, QUERIES, HEADS, 2, 32, seed=3)
    query, key = (storage[:, :, :, i].transpose(1, 2) for i in range(2))
    key = key[:, :1].expand(BATCH, HEADS, QUERIES, 32)
    labels = testing.random_integers(0, 4, 1, QUERIES, seed=4).expand(BATCH, -1)
    mass = kernels.label_mass(query, key, labels, 4, scale=0.2, counts=None)
    assert testing.judge_formula(
        mass, lambda q, k: truth.label_mass(q, k, labels, 4, scale=0.2), query, key, reduction=QUERIES
    ).passed
    mean = kernels.mean_attention_map(query, key, scale=0.2)
    assert testing.judge_formula(
        mean, lambda q, k: truth.mean_attention_map(q, k, scale=0.2), query, key, reduction=QUERIES
    ).passed


@pytest.mark.parametrize("place", [0, 1])
def test_nan_gives_nan(place):
    features = _features(torch.float32, 16)
    features[place][1, 1, 3, 4] = float("nan")
    labels = torch.zeros((1, KEYS), dtype=torch.int32)
    mass = kernels.label_mass(*features, labels, 2, scale=0.2, counts=None)
    assert torch.equal(mass.isnan(), truth.label_mass(*features, labels, 2, scale=0.2).isnan())
    mean = kernels.mean_attention_map(*features, scale=0.2)
    assert torch.equal(mean.isnan(), truth.mean_attention_map(*features, scale=0.2).isnan())
