"""match_counts, compact and take_rows on Triton, in the interpreter, equal the reference exactly."""

import pytest
import torch

from qalign_kernels import testing
from qalign_kernels._triton import rearrange
from qalign_kernels.reference import rearrange as truth


@pytest.fixture(autouse=True)
def _poisoned():
    with testing.poisoned_memory():
        yield


def _index(shape, num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, num_tokens, shape, generator=generator, dtype=torch.int32)


def _gathered(key, value, index):
    return [rearrange.take_rows(x, index) for x in (key, value)]


@pytest.mark.parametrize(
    "shape,num_tokens", [((1, 1, 1), 1), ((2, 3, 70), 41), ((1, 2, 1500), 2100), ((3, 1, 129), 7)]
)
def test_match_counts(shape, num_tokens):
    index = _index(shape, num_tokens)
    counts = rearrange.match_counts(index, num_tokens)
    assert counts.dtype == torch.int32
    assert torch.equal(counts, truth.match_counts(index, num_tokens))
    assert torch.equal(counts.sum(-1), (index >= 0).sum(-1))


def test_match_counts_of_strided_index():
    index = _index((70, 2, 3), 41).permute(2, 1, 0)
    assert torch.equal(rearrange.match_counts(index, 41), truth.match_counts(index, 41))
    shared = _index((1, 1, 50), 41).expand(2, 3, 50)
    assert torch.equal(rearrange.match_counts(shared, 41), truth.match_counts(shared, 41))


def test_match_counts_of_no_match():
    assert not rearrange.match_counts(torch.full((2, 1, 33), -1, dtype=torch.int32), 9).any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 100), (1, 2, 2048), (1, 1, 5000)])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_compact(shape, share):
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(1, 9, shape, generator=generator, dtype=torch.int32) * (
        torch.rand(shape, generator=generator) < share
    )
    _check_multiplicity(rearrange.compact(counts), counts)


def _check_multiplicity(found, counts):
    assert torch.equal(found.unique, (counts > 0).sum(-1).int())
    assert torch.equal(found.total, counts.sum(-1).float())
    assert torch.equal(found.headroom, (counts.amax(-1) / 32768).clamp(min=1).log2())
    for order, weights, number, row_counts in zip(
        *(x.flatten(0, 1) for x in (found.order, found.weights, found.unique, counts))
    ):
        assert torch.equal(order[:number], row_counts.nonzero().squeeze(-1).int())
        assert torch.equal(weights[:number], row_counts[row_counts > 0].float())
        assert not order[number:].any() and not weights[number:].any()
    assert torch.allclose(found.log_weights, found.weights.clamp(min=1).log2(), rtol=1e-6, atol=0)


def test_compact_of_large_counts():
    counts = torch.tensor([[[0, 1 << 20, 3]]], dtype=torch.int32)
    assert rearrange.compact(counts).headroom.item() == 5


def test_compact_of_strided_counts():
    counts = (_index((60, 2, 3), 4) + 1).permute(2, 1, 0)
    expected = rearrange.compact(counts.contiguous())
    assert all(torch.equal(actual, wanted) for actual, wanted in zip(rearrange.compact(counts), expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("maps", [1, 3])
@pytest.mark.parametrize("dims", [(40, 40), (64, 16), (1, 130)])
def test_take_rows(dtype, maps, dims):
    generator = torch.Generator().manual_seed(2)
    key, value = (torch.randn((2, 3, 37, dim), generator=generator).to(dtype) for dim in dims)
    index = _index((2, maps, 71), 37)
    for actual, expected in zip(_gathered(key, value, index), truth.rearrange_kv(key, value, index)):
        assert actual.is_contiguous() and actual.dtype == dtype
        assert torch.equal(actual, expected)


def test_take_rows_of_any_strides():
    generator = torch.Generator().manual_seed(3)
    key = torch.randn((2, 37, 3, 40), generator=generator).transpose(1, 2)[..., ::2]
    value = torch.randn((1, 3, 37, 24), generator=generator).expand(2, -1, -1, -1)
    index = _index((71, 1, 2), 37).permute(2, 1, 0)
    for actual, expected in zip(_gathered(key, value, index), truth.rearrange_kv(key, value, index)):
        assert torch.equal(actual, expected)


def test_take_rows_keeps_nan_and_zeroes_unmatched_rows():
    key = torch.full((1, 1, 3, 16), float("nan"))
    gathered = rearrange.take_rows(key, torch.tensor([[[2, -1]]], dtype=torch.int32))
    assert gathered[0, 0, 0].isnan().all() and not gathered[0, 0, 1].any()


def _chosen(counts, source):
    """The tokens of a source [H, N, D] that one row of the counts [G, N] chose: a list for each head."""
    groups = counts.shape[0]
    return [
        source[head, (counts[head % groups] > 0).nonzero().squeeze(-1)] for head in range(source.shape[0])
    ]


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("maps", [1, 3])
@pytest.mark.parametrize("tokens", [1, 257])
def test_take_chosen_keeps_the_order_and_clears_behind(tokens, maps, share):
    generator = torch.Generator().manual_seed(4)
    key, value = (torch.randn((2, 3, tokens, dim), generator=generator).half() for dim in (40, 16))
    counts = torch.randint(1, 9, (2, maps, tokens), generator=generator, dtype=torch.int32)
    counts *= torch.rand(counts.shape, generator=generator) < share
    taken, found = rearrange.take_chosen([key, value], counts, None)
    _check_taken(taken, [key, value], counts, found.unique)
    expected = rearrange.compact(counts)
    assert found.order is None
    assert all(torch.equal(x, y) for x, y in zip(found[1:], expected[1:]))


def _check_taken(taken, sources, counts, unique):
    cleared = rearrange.CLEARED.value
    for x, source in zip(taken, sources):
        assert x.is_contiguous()
        for row in range(counts.shape[0]):
            for head, expected in enumerate(_chosen(counts[row], source[row])):
                number = len(expected)
                assert number == unique[row, head % counts.shape[1]]
                assert torch.equal(x[row, head, :number], expected)
                assert not x[row, head, number : -(-number // cleared) * cleared].any()


def test_take_chosen_of_many_tokens():
    """A program counts the chosen tokens before its own tokens in several blocks."""
    tokens = 2 * rearrange.COMPACT_BLOCKS[1] + 1100
    generator = torch.Generator().manual_seed(5)
    source = torch.randn((1, 2, tokens, 16), generator=generator)
    counts = torch.randint(-1, 2, (1, 1, tokens), generator=generator, dtype=torch.int32)
    taken, found = rearrange.take_chosen([source], counts, None)
    _check_taken(taken, [source], counts, found.unique)
    assert all(torch.equal(x, y) for x, y in zip(found[1:], rearrange.compact(counts)[1:]))


def test_take_chosen_of_any_strides_and_rows():
    generator = torch.Generator().manual_seed(6)
    source = torch.randn((2, 300, 3, 80), generator=generator).transpose(1, 2)[..., ::2]
    counts = (_index((300, 3, 3), 4) + 1).permute(2, 1, 0)
    rows = torch.tensor([1, 0, 1], dtype=torch.int32)
    taken, found = rearrange.take_chosen([source], counts, rows)
    _check_taken(taken, [source[rows.long()]], counts, found.unique)
