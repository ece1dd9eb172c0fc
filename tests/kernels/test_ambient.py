"""The result of an op depends on its arguments alone, whatever the caller has switched on around it."""

import contextlib
import inspect
import threading

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import qalign_kernels as qk
from qalign_kernels import _backends, use_backend
from tests.kernels.calls import CALLS, gradients, inputs

BACKENDS = ("reference", "tiled")


@contextlib.contextmanager
def _flags():
    kept = [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("flash", "mem_efficient")]
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(kept[0])
        torch.backends.cuda.enable_mem_efficient_sdp(kept[1])


@contextlib.contextmanager
def _default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def _deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS = {
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "SDPA by maps": lambda: sdpa_kernel(SDPBackend.MATH),
    "SDPA that the CPU lacks": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    "fused SDPA switched off": _flags,
    "default dtype float64": _default_dtype,
    "default device meta": lambda: torch.device("meta"),
    "deterministic algorithms": _deterministic,
}


def _same(first, second):
    if first is None or second is None:
        return first is second
    return first.dtype == second.dtype and first.device == second.device and torch.equal(first, second)


def test_every_public_op_is_swept():
    ops = {name for name in qk.__all__ if inspect.isfunction(getattr(qk, name))} - {"use_backend"}
    assert ops == {name.split()[0] for name in CALLS}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_surroundings_stay_outside_of_ops(name, backend):
    call, x = CALLS[name], inputs()
    plain = call(x, backend), *gradients(call, x, backend)
    for surrounding, enter in SURROUNDINGS.items():
        given = x.leaves()
        with enter():
            output = call(x, backend)
        assert _same(output, plain[0]), surrounding
        leaves = [leaf.clone().requires_grad_() for leaf in given]
        weight = torch.linspace(-1, 1, output.numel()).view(output.shape)
        with enter():
            loss = (call(x.of(leaves), backend) * weight).sum()
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        assert all(map(_same, found, plain[1:])), surrounding


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_interpreted_kernels_ignore_autocast(name):
    refusal = _backends.triton_refusal(torch.empty(1), ())
    if refusal:
        pytest.skip(refusal)
    call, x = CALLS[name], inputs(batch=1)
    plain = call(x, "triton")
    with torch.autocast("cpu", torch.bfloat16):
        assert _same(call(x, "triton"), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_in_autocast_are_cast(backend):
    """As after a float32 norm of queries and keys; SDPA casts them likewise."""
    x = inputs()
    half = [leaf.bfloat16() for leaf in x.leaves()]
    plain = qk.attention(half[0], qk.Segment(half[2], half[3]), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert _same(qk.attention(x.query, qk.Segment(x.key, half[3]), backend=backend), plain)
    with pytest.raises(TypeError, match="value: expected the dtype of query"):
        qk.attention(x.query, qk.Segment(x.key, half[3]), backend=backend)


def test_each_thread_has_its_own_backend():
    entered, left = threading.Event(), threading.Event()
    seen = {}

    def first():
        with use_backend("reference"):
            entered.set()
            left.wait()
            seen["first"] = _backends.requested(None)

    def second():
        entered.wait()
        with use_backend("tiled"):
            left.set()
            seen["second"] = _backends.requested(None)
        seen["after"] = _backends.requested(None)

    threads = [threading.Thread(target=function) for function in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": "reference", "second": "tiled", "after": "auto"}


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("match_counts")])
def test_forward_mode_is_refused_or_right(name):
    """No tangent is lost: the reference has them, the other backends name the argument that carries one."""
    call, x = CALLS[name], inputs()
    leaves = x.leaves()
    tangents = [torch.ones_like(leaf) for leaf in leaves]
    with pytest.raises(RuntimeError, match="expected a tensor without a forward-mode tangent"):
        torch.func.jvp(lambda *leaves: call(x.of(list(leaves)), "tiled"), tuple(leaves), tuple(tangents))
    _, found = torch.func.jvp(
        lambda *leaves: call(x.of(list(leaves)), "reference"), tuple(leaves), tuple(tangents)
    )
    grads = gradients(call, x, "reference")
    weight = torch.linspace(-1, 1, found.numel()).view(found.shape)
    expected = sum(grad.sum() for grad in grads if grad is not None)
    torch.testing.assert_close((found * weight).sum(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gathered_gradients_sum_in_float32(backend, dtype):
    """4096 queries on one token: a sum in the dtype of the input stops at 256 or 2048."""
    tokens = 4096
    index = torch.zeros(1, 1, tokens, dtype=torch.int32)
    value = torch.zeros(1, 1, 4, 8, dtype=dtype, requires_grad=True)
    moved = qk.rearrange_kv(value, value, index, backend=backend)[1]
    assert torch.autograd.grad(moved.sum(), value)[0][0, 0, 0].tolist() == [tokens] * 8
    query = torch.zeros(1, 1, tokens, 8, dtype=dtype)
    reference = torch.zeros(1, 1, 4, 8, dtype=dtype)
    for refinement in ("none", "warped_output", "topk", "rearranged"):
        found = qk.qalign_attention(
            query, reference, reference, value, refinement=refinement, topk=1, backend=backend
        )
        (grad,) = torch.autograd.grad(found.sum(), value)
        assert grad.float().sum() == tokens * 8, refinement
