"""Measure lanes per clock and multiprocessor of single instructions: is FMNMX half as fast as FFMA?

Every multiprocessor runs `WARPS` warps. Each lane holds `CHAINS` dependent chains. The loop contains the
instruction and its counter, nothing else. The clock rate is counted cycles over measured nanoseconds.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language import core
from triton.language.extra.cuda import globaltimer

from qalign_kernels.bench.measure import percentiles

LANES = 32
WARPS = 8
PROGRAMS_PER_MULTIPROCESSOR = 2
ELEMENTS_PER_LANE = 2
TENSORS = 4
CHAINS = TENSORS * ELEMENTS_PER_LANE
UNROLL = 16
BLOCK = LANES * WARPS * ELEMENTS_PER_LANE
MODES = {"FFMA": 0, "FMNMX": 1, "LOP3": 2, "MUFU.EX2": 3, "FMNMX and FFMA": 4}
FIRST_ITERATIONS = 2000


@core.extern
def cycles(_semantic=None):
    return core.inline_asm_elementwise(
        "mov.u64 $0, %clock64;", "=l", [], dtype=core.int64, is_pure=False, pack=1, _semantic=_semantic
    )


@triton.jit
def _majority(x, y, z):
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xE8;", "=r,r,r,r", [x, y, z], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def rate_kernel(
    values_ptr,
    result_ptr,
    clock_ptr,
    iterations,
    MODE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Run chains over four tensors of BLOCK elements. They feed each other, so the compiler can fold no step.

    clock_ptr: int64 [programs, 2].
    """
    offsets = tl.arange(0, BLOCK)
    a = tl.load(values_ptr + offsets)
    b = tl.load(values_ptr + BLOCK + offsets)
    c = tl.load(values_ptr + 2 * BLOCK + offsets)
    d = tl.load(values_ptr + 3 * BLOCK + offsets)
    if MODE == 2:
        a, b, c, d = (
            a.to(tl.int32, bitcast=True),
            b.to(tl.int32, bitcast=True),
            c.to(tl.int32, bitcast=True),
            d.to(tl.int32, bitcast=True),
        )
    first_cycle, first_nanosecond = cycles(), globaltimer()
    for _iteration in range(iterations):
        for _step in tl.static_range(UNROLL):
            if MODE == 0:
                a, b, c, d = tl.fma(a, b, c), tl.fma(b, c, d), tl.fma(c, d, a), tl.fma(d, a, b)
            elif MODE == 1:
                a = tl.maximum(a, b)
                b = tl.minimum(b, c)
                c = tl.maximum(c, d)
                d = tl.minimum(d, a)
            elif MODE == 2:
                a, b, c, d = _majority(a, b, c), _majority(b, c, d), _majority(c, d, a), _majority(d, a, b)
            elif MODE == 3:
                a, b, c, d = tl.exp2(a), tl.exp2(b), tl.exp2(c), tl.exp2(d)
            else:
                a, b, c, d = tl.maximum(a, d), tl.minimum(b, c), tl.fma(c, a, d), tl.fma(d, b, c)
    last_cycle, last_nanosecond = cycles(), globaltimer()
    program = tl.program_id(0)
    tl.store(clock_ptr + 2 * program, last_cycle - first_cycle)
    tl.store(clock_ptr + 2 * program + 1, last_nanosecond - first_nanosecond)
    if MODE == 2:
        tl.store(result_ptr + program * BLOCK + offsets, (a ^ b ^ c ^ d).to(tl.float32, bitcast=True))
    else:
        tl.store(result_ptr + program * BLOCK + offsets, a + b + c + d)


def measure(seconds: float) -> list[dict[str, Any]]:
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    programs = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
    values = torch.rand(TENSORS * BLOCK, device="cuda")
    result = torch.empty(programs * BLOCK, device="cuda")
    clocks = torch.zeros(programs, 2, dtype=torch.int64, device="cuda")

    def launch(mode: int, iterations: int) -> Any:
        return rate_kernel[(programs,)](
            values, result, clocks, iterations, MODE=mode, UNROLL=UNROLL, BLOCK=BLOCK, num_warps=WARPS
        )

    rows = []
    for name, mode in MODES.items():
        compiled = launch(mode, FIRST_ITERATIONS)
        launch(mode, FIRST_ITERATIONS)
        taken = clocks[:, 1].median().item() * 1e-9
        iterations = max(
            FIRST_ITERATIONS, round(FIRST_ITERATIONS * seconds / len(MODES) / 10 / max(taken, 1e-6))
        )
        rates, mhz = [], []
        for _ in range(5):
            launch(mode, iterations)
            cycle_counts, nanoseconds = clocks.double().unbind(1)
            rates.append(lanes_per_clock(iterations, cycle_counts.max().item()))
            mhz.append((cycle_counts / nanoseconds).median().item() * 1e3)
        p20, p50, p80 = percentiles(rates)
        figures = {"p20": p20, "p80": p80, "sm_mhz": percentiles(mhz)[1], "iterations": iterations}
        rows.append(
            {
                "name": f"{name} chain",
                "unit": "lanes per clock and SM",
                "value": p50,
                **figures,
                "in_loop": loop_contents(compiled),
            }
        )
    return rows


def lanes_per_clock(iterations: int, cycle_count: float) -> float:
    """Count lanes per cycle of one multiprocessor, from its instructions and its cycles."""
    instructions = iterations * UNROLL * CHAINS * WARPS * PROGRAMS_PER_MULTIPROCESSOR
    return instructions * LANES / cycle_count


def loop_contents(compiled: Any) -> dict[str, int] | None:
    """Count the instructions in the loop of the machine code, which proves that the chain was not folded."""
    from triton import knobs

    from ...static.machine_code import natural_loops, read_cubin

    try:
        code = read_cubin(compiled.asm["cubin"], knobs.nvidia.cuobjdump.path, 0)
    except Exception:  # there is no disassembler
        return None
    body = max(natural_loops(code.instructions), key=len, default=frozenset())
    names = [code.instructions[position].name.split(".")[0] for position in body]
    return {name: names.count(name) for name in sorted(set(names))}
