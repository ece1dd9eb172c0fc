"""A stand-in for Gluon on the CPU, for kernels of several partitions: what they compute, and how they wait.

A partition is a thread. A matrix product is done no sooner than it is waited for, so that a buffer which is
given back too early shows; shared memory begins as NaN. A wait of more than SECONDS raises.
"""

import ast
import math
import threading
import types
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SECONDS = 20


class Barrier:
    """An mbarrier: its phase ends when all have arrived and all bytes have come."""

    def __init__(self):
        self.changed = threading.Condition()
        self.count = self.waiting = self.bytes = self.phase = 0

    def add(self, arrivals: int, expected: int) -> None:
        with self.changed:
            self.waiting -= arrivals
            self.bytes += expected
            assert self.waiting >= 0, "more arrived than the barrier was made for"
            if self.waiting == 0 and self.bytes == 0:
                self.phase, self.waiting = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase & 1 != int(parity), SECONDS), "waits for ever"


class Memory(NamedTuple):
    """A tensor in shared memory, or some barriers."""

    content: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.content),) if isinstance(self.content, list) else tuple(self.content.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.content.dtype

    def index(self, place) -> Any:
        return self.content[place] if isinstance(self.content, list) else Memory(self.content[place])

    def reshape(self, shape) -> "Memory":
        return Memory(self.content.view(*shape))

    def permute(self, order) -> "Memory":
        return Memory(self.content.permute(*order))

    def load(self, layout) -> Tensor:
        return self.content.clone()

    def store(self, value) -> None:
        self.content.copy_(value)


class Pointer(NamedTuple):
    """Elements of a tensor as kernels address them."""

    flat: Tensor
    offset: Any = 0

    def __add__(self, offset) -> "Pointer":
        return Pointer(self.flat, self.offset + offset)


class Descriptor:
    """A tensor that the bulk copy engine reads in blocks."""

    def __init__(self, base: Tensor, block: list[int]):
        self.base, self.dtype, self.layout = base, base.dtype, None
        self.block_type = types.SimpleNamespace(shape=block, nbytes=math.prod(block) * base.element_size())


class _Product:
    def __init__(self, a, b, accumulator, use_acc):
        self.operands, self.result = (a, b, accumulator if use_acc else 0), None

    def finish(self) -> None:
        a, b, accumulator = self.operands
        first, second = (x.content if isinstance(x, Memory) else x for x in (a, b))
        self.result = first.float() @ second.float() + accumulator


_own = threading.local()


def _product(a, b, accumulator, *, use_acc=True, is_async=False):
    _own.products = [*getattr(_own, "products", []), _Product(a, b, accumulator, use_acc)]
    return _own.products[-1]


def _wait(outstanding, values):
    while len(_own.products) > outstanding:
        _own.products[0].finish()
        _own.products = _own.products[1:]
    results = tuple(x.result if isinstance(x, _Product) else x for x in values)
    return results if len(results) > 1 else results[0]


def _copy(descriptor, place, barrier, memory):
    block, memory = descriptor.base, memory.content.zero_()
    for axis, (start, size) in enumerate(zip(map(int, place), descriptor.block_type.shape)):
        first, last = max(start, 0), min(start + size, block.shape[axis])
        block = block.narrow(axis, min(first, block.shape[axis]), max(last - first, 0))
    memory[tuple(slice(size) for size in block.shape)] = block
    barrier.add(0, -descriptor.block_type.nbytes)


def _allocate(dtype, shape, layout):
    if layout == "barriers":
        return Memory([Barrier() for _ in range(shape[0])])
    return Memory(torch.full(shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype))


def _begin(barrier, count):
    barrier.count = barrier.waiting = count


def _load(pointer, mask=None, other=0):
    place = torch.as_tensor(pointer.offset)
    present = torch.ones(place.shape, dtype=torch.bool) if mask is None else mask.expand(place.shape)
    assert bool((place[present] < pointer.flat.numel()).all()), "reads beyond the end"
    return torch.where(present, pointer.flat[torch.where(present, place, 0).long()], other)


def _store(pointer, value, mask):
    mask = mask.expand(value.shape)
    pointer.flat[pointer.offset[mask].long()] = value[mask].to(pointer.flat.dtype)


def _largest(x, axis):
    """The largest number, NaN only where there is no other."""
    return torch.where(
        x.isnan().all(axis), float("nan"), x.nan_to_num(-math.inf, math.inf, -math.inf).amax(axis)
    )


def _specialize(partitions, warps, registers):
    failures: list[BaseException] = []

    def run(function, arguments):
        try:
            function(*arguments)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=partition, daemon=True) for partition in partitions]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    if failures:
        raise failures[0]


