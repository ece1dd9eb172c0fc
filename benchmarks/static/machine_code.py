"""Read the machine code of a kernel: registers, spills, matrix instructions, the hot loop."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qalign_kernels._triton._configs import triton_minor

minor_version = triton_minor  # each minor version makes other machine code
_SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_AMD_LABEL = re.compile(r"^(\.L\w+|\w+):")
_AMD_LINE = re.compile(r"^\s+([a-z]\w+)\s*(.*)")
_PREDICATE = re.compile(r"!?U?P[\dT]")
_WRITES_UNIFORM = re.compile(r"(U(?!\w*SETP)|R2UR|S2UR|CS2UR|LDCU|VOTEU|C?REDUX|ELECT|SYNCS)")
_UNIFORM = re.compile(r"(?:(\w+)\[)?\bUR(\d+)")
_DIGITS = re.compile(r"(\d+)x(\d+)x(\d+)")
_HMMA_SHAPE = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}


class Instruction(NamedTuple):
    """One instruction: its position, its name, and where it may go next.

    On NVIDIA it also has its operands as printed, and whether a predicate guards it.
    """

    position: int
    name: str
    jump: int | None
    falls_through: bool
    operands: str = ""
    predicated: bool = False


class Loop(NamedTuple):
    """A natural loop: the number of its instructions, and its matrix instructions."""

    instructions: int
    matrix: list[str]


_Change = Callable[[Instruction, set[int]], set[int]]


@dataclass(frozen=True)
class MachineCode:
    """The resources and instructions of one kernel; `lanes` is the width of a warp."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    lanes: int
    instructions: list[Instruction]

    def matrix(self) -> list[str]:
        return [x.name for x in self.instructions if is_matrix(x.name)]

    def narrow_loads(self) -> int:
        return sum(is_narrow_load(x.name) for x in self.instructions)

    def undefined(self) -> list[str]:
        """List uniform registers that are read before an instruction has written them; none on AMD."""
        return [f"UR{register}" for register in sorted(unwritten_reads(self.instructions))]

    def stray_descriptors(self) -> list[str]:
        """List uniform registers that give a wgmma a variable upper word of a descriptor."""
        return [f"UR{register}" for register in sorted(variable_layouts(self.instructions))]

    def hot_loop(self) -> Loop | None:
        """Find the innermost loop with the most matrix instructions.

        Of equal loops the shortest is taken: it is the one without a mask for the tail.
        """
        loops = [
            body
            for body in natural_loops(self.instructions)
            if any(is_matrix(self.instructions[i].name) for i in body)
        ]
        innermost = [body for body in loops if not any(other < body for other in loops)]
        if not innermost:
            return None
        candidates = [
            Loop(len(body), [name for i in sorted(body) if is_matrix(name := self.instructions[i].name)])
            for body in innermost
        ]
        return min(candidates, key=lambda loop: (-len(loop.matrix), loop.instructions))


def is_narrow_load(name: str) -> bool:
    """Whether an instruction loads a single 8- or 16-bit number from global memory.

    Loads of half-precision rows become narrow where the compiler does not know that they are aligned.
    """
    return (
        re.match(r"LDG\.E(\.\w+)*\.[US](8|16)\b|(global|buffer|flat)_load_[us]?(short|byte)", name)
        is not None
    )


def is_matrix(name: str) -> bool:
    """Whether an instruction multiplies matrices. Instructions of tcgen05 that move or signal do not."""
    return "HGMMA" in name or re.match(r"UTC\w*MMA", name) is not None or "HMMA" in name or "mfma" in name


def matrix_family(names: Iterable[str]) -> str:
    """Name the family of the matrix instructions: HGMMA, UTCHMMA, HMMA, MFMA, or "-"."""
    families = {re.match(r"HGMMA|UTC\w*MMA|HMMA|v_s?mfma", name) for name in names}
    found = sorted({"MFMA" if "mfma" in match.group() else match.group() for match in families if match})
    return "+".join(found) or "-"


def multiply_adds(name: str, num_warps: int) -> int | None:
    """Count the multiply-adds of `num_warps` warps that issue this matrix instruction once each.

    None where the name of the instruction does not give its shape.
    """
    if name.startswith("HMMA"):
        shape = next((part for part in name.split(".") if part in _HMMA_SHAPE), None)
        return _HMMA_SHAPE[shape] * num_warps if shape else None
    if (match := _DIGITS.search(name)) is None:
        return None
    m, n, k = map(int, match.groups())
    return m * n * k * num_warps // (4 if "HGMMA" in name else 1)


