"""Repeat the launches of an earlier call of the same kind.

Tiles, strides and signatures are then not computed again.

The launches of a call depend on its settings and on the shapes, strides, dtypes and alignment of its tensors,
never on their values. Calls that agree in all of these are of one kind.

1. The first call of a kind runs as usual.
2. The second call is watched: what it allocates, what it launches, and which tensor each pointer belongs to.
3. From the third call on, the outputs are allocated, all intermediates share one allocation, and the compiled
   kernels run with the known arguments.

A call that does anything else, for example computes with torch, is never replayed.

Replay uses Triton's own launch of a compiled kernel, `kernel.run`. Its arguments are the same in the versions
of REPLAYED. Other versions, hooks, recording, the interpreter and AMD GPUs take the ordinary path.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import driver

from . import _configs, _launch

REPLAYED = ("3.6", "3.7", "3.8")
KEPT = 1024  # kinds of call; the least recently used one is dropped first
ALIGNMENT = 16  # in bytes: Triton compiles another kernel for pointers that are multiples of it
SPACING = 256  # of intermediates in their allocation, in bytes
_SCALARS = frozenset({int, float, bool, str, type(None), torch.dtype})
_SEQUENCES: tuple[type, ...] = (tuple, list, type({}.values()))
_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_strided.default,
}
_VIEWS = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}

_off = False


class Buffer(NamedTuple):
    """A tensor to allocate."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Arguments(NamedTuple):
    """The arguments of a kernel. A slot (place, what) puts a numbered pointer, or a tuple, into `values`."""

    values: list[Any]
    slots: tuple[tuple[int, Any], ...]

    def filled(self, pointers: list[int]) -> tuple[Any, ...]:
        values = self.values.copy()
        for place, what in self.slots:
            values[place] = pointers[what] if type(what) is int else what.filled(pointers)
        return tuple(values)


class Address(NamedTuple):
    """A tensor as tensor maps see it: its first address."""

    pointer: int

    def data_ptr(self) -> int:
        return self.pointer


class Map(NamedTuple):
    """A Gluon descriptor, which Triton's launch turns into a tensor map. Its tensor is a numbered pointer."""

    descriptor: Any
    number: int

    def filled(self, pointers: list[int]) -> Any:
        moved = object.__new__(type(self.descriptor))  # its checks have passed
        vars(moved).update(vars(self.descriptor), base=Address(pointers[self.number]))
        return moved


class Step(NamedTuple):
    """A launch of a compiled kernel."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: Arguments


class Launched(NamedTuple):
    """A launch as the watched call did it."""

    kernel: Any
    grid: Any  # one to three numbers
    arguments: dict[str, Any]
    compiled: Any


class Watched(NamedTuple):
    """The result of a watched call, and how the call is replayed, or None."""

    result: Any
    plan: "Plan | None"


class Plan(NamedTuple):
    """A call as it is replayed. Pointers are numbered: tensors of the call, outputs, intermediates."""

    outputs: tuple[Buffer, ...]
    offsets: tuple[int, ...]  # of intermediates in their allocation
    size: int  # in bytes, of that allocation
    steps: tuple[Step, ...]
    result: Any  # the number of an output, None, or a tuple or list of such


class _Kind:
    """One kind of call: whether it was seen, its plan, and whether it cannot be replayed."""

    def __init__(self) -> None:
        self.seen = False
        self.plan: Plan | None = None
        self.unfit = False


@functools.cache
def replayed(module: ModuleType) -> "_Replayed":
    """The functions of a module of launchers, each replayed if possible."""
    return _Replayed(module)


class _Replayed:
    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return functools.partial(call, getattr(self._module, name))


def call(function: Callable, *arguments: Any, **settings: Any) -> Any:
    """`function(*arguments, **settings)`, replayed if possible."""
    key: list[Any] = []
    tensors: list[Tensor] = []
    usable = _possible() and not _off and _launch.plain() and not _hooked()
    if not (usable and _describe((arguments, settings.values()), tensors, key) and tensors):
        return function(*arguments, **settings)
    pointers = [tensor.data_ptr() for tensor in tensors]
    index = tensors[0].get_device()
    key += [function, index, _configs.generation(), knobs.runtime.debug, *settings]
    key += map(pointers.index, pointers)  # which of them are the same
    key += [pointer % ALIGNMENT for pointer in pointers]
    kind = _kind(tuple(key))
    if kind.plan is not None:
        return _replay(kind.plan, tensors[0].device, index, pointers)
    if kind.unfit or not kind.seen:
        kind.seen = True
        return function(*arguments, **settings)
    result, kind.plan = _watched(function, arguments, settings, tensors[0].device, pointers)
    kind.unfit = kind.plan is None
    return result


@contextlib.contextmanager
def ordinary() -> Iterator[None]:
    """Inside, every call of the process takes Triton's own launch, as a comparison."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


@functools.lru_cache(maxsize=KEPT)
def _kind(key: tuple[Any, ...]) -> _Kind:
    return _Kind()


@functools.cache
def _possible() -> bool:
    """Whether the launches of this Triton and this GPU are known."""
    return _configs.triton_minor() in REPLAYED and not torch.version.hip and not knobs.runtime.interpret


