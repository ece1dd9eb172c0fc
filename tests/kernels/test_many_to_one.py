"""Gradients of many queries that read one token, and large gradients in half precision, against float64.

Plain PyTorch sums and overflows in the dtype of the input, so it is no yardstick here.
"""

import pytest
import torch

from qalign_kernels import _backends, qalign_attention
from qalign_kernels.testing import float64_bounds, random_features
from tests.kernels.calls import CALLS, inputs

TOKENS = 400  # of which 300 read one token; a sum of ones in bfloat16 stops at 256
TOKEN = 5
NAMES = [
    name for name in CALLS if name != "match_counts"
]  # of which only the mean of the test has a gradient
FAST = ("rearrange_kv", "similarity_argmax", "attention", "qalign_attention topk", "qalign_attention none")


def _leaves(dtype, tokens):
    """Three of four queries are nearly TOKEN, the others tokens of their own: rounding changes no match."""
    noise, reference, key, value = (random_features(1, 2, tokens, 16, seed=seed) for seed in range(4))
    query = reference.clone()
    query[:, :, torch.arange(tokens) % 4 != 0] = reference[:, :, TOKEN : TOKEN + 1]
    key[:, :, TOKEN] = reference[:, :, TOKEN]
    return [x.to(dtype) for x in (query + 0.05 * noise, reference, key, value)]


def _gradients(call, backend, x, leaves, incoming=None):
    """The gradients of a call, zeros for what it does not learn."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    output = call(x.of(leaves), backend)
    if incoming is None:
        incoming = torch.linspace(0.5, 1.5, output.numel()).bfloat16().view(output.shape)
    given = torch.as_tensor(incoming).to(output.dtype).expand(output.shape)
    found = torch.autograd.grad(output, leaves, given, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, leaves)]


def _inputs(name, tokens):
    """All queries see TOKEN, which counts once."""
    x = inputs(1, tokens)
    labels, counts = x.labels | (4 if "labels" in name else 0), x.counts.clone()
    counts[:, :, TOKEN] = 1
    return x._replace(labels=labels, counts=counts)


def _check(name, backends, dtype, tokens):
    call, x, leaves = CALLS[name], _inputs(name, tokens), _leaves(dtype, tokens)
    bounds = float64_bounds(
        lambda *leaves: _gradients(call, "reference", x, leaves), *leaves, reduction=4 * tokens
    )
    for backend in backends:
        for place, (bound, grad) in enumerate(zip(bounds, _gradients(call, backend, x, leaves), strict=True)):
            verdict = bound.judge(grad)
            assert grad.dtype == dtype and verdict.passed, (backend, place, verdict)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES]
)
def test_many_queries_on_one_token(name):
    _check(name, ("reference", "tiled"), torch.bfloat16, TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "attention labels", "attention counts", "label_mass counts"])
def test_interpreted_kernels_sum_many_queries(name):
    if refusal := _backends.triton_refusal(torch.empty(1), ()):
        pytest.skip(refusal)
    _check(name, ("triton",), torch.float16, 200)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("name", NAMES)
def test_large_gradients_do_not_overflow_early(name, backend):
    """An incoming gradient of 8192 in float16: what half of the largest number holds is found."""
    call, x = CALLS[name], inputs(1, 12)
    half = [leaf.half() for leaf in x.leaves()]
    truth = _gradients(call, "reference", x, [leaf.double() for leaf in half], 8192.0)
    for grad, exact in zip(_gradients(call, backend, x, half, 8192.0), truth, strict=True):
        fits = exact.abs().amax(-1) < torch.finfo(torch.float16).max / 2
        assert grad[fits].isfinite().all()


def test_bounds_refuse_sums_in_half_precision():
    """The gather of plain PyTorch, whose gradient stops at 256."""
    value, rows = torch.randn(4, 8).bfloat16(), torch.zeros(4096, dtype=torch.int64)

    def gradient(value):
        value = value.detach().requires_grad_()
        return torch.autograd.grad(value[rows].sum(), [value])

    (bound,) = float64_bounds(gradient, value, reduction=4096)
    assert not bound.judge(*gradient(value)).passed
    assert bound.judge(*gradient(value.double())).passed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_guided_with_a_gradient_has_the_same_bits(dtype):
    features = [leaf.to(dtype) for leaf in inputs().leaves()]
    learned = [leaf.clone().requires_grad_() for leaf in features]
    plain, found = (
        qalign_attention(*leaves, refinement="guided", backend="tiled") for leaves in (features, learned)
    )
    assert torch.equal(plain, found)
