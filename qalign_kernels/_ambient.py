"""What surrounds a call stays outside: the result of an op depends on its arguments alone.

Autocast is off inside every op, forward and backward. Torch's matmul precision is obeyed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def public(op: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Make `op` a public op: what the caller has switched on around it does not reach inside."""

    @functools.wraps(op)
    def call(*arguments: Parameters.args, **settings: Parameters.kwargs) -> Result:
        first = arguments[0] if arguments else next(iter(settings.values()), None)
        device = first.device.type if isinstance(first, Tensor) else "cpu"
        if not torch.is_autocast_enabled(device):
            return op(*arguments, **settings)
        dtypes = {x.dtype for x in _tensors((arguments, settings)) if x.dtype.is_floating_point}
        if len(dtypes) > 1:  # as after a float32 norm of queries and keys: SDPA casts, too
            cast = functools.partial(_cast, dtype=torch.get_autocast_dtype(device))
            arguments, settings = _mapped(cast, arguments), _mapped(cast, settings)
        with torch.autocast(device, enabled=False):
            return op(*arguments, **settings)

    return call


def without_autocast(implementation: Callable) -> Callable:
    """The same implementation of a registered op, also where `backward` runs inside autocast."""

    @functools.wraps(implementation)
    def run(*arguments: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return implementation(*arguments)
        with torch._C._DisableAutocast():
            return implementation(*arguments)

    return run


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.dtype.is_floating_point else tensor


def _tensors(tree: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []
    _mapped(found.append, tree)
    return iter(found)


def _mapped(function: Callable, tree: Any) -> Any:
    """`tree` with `function` applied to each tensor in its tuples, lists, dicts and dataclasses."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(_mapped(function, x) for x in tree)
    if isinstance(tree, dict):
        return {name: _mapped(function, x) for name, x in tree.items()}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
        return dataclasses.replace(tree, **_mapped(function, fields))
    return tree
