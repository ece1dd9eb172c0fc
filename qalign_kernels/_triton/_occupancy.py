"""How many programs of a launch a GPU runs at once, from the registers and shared memory of the kernel.

The tile alone does not tell. Programs with one tile take 98 or 184 registers a thread, depending on what else
they do, so that a multiprocessor holds one to four of them. Only the compiler knows which.
"""

from typing import Any, NamedTuple

import torch

from ._configs import SHARED_MEMORY_KIB, nearest_architecture
from ._launch import compiled, target_of

ASSUMED_PROGRAMS = 264  # if nothing is compiled: two on each multiprocessor of an H100
PARTS = 4  # of a multiprocessor, each with its own warps and registers


class Multiprocessor(NamedTuple):
    """The resources of one multiprocessor, in all of its parts together."""

    registers: int
    warps: int
    lanes: int  # of a warp
    granule: int  # a warp gets registers in multiples of this number
    reserved_kib: int  # of shared memory, for each program


_LARGE = Multiprocessor(registers=65536, warps=64, lanes=32, granule=256, reserved_kib=1)
_SMALL = _LARGE._replace(warps=48)
_CDNA = Multiprocessor(registers=131072, warps=32, lanes=64, granule=512, reserved_kib=0)
MULTIPROCESSORS = {
    "sm_80": _LARGE,
    "sm_86": _SMALL,
    "sm_89": _SMALL,
    "sm_90": _LARGE,
    "sm_100": _LARGE,
    "sm_120": _SMALL,
    "gfx942": _CDNA,
}


def programs_at_once(kernel: Any, *, num_warps: int, num_stages: int, **arguments: Any) -> int:
    """Count the programs of such a launch that the device runs at once. The kernel is compiled for it.

    Returns ASSUMED_PROGRAMS in the interpreter and inside `recording`, where nothing is compiled.
    """
    made = compiled(kernel, num_warps=num_warps, num_stages=num_stages, **arguments)
    if made is None:
        return ASSUMED_PROGRAMS
    device = next(x.device for x in arguments.values() if isinstance(x, torch.Tensor))
    each = programs_on_one(target_of(device), made.n_regs, made.metadata.shared, num_warps)
    return each * torch.cuda.get_device_properties(device).multi_processor_count


def programs_on_one(target: str, registers: int, shared_memory: int, num_warps: int) -> int:
    """Count the programs that one multiprocessor holds, at least 1.

    Args:
        target: The architecture ("sm_90", "gfx942"). An unknown one counts as the nearest known one.
        registers: Of a thread.
        shared_memory: Of a program, in bytes.
        num_warps: Of a program.
    """
    nearest = nearest_architecture(target)
    has = MULTIPROCESSORS[nearest]
    each_warp = -(-max(registers, 1) * has.lanes // has.granule) * has.granule
    warps = min(has.registers // PARTS // each_warp * PARTS, has.warps)
    kib = SHARED_MEMORY_KIB.get(target, SHARED_MEMORY_KIB[nearest]) + has.reserved_kib
    by_shared_memory = kib * 1024 // max(shared_memory + has.reserved_kib * 1024, 1)
    return max(1, min(warps // num_warps, by_shared_memory))
