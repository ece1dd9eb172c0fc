"""The static gate: its reading of machine code, and that it passes what is good and fails what is not."""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import machine_code, static
from benchmarks.machine_code import Loop

ROOT = Path(__file__).parents[1]
ONE = ["--target", "sm_90", "--dtype", "bf16", "--head-dim", "64"]


@pytest.fixture(autouse=True)
def _triton():
    pytest.importorskip("triton")


def _static(*arguments: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, where kernels are not interpreted."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    command = [sys.executable, "-m", "benchmarks", "static", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**inherited, **paths}, capture_output=True, text=True)


def test_shipped_kernels_keep_their_budgets():
    done = _static("--quick")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " 0 budgets broken" in done.stdout


def test_every_case_is_driven():
    from benchmarks.cases import CASES

    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    stems = {name.split()[0] for name in names}
    assert stems == {
        "similarity_argmax", "similarity_topk", "match_counts", "compact", "rearrange_kv", "attention", "label_mass", "mean_attention_map",
        "topk_attention", "rearranged_attention", "attention_backward", "distillation_loss", "label_mass_backward",
    }  # fmt: skip


def test_good_kernel_passes(tmp_path):
    done = _static("--cases", "static_toys", "--op", "good", *ONE, "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["matrix"] == "HGMMA" and row["spill_bytes"] == 0 and row["registers"] > 0
    assert 2 < row["lane_instructions"] < 8


def test_bad_kernels_fail():
    done = _static("--cases", "static_toys", "--op", "spilling", "greedy", *ONE)
    assert done.returncode == 1
    complaints = done.stdout.splitlines()[-3:]
    assert ["toy_spilling" in line for line in complaints] == [False, True, True]
    assert "264 KiB of shared memory, a block has 227" in complaints[0]
    assert "spills " in complaints[1] and "multiplies matrices by HMMA, expected HGMMA" in complaints[2]


def test_budgets_are_held(tmp_path):
    budgets = json.loads(static.BUDGETS.read_text())
    budget = {"case": "toy_good", "target": "sm_90", "dtype": "bf16", "head_dim": 64}
    here = machine_code.minor_version(importlib.metadata.version("triton"))
    loose, tight = ({"limits": {here: limit}} for limit in (100.0, 1.0))
    elsewhere = {"limits": {"2.0": 1.0}}
    budgets["lane_instructions"] = [budget | loose, budget | tight, budget | loose | {"kernel": "renamed_*"}, budget | elsewhere]
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps(budgets))
    done = _static("--cases", "static_toys", "--op", "good", *ONE, "--budgets", str(file))
    assert done.returncode == 1
    assert " 2 budgets broken" in done.stdout
    assert "lane-instructions per score, at most 1.0 allowed for toy_good" in done.stdout
    assert "budget for toy_good on sm_90 matches no score loop" in done.stdout


def test_triton_without_budgets_is_named():
    budgets = json.loads(static.BUDGETS.read_text())
    assert static.unheld_version(budgets, "3.7.9") is None
    assert static.unheld_version(budgets, "4.0.0").startswith("Triton 4.0.0: expected a minor version that budgets.json names")


def test_pinned_triton_has_budgets_for_every_budgeted_case():
    """Budgets once held under a Triton that no release of torch brings."""
    budgets = json.loads(static.BUDGETS.read_text())
    (pinned,) = re.findall(r"^triton==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert budgets["pinned_triton"] == pinned
    assert all(pinned in budget["limits"] for budget in budgets["lane_instructions"])


def test_update_keeps_what_was_not_compiled_anew():
    def row(cases, head_dim, registers, target="sm_90"):
        return {"cases": cases, "kernel": "k", "target": target, "dtype": "bf16", "head_dim": head_dim, "registers": registers}

    before = [row(["a", "b"], 64, 1), row(["b"], 64, 2), row(["b"], 80, 3), row(["b"], 64, 4, "sm_80")]
    after = static.merged(before, [row(["b"], 64, 5)], {"b"}, {("sm_90", "bf16", 64)})
    assert [(r["cases"], r["head_dim"], r["registers"]) for r in after] == [(["a"], 64, 1), (["b"], 64, 4), (["b"], 64, 5), (["b"], 80, 3)]


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET: expected unset"):
        static.run(argparse.Namespace())


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                /* 0x00000a0000017a02 */
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R10, RZ ; /* 0x0 */
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;               /* 0x0 */
        /*0030*/               @P1 BRA 0x00b0 ;                          /* 0x0 */
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ; /* 0x0 */
        /*0050*/                   FMNMX R3, R4, R5, !PT ;               /* 0x0 */
        /*0060*/              @!P0 BRA 0x0040 ;                          /* 0x0 */
        /*0070*/                   FADD R3, R4, R5 ;                     /* 0x0 */
        /*0080*/              @!P2 BRA 0x0020 ;                          /* 0x0 */
        /*0090*/                   EXIT ;                                /* 0x0 */
        /*00a0*/                   NOP ;                                 /* 0x0 */
        /*00b0*/              @!P3 BRA 0x00b0 ;                          /* 0x0 */
        /*00c0*/                   BRA 0x0040 ;                          /* 0x0 */
"""


def test_hot_loop_is_the_innermost_one_that_multiplies_matrices():
    code = machine_code.MachineCode(8, 0, 0, 32, machine_code.parse_sass(SASS))
    assert code.hot_loop() == Loop(3, ["HMMA.16816.F32.BF16"])
    assert len(code.matrix()) == 2 and machine_code.matrix_family(code.matrix()) == "HMMA"
    assert sorted(map(len, machine_code.natural_loops(code.instructions))) == [1, 3, 9]


AMDGCN = """
.Lfunc_begin0:
\ts_load_dword s0, s[4:5], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[48:49], v[46:47], 0
\tv_max_f32_e32 v1, v1, v2
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
.Lfunc_end0:
    .private_segment_fixed_size: 16
    .sgpr_spill_count: 1
    .vgpr_count:     60
    .vgpr_spill_count: 2
"""


def test_amdgcn_is_read():
    code = machine_code.read_amdgcn(AMDGCN, 1024)
    assert (code.registers, code.spill_bytes, code.lanes) == (60, 16 + 4 * 2, 64)
    assert code.hot_loop() == Loop(3, ["v_mfma_f32_32x32x8_bf16"])


TTGIR = """
    %r:4 = scf.for %i = %c0_i32 to %tokens step %c{step}_i32 iter_args(%a = %b) -> (f32) : i32 {{
      %s = tt.dot %q, %k, %z : tensor<64x64xbf16, #ttg.dot_op<{{opIdx = 0}}>> * tensor<64x128xbf16, #other> -> tensor<64x128xf32, #mma>
      scf.yield %s : f32
    }} loc(#loc)
"""


@pytest.mark.parametrize(("step", "copies", "tiles"), [(128, 1, 1), (128, 2, 2), (256, 1, 2), (1, 1, 1)])
def test_unrolled_loops_count_all_their_tiles(step, copies, tiles):
    once = 64 * 64 * 128 // (16 * 8 * 16) // 4
    loop = Loop(500, ["HMMA.16816.F32.BF16"] * once * copies)
    assert static.tiles_per_pass(TTGIR.format(step=step), loop, block_n=128, num_warps=4) == tiles


@pytest.mark.parametrize("name", ["LDG.E.U16", "LDG.E.U16.CONSTANT", "LDG.E.CONSTANT.S8", "global_load_short_d16_hi", "buffer_load_ubyte"])
def test_narrow_loads_are_seen(name):
    assert machine_code.is_narrow_load(name)


@pytest.mark.parametrize("name", ["LDG.E", "LDG.E.64", "LDG.E.128", "LDGSTS.E.BYPASS.128", "LDS.U16", "global_load_dwordx4", "ds_read_u16"])
def test_wide_and_shared_loads_are_not_narrow(name):
    assert not machine_code.is_narrow_load(name)
