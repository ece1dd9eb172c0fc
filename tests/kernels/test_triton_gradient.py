"""The gradient of attention on Triton, in the interpreter, against the reference in float64.

Every flag is tested alone and together with others.
"""

import pytest
import torch

from qalign_kernels import Segment, attention, attention_with_lse, qalign_attention
from qalign_kernels._triton import _launch
from qalign_kernels.testing import judge, poisoned_memory, random_features, random_integers

DTYPES = [torch.float32, torch.float16]
BATCH, HEADS, QUERIES = 2, 1, 37


def features(dtype, tokens, dim, seed, rows=BATCH):
    return random_features(rows, HEADS, tokens, dim, seed=seed, dtype=dtype)


def gradients(tensors, options, backend, precision, *, with_lse=False, **settings):
    """The gradients of query, keys and values, for outputs weighted by random numbers.

    The log-sum-exp of a row that sees no key has no gradient.
    """
    count = len(options)
    leaves = [x.to(precision).detach().requires_grad_() for x in tensors]
    segments = [Segment(leaves[1 + i], leaves[1 + count + i], **more) for i, more in enumerate(options)]
    with poisoned_memory():
        output, lse = attention_with_lse(leaves[0], segments, backend=backend, **settings)
        weight = random_features(*output.shape, seed=90, dtype=tensors[0].dtype).to(precision)
        loss = (output * weight).sum()
        if with_lse:
            loss = loss + lse[lse.isfinite()].sin().sum()
        return torch.autograd.grad(loss, leaves)


def check(tensors, options=({},), **settings):
    dtype = tensors[0].dtype
    actual = gradients(tensors, options, "triton", dtype, **settings)
    yardstick, truth = (
        gradients(tensors, options, "reference", precision, **settings)
        for precision in (dtype, torch.float64)
    )
    reduction = 4 * max(QUERIES, tensors[0].shape[3], sum(x.shape[2] for x in tensors[1 : 1 + len(options)]))
    for ours, theirs, right in zip(actual, yardstick, truth):
        assert ours.dtype == dtype and ours.shape == right.shape
        verdict = judge(ours, theirs, right, reduction)
        assert verdict.passed, verdict
    return actual


def one_segment(dtype, tokens=45, dim=32, value_dim=None, rows=BATCH):
    return [
        features(dtype, QUERIES, dim, 0),
        features(dtype, tokens, dim, 1, rows),
        features(dtype, tokens, value_dim or dim, 2, rows),
    ]


def counts(tokens, maps=1, seed=5):
    return random_integers(0, 4, BATCH, maps, tokens, seed=seed)


def labels(tokens, rows=BATCH, seed=7):
    """Label sets, some of them empty."""
    return random_integers(0, 4, rows, tokens, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(40, 40), (64, 64), (80, 32), (96, 96), (128, 128), (160, 160), (32, 160)])
def test_head_dims(dtype, dims):
    check(one_segment(dtype, 45, *dims))


@pytest.mark.parametrize("tokens", [2, 31, 33, 64])
def test_tail_tiles(tokens):
    check(one_segment(torch.float32, tokens))


