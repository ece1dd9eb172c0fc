"""The matrix products of the references, whose derivatives stay outside of autocast.

With a mask of the pairs that are seen, other pairs take no part, not even with a NaN or an infinity.
"""

import torch
from torch import Tensor

_BATCHED = torch._C._dispatch_key_parse("Batched")


def product(a: Tensor, b: Tensor, seen: Tensor | None = None) -> Tensor:
    """a @ b for batches of one size; differentiable any number of times, inside `torch.autocast` too.

    `seen` [..., M, K] says which a_mk b_kd are summed. None: all.
    """
    return _Product.apply(a, b) if seen is None else _SeenProduct.apply(a, b, seen)


def pairs(a: Tensor, b: Tensor, seen: Tensor | None = None) -> Tensor:
    """a_m·b_k for each pair of rows, 0 where it is not seen; differentiable as `product`."""
    return product(a, b.mT) if seen is None else _SeenPairs.apply(a, b, seen)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as `dtype` holds it. Its gradient is not rounded, so that it cannot overflow in `dtype`."""
    return x if x.dtype == dtype else x + (x.detach().to(dtype).to(x.dtype) - x.detach())


class _Saved(torch.autograd.Function):
    """A function whose derivatives read all of its inputs."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


class _Product(_Saved):
    @staticmethod
    def forward(a, b):
        with torch.autocast(a.device.type, enabled=False):
            return a @ b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        return product(grad, b.mT) if needs_a else None, product(a.mT, grad) if needs_b else None

    @staticmethod
    def jvp(ctx, tangent_a, tangent_b):
        a, b = ctx.saved_tensors
        return product(tangent_a, b) + product(a, tangent_b)


class _SeenProduct(_Saved):
    @staticmethod
    def forward(a, b, seen):
        with torch.autocast(a.device.type, enabled=False):
            return _sum_of_seen(a.masked_fill(~seen, 0), b, seen)

    @staticmethod
    def backward(ctx, grad):
        a, b, seen = ctx.saved_tensors
        needs_a, needs_b, _ = ctx.needs_input_grad
        return (
            pairs(grad, b, seen) if needs_a else None,
            product(a.mT, grad, _transposed(seen, a)) if needs_b else None,
            None,
        )

    @staticmethod
    def jvp(ctx, tangent_a, tangent_b, _):
        a, b, seen = ctx.saved_tensors
        return product(tangent_a, b, seen) + product(a, tangent_b, seen)


class _SeenPairs(_Saved):
    @staticmethod
    def forward(a, b, seen):
        with torch.autocast(a.device.type, enabled=False):
            return (a @ b.mT).masked_fill(~seen, 0)

    @staticmethod
    def backward(ctx, grad):
        a, b, seen = ctx.saved_tensors
        needs_a, needs_b, _ = ctx.needs_input_grad
        return (
            product(grad, b, seen) if needs_a else None,
            product(grad.mT, a, _transposed(seen, grad)) if needs_b else None,
            None,
        )

    @staticmethod
    def jvp(ctx, tangent_a, tangent_b, _):
        a, b, seen = ctx.saved_tensors
        return pairs(tangent_a, b, seen) + pairs(a, tangent_b, seen)


def _transposed(seen: Tensor, like: Tensor) -> Tensor:
    return seen.expand(like.shape).mT


def _sum_of_seen(a: Tensor, b: Tensor, seen: Tensor) -> Tensor:
    """Σ_k a_mk b_kd over the pairs that are seen. `a` is 0 elsewhere, where b may hold anything."""
    if _known_finite(b):
        return a @ b
    rising, falling = b == float("inf"), b == float("-inf")
    infinite = rising | falling
    zero = (a == 0) & seen
    total = a @ b.masked_fill(infinite | b.isnan(), 0)
    total = total.masked_fill(_meet(a > 0, rising) | _meet(a < 0, falling), float("inf"))
    below = _meet(a > 0, falling) | _meet(a < 0, rising)
    total = total + torch.zeros_like(total).masked_fill(below, float("-inf"))
    return total.masked_fill(_meet(seen.expand(a.shape), b.isnan()) | _meet(zero, infinite), float("nan"))


def _known_finite(x: Tensor) -> bool:
    """Whether all of x is finite. A device, a compiler, a transform and the older vmap cannot be asked."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._dispatch_keys(x).has(_BATCHED):
        return False
    return bool(x.isfinite().all())


def _meet(left: Tensor, right: Tensor) -> Tensor:
    """Whether left_mk and right_kd are both true for some k."""
    return (left.float() @ right.float()) > 0