def read_cubin(cubin: bytes, cuobjdump: str, shared_bytes: int) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = subprocess.run(
            [cuobjdump, "-sass", "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    instructions = parse_sass(text)
    traffic = 4 * sum(x.name.split(".")[0] in ("LDL", "STL") for x in instructions)
    spills = int(usage["STACK"]) + int(usage["LOCAL"])
    return MachineCode(int(usage["REG"]), spills or traffic, shared_bytes, 32, instructions)


def parse_sass(text: str) -> list[Instruction]:
    rows = [match.groups() for line in text.splitlines() if (match := _SASS_LINE.match(line))]
    where = {int(address, 16): position for position, (address, *_) in enumerate(rows)}
    result = []
    for position, (_, predicate, name, operands) in enumerate(rows):
        stem = name.split(".")[0]
        target = re.search(r"0x([0-9a-f]+)\s*$", operands.strip()) if stem in ("BRA", "CALL") else None
        conditional = predicate is not None or "," in operands
        ends = stem in ("EXIT", "RET", "BRX", "BRA") and not conditional
        jump = where.get(int(target.group(1), 16)) if target else None
        result.append(Instruction(position, name, jump, not ends, operands.strip(), predicate is not None))
    return result


def uniform_registers(instruction: Instruction) -> tuple[set[int], set[int]]:
    """List the numbers of the uniform registers that an NVIDIA instruction reads, and those that it writes.

    All registers of a pair or of a wider group count. An HGMMA takes two descriptors from four registers; it
    takes only the upper two where its first matrix is in vector registers. Any other descriptor has two
    registers.
    """
    name, parts = instruction.name, instruction.name.split(".")
    operands = [text.strip() for text in instruction.operands.split(",")]
    operands = [text for text in operands if not _PREDICATE.fullmatch(text)]
    reads: set[int] = set()
    writes: set[int] = set()
    for place, operand in enumerate(operands):
        for holder, number in _UNIFORM.findall(operand):
            first, width = int(number), 1
            if holder == "gdesc" and "GMMA" in parts[0] and place == 2:
                first, width = first + 2, 2
            elif holder in ("gdesc", "desc"):
                width = 4 if "GMMA" in parts[0] else 2
            elif "[" not in operand and ("64" in parts or "WIDE" in parts and place in (0, 3)):
                width = 2
            elif "[" not in operand and "128" in parts:
                width = 4
            written = place == 0 and operand == f"UR{number}" and _WRITES_UNIFORM.match(name)
            (writes if written else reads).update(range(first, first + width))
    return reads, writes


def unwritten_reads(instructions: list[Instruction]) -> set[int]:
    """List the uniform registers that are read before they are written, on some path from the start.

    A predicated write counts as a write, and a call writes nothing.
    """
    registers = [uniform_registers(x) for x in instructions]
    first = set().union(*(reads for reads, _ in registers))
    unwritten = _on_some_path(instructions, first, lambda x, before: before - registers[x.position][1])
    return set().union(*(reads & before for (reads, _), before in zip(registers, unwritten, strict=True)))


def variable_layouts(instructions: list[Instruction]) -> set[int]:
    """The numbers of the uniform registers that hold the upper word of a wgmma descriptor but no constant.

    The upper word is the layout of a tile in shared memory, which the compiler knows: it comes from
    immediates, by way of vector registers or not, and from carries. A kernel argument or an address in it
    means that ptxas took a wrong register, and the lower word is wrong then too. A pair begins at an even
    register.
    """
    registers = [uniform_registers(x) for x in instructions]

    def after(x: Instruction, before: set[int]) -> set[int]:
        reads, writes = registers[x.position]
        if not writes:
            return before
        stem, *parts = x.name.split(".")
        variable = set(writes)
        if stem == "R2UR" or (stem.startswith("U") and "c[" not in x.operands):
            step = 2 if "64" in parts else 1  # of pairs, low words are added to low words and high to high
            variable = {to for to in writes if any((to - source) % step == 0 for source in reads & before)}
        return (before if x.predicated else before - writes) | variable

    every = set().union(*(reads | writes for reads, writes in registers))
    variable = _on_some_path(instructions, every, after)
    multiply = [x.position for x in instructions if "GMMA" in x.name]
    return {register for i in multiply for register in registers[i][0] & variable[i] if register % 2 == 1}


def _on_some_path(instructions: list[Instruction], first: set[int], after: _Change) -> list[set[int]]:
    """List the registers with a property before each instruction, on some path from the first one.

    Args:
        first: the registers that have it at the start.
        after: gives the registers that have it after an instruction, from those that have it before.
    """
    before: list[set[int]] = [set() for _ in instructions]
    before[0] = first
    changed = True
    while changed:
        changed = False
        for x in instructions:
            left = after(x, before[x.position])
            for target in (x.jump, x.position + 1 if x.falls_through else None):
                if target is not None and target < len(instructions) and not left <= before[target]:
                    before[target] |= left
                    changed = True
    return before


def read_amdgcn(text: str, shared_bytes: int) -> MachineCode:
    """Read the assembly of an AMD kernel.

    Registers are the vector registers of a lane, accumulators included. Spills are bytes of private memory
    and of spilled vector registers. A "spilled" scalar goes into a lane of a vector register: it costs
    counted instructions and no memory.
    """
    numbers = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    spills = numbers["private_segment_fixed_size"] + 4 * numbers["vgpr_spill_count"]
    return MachineCode(numbers["vgpr_count"], spills, shared_bytes, 64, parse_amdgcn(text))


def parse_amdgcn(text: str) -> list[Instruction]:
    body = text.split(".Lfunc_begin0:", 1)[-1].split(".Lfunc_end0:", 1)[0]
    rows: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        if label := _AMD_LABEL.match(line):
            labels[label.group(1)] = len(rows)
        elif (match := _AMD_LINE.match(line)) and not line.strip().startswith("."):
            rows.append((match.group(1), match.group(2)))
    result = []
    for position, (name, operands) in enumerate(rows):
        jump = labels.get(operands.split(";")[0].strip()) if "branch" in name else None
        result.append(Instruction(position, name, jump, name not in ("s_branch", "s_endpgm", "s_setpc_b64")))
    return result


def natural_loops(instructions: list[Instruction]) -> list[frozenset[int]]:
    """List the loops of the flow graph as sets of positions; loops with one header are merged."""
    after = {x.position + 1 for x in instructions if x.jump is not None or not x.falls_through}
    targets_of_jumps = {x.jump for x in instructions if x.jump is not None}
    starts = sorted(start for start in {0} | after | targets_of_jumps if start < len(instructions))
    block_of = {start: block for block, start in enumerate(starts)}
    ends = [*starts[1:], len(instructions)]
    successors: list[list[int]] = []
    for end in ends:
        last = instructions[end - 1]
        targets = [last.jump] if last.jump is not None else []
        targets += [end] if last.falls_through and end < len(instructions) else []
        successors.append([block_of[target] for target in targets])
    predecessors: list[list[int]] = [[] for _ in starts]
    for block, targets in enumerate(successors):
        for target in targets:
            predecessors[target].append(block)
    dominators = _dominators(successors, predecessors)

    bodies: dict[int, set[int]] = {}
    for block, targets in enumerate(successors):
        for header in targets:
            if dominators[block] >> header & 1:
                inside = [[x for x in row if dominators[x] >> header & 1] for row in predecessors]
                bodies.setdefault(header, {header}).update(_reaching(block, header, inside))
    return [
        frozenset(i for block in body for i in range(starts[block], ends[block])) for body in bodies.values()
    ]


def _dominators(successors: list[list[int]], predecessors: list[list[int]]) -> list[int]:
    """Give the dominators of each block as a bit set; 0 for an unreachable block."""
    everything = (1 << len(successors)) - 1
    reached, stack = {0}, [0]
    while stack:
        new = [target for target in successors[stack.pop()] if target not in reached]
        reached.update(new)
        stack.extend(new)
    result = [everything if block in reached else 0 for block in range(len(successors))]
    result[0], changed = 1, True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            common = everything
            for predecessor in predecessors[block]:
                if predecessor in reached:
                    common &= result[predecessor]
            if (common | 1 << block) != result[block]:
                result[block], changed = common | 1 << block, True
    return result


def _reaching(block: int, header: int, predecessors: list[list[int]]) -> set[int]:
    """List the blocks from which `block` is reached without passing `header`."""
    found, stack = {block}, [block]
    while stack:
        current = stack.pop()
        if current == header:
            continue
        new = [x for x in predecessors[current] if x not in found and x != header]
        found.update(new)
        stack.extend(new)
    return found