def _hooked() -> bool:
    """Whether hooks of Triton watch launches or change compilation."""
    runtime = knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return bool(
        any(hook is not None and getattr(hook, "calls", True) for hook in hooks)
        or getattr(runtime, "add_stages_inspection_hook", None)
        or getattr(knobs.compilation, "instrumentation_mode", "")
    )


def _describe(values: Any, tensors: list[Tensor], key: list[Any]) -> bool:
    """Collect tensors, and in the key all that decides the launches; False for an unknown type of value."""
    for value in values:
        kind = type(value)
        if kind in _SCALARS:
            key += (kind, value)
        elif kind is Tensor or kind is torch.nn.Parameter:
            tensors.append(value)
            key += (value.dtype, value.shape, value.stride())
        else:
            if dataclasses.is_dataclass(value):
                value = vars(value).values()
            elif not isinstance(value, _SEQUENCES):
                return False
            key += (kind, len(value))
            if not _describe(value, tensors, key):
                return False
    return True


def _replay(plan: Plan, device: torch.device, index: int, pointers: list[int]) -> Any:
    outputs = [
        torch.empty_strided(shape, stride, dtype=dtype, device=device)
        for shape, stride, dtype in plan.outputs
    ]
    pointers += [output.data_ptr() for output in outputs]
    if plan.size:
        intermediates = torch.empty(plan.size, dtype=torch.uint8, device=device)
        start = intermediates.data_ptr()
        pointers += [start + offset for offset in plan.offsets]
    if index < 0 or index == driver.active.get_current_device():
        _run(plan.steps, driver.active.get_current_stream(index), pointers)
    else:
        with torch.cuda.device(index):
            _run(plan.steps, driver.active.get_current_stream(index), pointers)
    return _structure(plan.result, outputs.__getitem__)


def _run(steps: Sequence[Step], stream: int, pointers: list[int]) -> None:
    for compiled, grid, arguments in steps:
        values = arguments.filled(pointers)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


def _structure(result: Any, leaf: Callable[[Any], Any]) -> Any:
    """`result` with `leaf` applied to each leaf that is not None."""
    if result is None:
        return None
    if not isinstance(result, (tuple, list)):
        return leaf(result)
    parts = [_structure(part, leaf) for part in result]
    return result._make(parts) if hasattr(result, "_make") else type(result)(parts)


class _Watch(TorchDispatchMode):
    """Notes what a call allocates and launches."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.unfit = False
        self.allocated: list[Tensor] = []  # kept, so that no address comes twice
        self.launched: list[Launched] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in _ALLOCATIONS and result.device == self.device and result.numel():
            self.allocated.append(result)
        elif function not in _VIEWS:
            self.unfit = True
        return result


def _watched(
    function: Callable, arguments: Any, settings: dict[str, Any], device: torch.device, pointers: list[int]
) -> Watched:
    watch = _Watch(device)
    with _launch.watching(lambda *launched: watch.launched.append(Launched(*launched))), watch:
        result = function(*arguments, **settings)
    return Watched(result, None if watch.unfit else _plan(watch, result, pointers))


def _plan(watch: _Watch, result: Any, pointers: list[int]) -> Plan | None:
    allocated = {tensor.data_ptr(): tensor for tensor in watch.allocated}
    outputs: list[Tensor] = []
    fit = True

    def number(tensor: Any) -> int:
        nonlocal fit
        own = allocated.pop(tensor.data_ptr(), None) if isinstance(tensor, Tensor) else None
        fit &= own is not None and _buffer(own) == _buffer(tensor)
        outputs.append(tensor)
        return len(outputs) - 1

    if not watch.allocated or not watch.launched:
        return None
    numbered = _structure(result, number)
    if not fit:
        return None
    offsets, size = [], 0
    for tensor in allocated.values():
        offsets.append(size)
        size += -(-_bytes(tensor) // SPACING) * SPACING
    known: dict[int, int] = {}
    for place, pointer in enumerate([*pointers, *(x.data_ptr() for x in outputs), *allocated]):
        known.setdefault(pointer, place)
    try:
        steps = tuple(_step(launched, known) for launched in watch.launched)
    except KeyError:  # a pointer into a tensor, not to its first element
        return None
    return Plan(tuple(map(_buffer, outputs)), tuple(offsets), size, steps, numbered)


def _buffer(tensor: Tensor) -> Buffer:
    return Buffer(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _bytes(tensor: Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


def _step(launched: Launched, known: dict[int, int]) -> Step:
    kernel, grid, arguments, compiled = launched
    defaults = {name: parameter.default for name, parameter in kernel.signature.parameters.items()}
    values = [arguments.get(name, default) for name, default in defaults.items()]
    return Step(compiled, (*grid, 1, 1)[:3], _template(values, known))


def _template(values: Sequence[Any], known: dict[int, int]) -> Arguments:
    template = list(values)
    slots: list[tuple[int, Any]] = []
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            slots.append((place, known[value.data_ptr()]))
        elif type(value).__name__ == "TensorDescriptor":  # imported only where a kernel takes one
            slots.append((place, Map(value, known[value.base.data_ptr()])))
        elif isinstance(value, tuple):
            inner = _template(value, known)
            template[place] = tuple(inner.values)
            slots += [(place, inner)] if inner.slots else []
    return Arguments(template, tuple(slots))
