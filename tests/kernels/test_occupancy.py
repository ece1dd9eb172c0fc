"""Programs that a GPU runs at once, and the division of keys that follows, against the static gate."""

import json
from pathlib import Path

import pytest
import torch

from qalign_kernels._triton import _occupancy
from qalign_kernels._triton._configs import choose_tile, schedule_length, split_keys
from qalign_kernels._triton._occupancy import ASSUMED_PROGRAMS, programs_on_one
from tests.stubbed import run_over_stub

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
KERNEL = "_similarity_argmax_kernel"
# of a multiprocessor: registers, KiB of shared memory, warps; KiB that a program loses (vendors' tables)
LIMITS = {
    "sm_80": (65536, 164, 64, 1),
    "sm_86": (65536, 100, 48, 1),
    "sm_89": (65536, 100, 48, 1),
    "sm_90": (65536, 228, 64, 1),
    "sm_100": (65536, 228, 64, 1),
    "sm_120": (65536, 100, 48, 1),
    "gfx942": (131072, 64, 32, 0),
}
SHAPES = [(1, 8, 4096, 40), (2, 10, 4096, 64), (1, 24, 4096, 128)]
TRITON = "3.7"
MULTIPROCESSORS = 132


def _rows(target: str) -> list[dict]:
    files = RESULTS.glob(f"triton-*/{target}-*.json")
    return [row for file in sorted(files) for row in json.loads(file.read_text()) if row["kernel"] == KERNEL]


@pytest.mark.parametrize("target", LIMITS)
def test_programs_fit_as_the_next_one_does_not(target):
    registers, shared, warps, lost = LIMITS[target]
    lanes, granule = (64, 8) if target.startswith("gfx") else (32, 8)
    rows = _rows(target)
    assert rows
    for row in rows:
        found = programs_on_one(target, row["registers"], round(row["shared_kib"] * 1024), row["num_warps"])
        allocated = -(-row["registers"] // granule) * granule

        def room(programs: int, row=row, allocated=allocated) -> bool:
            a_quarter = programs * row["num_warps"] / 4  # of the warps, with a quarter of the registers
            return (
                a_quarter * allocated * lanes <= registers / 4
                and programs * row["num_warps"] <= warps
                and programs * (row["shared_kib"] + lost) <= shared
            )

        assert room(found) and not room(found + 1), row


@pytest.mark.parametrize(
    ("target", "registers", "shared_kib", "num_warps", "programs"),
    [
        ("sm_90", 184, 96, 8, 1),  # registers
        ("sm_90", 168, 193, 8, 1),  # shared memory: the joint argmax for Hopper
        ("sm_90", 98, 96, 8, 2),
        ("sm_90", 255, 40, 4, 2),
        ("sm_90", 168, 40, 4, 3),
        ("sm_90", 128, 80, 4, 2),  # shared memory, which 81 KiB three times exceed
        ("sm_86", 32, 0, 8, 6),  # warps
        ("sm_80", 32, 0, 8, 8),
        ("sm_103", 184, 96, 8, 1),  # without a row of its own
        ("gfx942", 120, 8, 4, 4),
        ("sm_90", 255, 227, 16, 1),
    ],
)
def test_what_is_scarcest_limits_the_programs(target, registers, shared_kib, num_warps, programs):
    assert programs_on_one(target, registers, shared_kib * 1024, num_warps) == programs


def _lengths(row: dict, shape: tuple[int, int, int, int]) -> tuple[int, int]:
    """How long the shape takes on 132 multiprocessors by the row's kernel: as split, and as for 264."""
    batch, heads, tokens, _ = shape
    block_m, block_n = map(int, row["tile"].split("x"))
    maps = batch * (1 if "JOINT" in row["flags"] else heads)
    programs, key_tiles = maps * -(-tokens // block_m), -(-tokens // block_n)
    each = programs_on_one(row["target"], row["registers"], round(row["shared_kib"] * 1024), row["num_warps"])
    at_once = each * MULTIPROCESSORS

    def length(assumed: int) -> int:
        splits, tiles = split_keys(programs, key_tiles, min(key_tiles, 64), assumed)
        return schedule_length(programs * splits, tiles, at_once)

    return length(at_once), length(ASSUMED_PROGRAMS)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_schedule_is_longer_than_assumed(shape):
    lengths = [_lengths(row, shape) for row in _rows("sm_90")]
    assert all(real <= assumed for real, assumed in lengths)
    assert any(real < assumed for real, assumed in lengths)


def test_nothing_compiled_assumes_two_programs(monkeypatch):
    monkeypatch.setattr(_occupancy, "compiled", lambda *arguments, **settings: None)
    assert _occupancy.programs_at_once(None, num_warps=8, num_stages=3, x=torch.empty(1)) == ASSUMED_PROGRAMS


@pytest.mark.slow
@pytest.mark.parametrize(("registers", "splits"), [(128, 8), (200, 4)])
def test_registers_of_the_kernel_decide_the_splits(registers, splits, tmp_path):
    tile = choose_tile("similarity", "joint", "sm_90", 40, torch.bfloat16, 4096)
    assert tile[:3] == (128, 128, 8)
    grids = run_over_stub(
        f"""
        from qalign_kernels import similarity_argmax
        stub.registers = {registers}
        x = torch.zeros(1, 8, 4096, 40, dtype=torch.bfloat16)
        result = []
        for _ in range(3):  # the third is replayed
            with stub.recording() as calls:
                similarity_argmax(x, x, heads="joint", backend="triton")
            result.append([call.grid[0] for call in calls])
        """,
        tmp_path,
    )
    assert [grid[-2] for grid in grids] == [32 * splits] * 3
