"""Registered ops under the transforms of torch.func, and under batched gradients.

Reverse mode is recorded at every level of nested transforms. vmap runs an op item by item. A forward-mode
tangent is refused at every level.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import autograd_function
from torch.autograd import forward_ad, function

# torch.autograd.Function refuses functions whose `forward` saves tensors inside a transform
_Function: Any = getattr(function, "_SingleLevelFunction", function.Function)
_BATCHED = torch._C._dispatch_key_parse("Batched")


def autograd_kernel(op: Any, setup_context: Callable, backward: Callable) -> Callable:
    """Make the autograd kernel of an op; that of torch.library.register_autograd refuses torch.func.

    `setup_context(ctx, inputs, output)` gets the arguments of the op. `backward(ctx, *grads)` gives the
    gradients of its first arguments, and those of a list one by one, as `ctx.needs_input_grad` does.
    """
    returns_list = isinstance(op._schema.returns[0].type, torch.ListType)
    lists = [place for place, x in enumerate(op._schema.arguments) if isinstance(x.type, torch.ListType)]

    class Call(_Function):
        @staticmethod
        def forward(ctx, *leaves):
            *leaves, sizes, keyset = leaves
            arguments = _unflattened(leaves, sizes)
            with _recorded_below():
                result = _below_autograd(op, keyset, arguments)
            ctx.given = len(leaves) + 2
            setup_context(ctx, arguments, result)
            return tuple(result) if returns_list else result

        @staticmethod
        def backward(ctx, *grads):
            found = backward(ctx, *grads)
            found = found if isinstance(found, tuple) else (found,)
            return *found, *[None] * (ctx.given - len(found))

    def kernel(keyset: torch.DispatchKeySet, *arguments: Any) -> Any:
        for place in lists:
            if arguments[place] is None:  # AOTInductor's empty list
                arguments = (*arguments[:place], [], *arguments[place + 1 :])
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, arguments)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return _below_autograd(op, keyset, arguments)
        leaves, sizes = _flattened(arguments)
        with _one_level():
            result = Call.apply(*leaves, sizes, keyset)
        return list(result) if returns_list else result

    return kernel


def each_item(op: Callable, info: Any, in_dims: Sequence, *arguments: Any) -> tuple[Any, Any]:
    """The rule of vmap: run the op on each item and stack the results."""
    leaves, sizes = _flattened(arguments)
    result = _each(op, info.batch_size, leaves, _flattened(in_dims)[0], sizes)
    return result, 0 if isinstance(result, Tensor) else type(result)([0] * len(result))


def each_gradient(op: Callable, *arguments: Any) -> Any:
    """The rule of the older vmap, that of `torch.autograd.grad(is_grads_batched=True)`."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    leaves, sizes = _flattened(arguments)
    batched = [isinstance(x, Tensor) and torch._C._dispatch_keys(x).has(_BATCHED) for x in leaves]
    leaves = [torch._remove_batch_dim(x, level, 1, 0) if each else x for x, each in zip(leaves, batched)]
    size = next(len(x) for x, each in zip(leaves, batched) if each)
    result = _each(op, size, leaves, [0 if each else None for each in batched], sizes)
    if isinstance(result, Tensor):
        return torch._add_batch_dim(result, 0, level)
    return type(result)(torch._add_batch_dim(x, 0, level) for x in result)


def requires_grad(tensor: Tensor) -> bool:
    """Whether the tensor requires a gradient, at any level of nested transforms.

    torch.compile traces only the innermost level, so all tensors do inside a transform.
    """
    if torch.compiler.is_compiling():
        return tensor.requires_grad or torch._C._are_functorch_transforms_active()
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor) and not tensor.requires_grad:
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def _each(op: Callable, size: int, leaves: list, dims: list, sizes: list) -> Any:
    items = []
    for place in range(size):
        item = [x if dim is None else x.select(dim, place) for x, dim in zip(leaves, dims)]
        items.append(op(*_unflattened(item, sizes)))
    if isinstance(items[0], Tensor):
        return torch.stack(items)
    return type(items[0])(torch.stack(parts) for parts in zip(*items))


def _below_autograd(op: Any, keyset: torch.DispatchKeySet, arguments: Sequence) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


@contextlib.contextmanager
def _one_level() -> Iterator[None]:
    """Allow `_Function` inside a transform: it records one level, and the op goes on to the next."""
    if not torch._C._are_functorch_transforms_active():
        yield
        return
    with autograd_function.enable_single_level_autograd_function():
        yield


@contextlib.contextmanager
def _recorded_below() -> Iterator[None]:
    """Let the next levels record, although torch runs `forward` without gradients and tangents."""
    if not torch._C._are_functorch_transforms_active():
        yield
        return
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def _refuse_tangents(op: Any, arguments: Sequence) -> None:
    for argument, value in zip(op._schema.arguments, arguments):
        for x in value if isinstance(value, list) else [value]:
            if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                raise RuntimeError(
                    f"{argument.name}: expected a tensor without a forward-mode tangent, got one in "
                    f"{op._schema.name.split('::')[1]}: only backend='reference' has forward-mode derivatives"
                )


def _flattened(arguments: Sequence) -> tuple[list, list]:
    """The arguments with those of lists one by one, and the lengths of the lists."""
    leaves = []
    for argument in arguments:
        leaves += argument if isinstance(argument, list) else [argument]
    return leaves, [len(x) if isinstance(x, list) else None for x in arguments]


def _unflattened(leaves: list, sizes: list) -> list:
    rest = iter(leaves)
    return [next(rest) if size is None else [next(rest) for _ in range(size)] for size in sizes]
