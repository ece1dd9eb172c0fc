"""Random calls of every public op against its dense float64 formula, with a bound that no code shares.

Without FUZZ_CALLS in the environment, each test draws the same few calls in every run. With it, the tests of
one backend draw that many new ones together. `make fuzz` sets it.
"""

import inspect
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import qalign_kernels as qk
from qalign_kernels import _backends
from tests.fuzz.calls import CALLS, Call
from tests.fuzz.draw import draws
from tests.fuzz.rounding import Approx, exact
from tests.kernels.ways import WAYS

CALLS_A_RUN = int(os.environ.get("FUZZ_CALLS", 0))


def budget(fixed: int) -> settings:
    """So many fixed calls for each op in the tests, or its share of FUZZ_CALLS new ones."""
    return settings(
        max_examples=-(-CALLS_A_RUN // len(CALLS)) if CALLS_A_RUN else fixed,
        derandomize=not CALLS_A_RUN,
        print_blob=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def surroundings() -> tuple:
    """What a call must leave as it is."""
    return (
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().sum().item(),
        _backends.requested(None),
    )


def same(first: Tensor, second: Tensor) -> bool:
    """Equal bits, where all NaN are one."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if not first.is_floating_point():
        return torch.equal(first, second)
    nan = first.isnan()
    return torch.equal(nan, second.isnan()) and torch.equal(first[~nan], second[~nan])


def excess(actual: Tensor, truth: Approx) -> Tensor:
    """How often the bound goes into the error, for each element. Equal infinities have no error."""
    difference = (actual.double() - truth.value).abs().masked_fill(actual == truth.value, 0)
    ratio = difference / (truth.error + torch.finfo(torch.float64).tiny)
    return ratio.nan_to_num(nan=float("inf")).masked_fill(~truth.error.isfinite() | (difference == 0), 0)


def assert_within(name: str, actual: Tensor, truth: Approx, reached: Tensor | None = None) -> None:
    found = excess(actual, truth)
    if reached is not None:
        found = found.masked_fill(reached.expand(found.shape), 0)
    worst = found.max().item() if found.numel() else 0.0
    place = (found == worst).nonzero()[:1].tolist()
    assert worst <= 1, f"{name}: error of {worst:.3g} bounds at {place}"


def check_values(call: Call, backend: str) -> list[Tensor]:
    results = call.run(call.leaves, backend)
    floats = [x for x in results if x.is_floating_point()]
    nan = any(x.isnan().any() for x in call.leaves.values())
    reached = call.reached(call.hits, results, backend) if call.hits else [None] * len(floats)
    for number, (x, truth, hit) in enumerate(zip(floats, call.truth(results, backend), reached)):
        assert_within(f"result {number}", x, truth.rounded(x.dtype), hit)
        if hit is not None and nan:
            assert x[call.lost(hit.expand(x.shape))].isnan().all(), f"result {number}: a NaN is lost"
    return results


def check_gradients(call: Call, backend: str, subset: tuple[str, ...], seed: int) -> None:
    leaves = {name: x.detach().requires_grad_(name in subset) for name, x in call.leaves.items()}
    results = [x for x in call.run(leaves, backend) if x.is_floating_point()]
    learned = [x.requires_grad for x in results]
    numbers = torch.Generator().manual_seed(seed)
    grads = [torch.randn(x.shape, generator=numbers).to(x.dtype) for x in results]
    grads = [grad.masked_fill(~x.isfinite(), 0) for grad, x in zip(grads, results)]
    inputs = [leaves[name] for name in subset]
    outputs, given = zip(*((x, grad) for x, grad, has in zip(results, grads, learned) if has))
    found = torch.autograd.grad(outputs, inputs, given, retain_graph=True)
    again = torch.autograd.grad(outputs, inputs, given)
    grads = [grad if has else torch.zeros_like(grad) for grad, has in zip(grads, learned)]
    truth = call.gradients([exact(grad) for grad in grads], backend)
    for name, x, y in zip(subset, found, again):
        assert same(x, y), f"gradient of {name}: other bits the second time"
        assert x.dtype == call.dtype
        assert_within(f"gradient of {name}", x, truth[name].rounded(call.dtype))


def check(data, name: str, backend: str) -> None:
    draw = draws(data, backend)
    call = CALLS[name](draw)
    gradients = call.has_gradient(backend) and draw.flag()
    if not gradients and draw.one(False, True, False):
        leaf = draw.one(*call.leaves)
        call.hits = {other: torch.zeros(x.shape, dtype=torch.bool) for other, x in call.leaves.items()}
        call.leaves[leaf], call.hits[leaf] = draw.poison(call.leaves[leaf])
    given = {n: x for n, x in (call.leaves | call.others).items() if isinstance(x, Tensor)}
    copies, before = {n: x.clone() for n, x in given.items()}, surroundings()
    results = check_values(call, backend)
    if draw.flag():
        with torch.autocast("cpu", torch.bfloat16):
            again = call.run(call.leaves, backend)
    else:
        again = call.run(call.leaves, backend)
    assert all(map(same, results, again)), "other bits the second time"
    if gradients:
        subset = tuple(x for x in call.learned if draw.flag()) or call.learned[:1]
        check_gradients(call, backend, subset, draw.numbers.initial_seed())
    assert all(same(x, copies[n]) for n, x in given.items()), "an input was changed"
    assert surroundings() == before, "the surroundings were changed"


def test_every_public_op_is_fuzzed():
    ops = {name for name in qk.__all__ if inspect.isfunction(getattr(qk, name))} - {"use_backend"}
    assert ops <= {word for name in CALLS for word in name.split()}


@pytest.mark.parametrize("name", CALLS)
@budget(12)
@given(st.data(), WAYS)
def test_tiled_calls_are_their_formulas(name, data, way):
    with way.taken():
        check(data, name, "tiled")


@pytest.mark.parametrize("name", CALLS)
@budget(12)
@given(st.data())
def test_reference_calls_are_their_formulas(name, data):
    check(data, name, "reference")


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@budget(3)
@given(st.data())
def test_interpreted_calls_are_their_formulas(name, data):
    refusal = _backends.triton_refusal(torch.empty(1), ())
    if refusal:
        pytest.skip(refusal)
    check(data, name, "triton")