@pytest.mark.parametrize("queries", [1, 32, 64])
def test_tail_tiles_of_queries(queries):
    query, *rest = one_segment(torch.float32)
    check([features(torch.float32, queries, 32, 3), *rest])


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_sum_exp(dtype):
    check(one_segment(dtype), with_lse=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts(dtype):
    multiplicity = counts(71)
    multiplicity[:, :, 32:64] = 0  # a whole tile that no query reads
    _, key, value = check(one_segment(dtype, 71), [{"counts": multiplicity}], with_lse=True)
    for gradient in (key, value):
        assert (gradient[multiplicity == 0] == 0).all()


@pytest.mark.parametrize("maps", [1, 3])
def test_heads_and_their_counts(maps):
    query, key, value = (random_features(1, 3, n, 32, seed=n) for n in (17, 40, 41))
    check([query, key, value[:, :, :40]], [{"counts": random_integers(0, 4, 1, maps, 40, seed=6)}])


def test_absent_keys_are_never_read():
    tensors, multiplicity = one_segment(torch.float32, 71), counts(71)
    clean = gradients(tensors, [{"counts": multiplicity}], "triton", torch.float32)
    dirty = [
        x.masked_fill((multiplicity == 0).unsqueeze(-1), float("nan")) if i else x
        for i, x in enumerate(tensors)
    ]
    for ours, expected in zip(gradients(dirty, [{"counts": multiplicity}], "triton", torch.float32), clean):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_labels(dtype):
    query_labels = labels(QUERIES, 1, seed=8)
    query_labels[:, 3] = 8  # a label that no key has
    query, *_ = check(one_segment(dtype), [{"labels": labels(45)}], query_labels=query_labels, with_lse=True)
    assert (query[:, :, 3] == 0).all()


def test_no_key_to_see_gives_zeros():
    options = [{"labels": torch.full((1, 45), 2, dtype=torch.int32)}]
    for gradient in check(
        one_segment(torch.float32), options, query_labels=torch.ones(1, QUERIES, dtype=torch.int32)
    ):
        assert (gradient == 0).all()


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(scale):
    check(one_segment(torch.float32), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_several_queries_read(dtype):
    query = random_features(3, HEADS, QUERIES, 40, seed=0, dtype=dtype)
    tensors = [query, features(dtype, 45, 40, 1, 3), features(dtype, 45, 40, 2, 3)]
    options = [
        {
            "batch_index": torch.tensor([2, 0, 2], dtype=torch.int32),
            "counts": random_integers(0, 3, 3, 1, 45, seed=3),
        }
    ]
    _, key, value = check(tensors, options)
    assert (key[1] == 0).all() and (value[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_at_once(dtype):
    query, key, value = one_segment(dtype, 45, 40, 64)
    other = features(dtype, 19, 40, 4, 1), features(dtype, 19, 64, 5, 1)
    third = features(dtype, 33, 40, 6), features(dtype, 33, 64, 7)
    options = [
        {"counts": counts(45), "labels": labels(45), "logit_scale": 1.3, "logit_shift": -0.4},
        {"batch_index": torch.zeros(BATCH, dtype=torch.int32), "logit_scale": -0.7, "logit_shift": 0.2},
        {"labels": labels(33, 1, seed=9)},
    ]
    tensors = [query, key, other[0], third[0], value, other[1], third[1]]
    check(tensors, options, query_labels=labels(QUERIES, seed=8), with_lse=True, scale=0.2)


def test_any_strides():
    packed = random_features(BATCH, 37, 3, HEADS, 48, seed=13)
    query, key, value = packed[..., 5:45].permute(2, 0, 3, 1, 4)
    dense = [x.contiguous().requires_grad_() for x in (query, key, value)]
    loose = [x.detach().requires_grad_() for x in (query, key, value)]
    weight = random_features(BATCH, 37, HEADS, 40, seed=14).transpose(1, 2)
    ours, expected = (
        torch.autograd.grad(attention(x[0], Segment(*x[1:]), backend="triton"), x, grad_outputs=w)
        for x, w in ((loose, weight), (dense, weight.contiguous()))
    )
    for left, right in zip(ours, expected):
        assert torch.equal(left, right)


def test_repeats_are_equal_in_every_bit():
    tensors, options = (
        one_segment(torch.float32),
        [{"counts": counts(45), "batch_index": torch.tensor([1, 1], dtype=torch.int32)}],
    )
    first, second = (gradients(tensors, options, "triton", torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("wanted", range(3))
def test_only_what_is_needed_is_launched(wanted):
    launched = []
    leaves = [x.requires_grad_(i == wanted) for i, x in enumerate(one_segment(torch.float32))]
    output = attention(leaves[0], Segment(*leaves[1:]), backend="triton")
    with _launch.watching(lambda kernel, grid, how, _: launched.append((kernel.fn.__name__, how))):
        output.sum().backward()
    (first, _), (second, how) = launched
    assert first == "gradient_rows_kernel"
    assert second == ("query_gradient_kernel" if wanted == 0 else "key_gradient_kernel")
    if wanted > 0:
        assert (how["grad_key_ptr"] is None, how["grad_value_ptr"] is None) == (wanted == 2, wanted == 1)
    assert [x.grad is not None for x in leaves] == [i == wanted for i in range(3)]


def test_qalign_attention_learns():
    def learn(backend, precision):
        tensors = [
            features(torch.float32, n, 40, seed).to(precision).requires_grad_()
            for seed, n in enumerate((21, 22, 22))
        ]
        query, key, value = tensors
        output = qalign_attention(
            query, features(torch.float32, 22, 40, 5).to(precision), key, value, backend=backend
        )
        return torch.autograd.grad((output * output.detach().sin()).sum(), tensors)

    truth, plain, actual = (
        learn("reference", torch.float64),
        learn("reference", torch.float32),
        learn("triton", torch.float32),
    )
    for ours, theirs, right in zip(actual, plain, truth):
        assert judge(ours, theirs, right, 200).passed
