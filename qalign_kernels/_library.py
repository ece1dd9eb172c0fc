"""Registration of ops with torch.library: schema, implementation, fake implementation and gradient."""

from collections.abc import Callable

import torch

from . import _ambient, _contracts

LIBRARY = torch.library.Library("qalign_kernels", "DEF")


def register(
    name: str,
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Define the op `qalign_kernels::name` and return it.

    `implementation` serves every device and chooses its backend itself. `fake` gives the shapes and dtypes of
    the results. Without `backward` the op has no gradient.
    """
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.needs_fixed_stride_order,))
    LIBRARY.impl(name, _ambient.without_autocast(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"qalign_kernels::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"qalign_kernels::{name}", backward, setup_context=setup_context, lib=LIBRARY
        )
    return getattr(torch.ops.qalign_kernels, name).default


def no_second_derivative(op: str, reason: str) -> dict[str, Callable]:
    """Arguments of `register` that make a second derivative of `op` raise; it would silently be zero."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"{op}: expected one derivative, got a second one: {reason}")

    return {"setup_context": lambda ctx, inputs, output: None, "backward": refuse}


def scale_of(query: torch.Tensor, scale: float | None) -> float:
    """`scale`, checked, or 1/sqrt(D); torch.compile takes the head dim for constant, as the kernels do."""
    return int(query.shape[3]) ** -0.5 if scale is None else _contracts.number("scale", scale)


def accumulate_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of scores, sums, log-sum-exps and probes: float32, or float64 for float64 input."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records an op on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