def _nothing(*arguments, **settings):
    return None


class _Values(ast.NodeTransformer):
    """`x += y` makes a new value, as on the GPU."""

    def visit_AugAssign(self, node):  # noqa: N802
        name = ast.Name(node.target.id, ast.Load())
        return ast.Assign([node.target], ast.BinOp(name, node.op, node.value))


class Kernels:
    """The functions of a file of kernels, on the CPU."""

    def __init__(self, path: Path):
        self.program = torch.tensor(0)
        gl = types.SimpleNamespace(
            allocate_shared_memory=_allocate,
            arange=lambda start, end, layout: torch.arange(start, end),
            cdiv=lambda x, y: -(-x // y),
            constexpr=lambda x: x,
            convert_layout=lambda x, layout: x,
            exp2=torch.exp2,
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            load=_load,
            log2=torch.log2,
            max=lambda x, axis: _largest(x, axis) if x.is_floating_point() else x.amax(axis),
            maximum=lambda x, y: torch.fmax(torch.as_tensor(x), torch.as_tensor(y)),
            minimum=lambda x, y: torch.fmin(torch.as_tensor(x), torch.as_tensor(y)),
            min=lambda x, axis: -_largest(-x, axis),
            num_warps=lambda: 4,
            program_id=lambda axis: self.program,
            reshape=lambda x, shape: x.reshape(shape),
            static_range=range,
            store=_store,
            sum=lambda x, axis: x.sum(axis),
            to_tensor=torch.tensor,
            warp_specialize=_specialize,
            where=lambda condition, x, y: torch.where(condition, x, y),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            zeros_like=torch.zeros_like,
            **{name: getattr(torch, name) for name in ("float32", "int32", "int64")},
            **dict.fromkeys(
                (
                    "BlockedLayout",
                    "DotOperandLayout",
                    "NVMMADistributedLayout",
                    "SliceLayout",
                    "SwizzledSharedLayout",
                ),
                _nothing,
            ),
        )
        mbarrier = types.SimpleNamespace(
            MBarrierLayout=lambda: "barriers",
            arrive=lambda barrier, count: barrier.add(count, 0),
            expect=lambda barrier, size: barrier.add(1, size),
            init=_begin,
            wait=lambda barrier, parity: barrier.wait(parity),
        )
        self.names: dict[str, Any] = {
            "__name__": "qalign_kernels._triton.on_cpu",
            "__package__": "qalign_kernels._triton",
        }
        stand_ins = {
            "gl": gl,
            "gluon": types.SimpleNamespace(jit=lambda function: function),
            "mbarrier": mbarrier,
            "tl": types.SimpleNamespace(debug_barrier=_nothing),
            "tma": types.SimpleNamespace(async_copy_global_to_shared=_copy),
            "unpack_match": lambda match: (match, match),
            "warpgroup_mma": _product,
            "warpgroup_mma_wait": _wait,
        }
        body = _Values().visit(ast.parse(path.read_text(encoding="utf-8"))).body
        imports = [node for node in body if isinstance(node, ast.ImportFrom)]
        for nodes in (imports, [node for node in body if node not in imports]):
            module = ast.fix_missing_locations(ast.Module(nodes, []))
            exec(compile(module, str(path), "exec"), self.names)
            self.names.update(stand_ins)

    def launch(self, name: str, programs: int, **arguments: Any) -> None:
        """Run the programs of a kernel one after the other."""
        for program in range(programs):
            self.program = torch.tensor(program, dtype=torch.int32)
            self.names[name](**arguments)
