"""What stays outside compiled graphs, so that one graph serves all sizes and steps.

torch.compile would fix the number of tokens, because a grid is found by halving and labels are kept by their
size. It would fix a step on which draws depend. The ops here are opaque to it.
"""

import ast
import functools
import itertools
import random
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layers import token_grid

LIBRARY = torch.library.Library("qalign", "DEF")
_numbers = itertools.count(1)
_objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def enlist(value: Any) -> int:
    """Return a number by which a graph finds `value` in this process."""
    number = next(_numbers)
    _objects[number] = value
    return number


def outside_graphs(place: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a method opaque to torch.compile.

    The method is called with strings, numbers and then a device, and gives int32 [1, N]. N is its argument
    number `place`. Its object has a `number` from `enlist`.
    """

    def decorate(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(method)
        def call(self: Any, picture: str, *arguments: Any, **settings: str) -> Tensor:
            if not torch.compiler.is_compiling():
                return method(self, picture, *arguments, **settings)
            *sizes, device = arguments
            like = torch.empty(0, dtype=torch.int32, device=device)
            name, settings_ = method.__name__, (list(settings), list(settings.values()))
            return torch.ops.qalign.labels(like, self.number, name, picture, sizes, place - 1, *settings_)

        return call

    return decorate


def token_places(size: tuple[int, int], tokens: int, device: torch.device) -> tuple[Tensor, int | Tensor]:
    """Return row and column of each token, int64 [2, N], on the grid of `token_grid`, and its height.

    In a compiled graph the height is a tensor.
    """
    like = torch.empty(0, dtype=torch.int64, device=device)
    if torch.compiler.is_compiling():
        places = torch.ops.qalign.token_places(like, *size, tokens)
        return places, places[0, -1] + 1
    return _places(like, *size, tokens), token_grid(size, tokens)[0]


def _places(like: Tensor, height: int, width: int, tokens: int) -> Tensor:
    columns = token_grid((height, width), tokens)[1]
    token = torch.arange(tokens, device=like.device)
    return torch.stack([token // columns, token % columns])


def uniform(count: int, *key: int | str) -> Tensor:
    """Return pseudo-random float32 [count] in [0, 1) on the CPU, determined by `key` and `count`."""
    seed = random.Random(repr((*key, count))).getrandbits(62)
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def drawn(count: int, seed: int, position: Tensor, name: int | str) -> Tensor:
    """Return `uniform(count, seed, step, name)` with the step of a clock's `position`."""
    if torch.compiler.is_compiling():
        return torch.ops.qalign.drawn(position, count, seed, repr(name))
    return uniform(count, seed, int(position[0]), name)


def _labels(
    like: Tensor,
    number: int,
    method: str,
    picture: str,
    sizes: list[int],
    place: int,
    names: list[str],
    values: list[str],
) -> Tensor:
    regions = _objects.get(number)
    if regions is None:
        raise RuntimeError(
            "regions: expected the Regions that the graph was compiled with, in the same process, got none"
        )
    labels = getattr(regions, method)(picture, *sizes, like.device, **dict(zip(names, values)))
    return labels.clone()  # a graph may write into it


def _register(name: str, schema: str, implementation: Callable, fake: Callable) -> None:
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qalign::{name}", fake, lib=LIBRARY)


_register(
    "labels",
    "(Tensor like, SymInt number, str method, str picture, SymInt[] sizes, int place, str[] names, "
    "str[] values) -> Tensor",
    _labels,
    lambda like, number, method, picture, sizes, place, names, values: like.new_empty((1, sizes[place])),
)
_register(
    "drawn",
    "(Tensor position, SymInt count, SymInt seed, str name) -> Tensor",
    lambda position, count, seed, name: uniform(count, seed, int(position[0]), ast.literal_eval(name)),
    lambda position, count, seed, name: position.new_empty(count, dtype=torch.float32),
)
_register(
    "token_places",
    "(Tensor like, SymInt height, SymInt width, SymInt tokens) -> Tensor",
    _places,
    lambda like, height, width, tokens: like.new_empty((2, tokens)),
)
