"""The static gate: it reads machine code, passes good kernels and fails bad ones."""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.static import budgets as limits
from benchmarks.static import command, compilation, machine_code
from benchmarks.static.machine_code import Loop
from benchmarks.static.row import Row, merged

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


@pytest.mark.slow
def test_shipped_kernels_keep_their_budgets():
    done = _static("--quick")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " 0 budgets broken" in done.stdout


def test_every_case_is_driven():
    from benchmarks.static.cases import CASES

    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    stems = {name.split()[0] for name in names}
    assert stems == {
        "similarity_argmax",
        "similarity_topk",
        "match_counts",
        "compact",
        "take_chosen",
        "rearrange_kv",
        "attention",
        "label_mass",
        "mean_attention_map",
        "topk_attention",
        "rearranged_attention",
        "attention_backward",
        "distillation_loss",
        "label_mass_backward",
        "unit_features",
    }


@pytest.mark.slow
def test_good_kernel_passes(tmp_path):
    done = _static("--cases", "static_toys", "--op", "good", *ONE, "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (
        row["matrix"] == "HGMMA"
        and row["spill_bytes"] == 0
        and row["registers"] > 0
        and row["undefined"] == row["stray_descriptors"] == []
    )
    assert 2 < row["lane_instructions"] < 8


@pytest.mark.slow
def test_bad_kernels_fail():
    done = _static("--cases", "static_toys", "--op", "spilling", "greedy", *ONE)
    assert done.returncode == 1
    complaints = done.stdout.splitlines()[-3:]
    assert ["toy_spilling" in line for line in complaints] == [False, True, True]
    assert "264 KiB of shared memory, a block has 227" in complaints[0]
    assert "spills " in complaints[1] and "multiplies matrices by HMMA, expected HGMMA" in complaints[2]


def test_spills_that_a_gpu_prefers_are_allowed():
    budgets = json.loads(limits.BUDGETS.read_text())
    budgets["measured_spills"] = [
        {"case": "a", "target": "sm_90", "head_dim": 64, "bytes": 24, "evidence": "us"}
    ]
    row = Row(["a b"], "k", "sm_90", "bf16", 64, {}, 4, 3)
    others = [
        Row(["b a"], "k", "sm_90", "bf16", 64, {}, 4, 3),
        Row(["a b"], "k", "sm_90", "bf16", 80, {}, 4, 3),
        Row(["a b"], "k", "sm_100", "bf16", 64, {}, 4, 3),
    ]
    assert limits.most_spills(row, budgets) == 24
    assert all(limits.most_spills(other, budgets) == budgets["spill_bytes"] == 0 for other in others)
    row.spill_bytes = 25
    limits.hold_limits(row, budgets)
    assert row.problems == ["spills 25 bytes, at most 24 allowed"]


@pytest.mark.slow
def test_budgets_are_held(tmp_path):
    budgets = json.loads(limits.BUDGETS.read_text())
    budget = {"case": "toy_good", "target": "sm_90", "dtype": "bf16", "head_dim": 64}
    here = machine_code.minor_version(importlib.metadata.version("triton"))
    loose, tight = ({"limits": {here: limit}} for limit in (100.0, 1.0))
    elsewhere = {"limits": {"2.0": 1.0}}
    budgets["lane_instructions"] = [
        budget | loose,
        budget | tight,
        budget | loose | {"kernel": "renamed_*"},
        budget | elsewhere,
    ]
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps(budgets))
    done = _static("--cases", "static_toys", "--op", "good", *ONE, "--budgets", str(file))
    assert done.returncode == 1
    assert " 2 budgets broken" in done.stdout
    assert "lane-instructions per score, at most 1.0 allowed for toy_good" in done.stdout
    assert "budget for toy_good on sm_90 matches no score loop" in done.stdout


def test_triton_without_budgets_is_named():
    budgets = json.loads(limits.BUDGETS.read_text())
    assert limits.unheld_version(budgets, "3.7.9") is None
    assert limits.unheld_version(budgets, "4.0.0").startswith(
        "Triton 4.0.0: expected a minor version that budgets.json names"
    )


def test_pinned_triton_has_budgets_for_every_budgeted_case():
    """Budgets once held under a Triton that no release of torch brings."""
    budgets = json.loads(limits.BUDGETS.read_text())
    (pinned,) = re.findall(r"^triton==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert budgets["pinned_triton"] == pinned
    assert all(pinned in budget["limits"] for budget in budgets["lane_instructions"])


def test_update_keeps_what_was_not_compiled_anew():
    def row(cases, head_dim, registers, target="sm_90"):
        return {
            "cases": cases,
            "kernel": "k",
            "target": target,
            "dtype": "bf16",
            "head_dim": head_dim,
            "registers": registers,
        }

    before = [row(["a", "b"], 64, 1), row(["b"], 64, 2), row(["b"], 80, 3), row(["b"], 64, 4, "sm_80")]
    after = merged(before, [row(["b"], 64, 5)], {"b"}, {("sm_90", "bf16", 64)})
    assert [(r["cases"], r["head_dim"], r["registers"]) for r in after] == [
        (["a"], 64, 1),
        (["b"], 64, 4),
        (["b"], 64, 5),
        (["b"], 80, 3),
    ]


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET: expected unset"):
        command.run(argparse.Namespace())


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


def test_hot_loop_is_innermost_with_matrix_products():
    code = machine_code.MachineCode(8, 0, 0, 32, machine_code.parse_sass(SASS))
    assert code.hot_loop() == Loop(3, ["HMMA.16816.F32.BF16"])
    assert len(code.matrix()) == 2 and machine_code.matrix_family(code.matrix()) == "HMMA"
    assert sorted(map(len, machine_code.natural_loops(code.instructions))) == [1, 3, 9]


def _code(*lines: str) -> machine_code.MachineCode:
    """The machine code of `lines`, 16 bytes each."""
    text = "\n".join(
        f"        /*{16 * position:04x}*/  {line} ;  /* 0x0 */" for position, line in enumerate(lines)
    )
    return machine_code.MachineCode(8, 0, 0, 32, machine_code.parse_sass(text))


@pytest.mark.parametrize(
    ("before", "undefined"), [("NOP", ["UR26", "UR27"]), ("ULDC.64 UR26, c[0x0][0x210]", [])]
)
def test_undefined_descriptor_breaks_the_gate(before, undefined):
    """ptxas 12.8 computed descriptors of attention at d = 40 from unwritten registers: wrong on an H200."""
    code = _code(
        "ULDC.64 UR24, c[0x0][0x208]",
        before,
        "LDGSTS.E.BYPASS.128 [R181+0xd000], desc[UR24][R226.64+0x40], P3",
        "UIADD3 UR26, UP0, UR26, 0x20, URZ",
        "UIADD3.X UR27, UR27, -0x3ffffff0, URZ, UP0, !UPT",
        "EXIT",
    )
    row = Row(["attention"], "attention_kernel", "sm_90", "bf16", 40, {}, 4, 3)
    compilation.record_resources(row, code)
    limits.hold_limits(row, json.loads(limits.BUDGETS.read_text()))
    assert code.undefined() == row.undefined == undefined
    assert row.problems == ["reads uniform registers before anything writes them: UR26 UR27"] * bool(
        undefined
    )


@pytest.mark.parametrize(("source", "right"), [("UR16", 0), ("UR19", 0), ("UR18", 1), ("UR8", 1), ("URZ", 1)])
def test_descriptors_of_other_values_are_stray(source, right):
    """ptxas 12.8 also took a register that holds something else, here the number of queries."""
    lines = [
        "ULDC UR16, c[0x0][0x2c4]",
        "UMOV UR18, URZ",
        "R2UR UR8, R3",
        "USGXT.U32 UR6, UR16, 0xe",
        "UIADD3 UR6, UP0, UR6, 0x20, URZ",
        f"UIADD3.X UR7, {source}, -0x3ffffff0, URZ, UP0, !UPT",
        "UIADD3.64 UR6, UR6, 0x20, URZ",
        "HGMMA.64x32x16.F32 R24, R28, gdesc[UR4].tnspB, R24",
        "EXIT",
    ]
    code = _code(*lines)
    assert code.stray_descriptors() == ([] if right else ["UR7"])
    row = Row(["attention"], "attention_kernel", "sm_90", "fp16", 80, {}, 4, 3)
    compilation.record_resources(row, code)
    row.undefined = []
    limits.hold_limits(row, json.loads(limits.BUDGETS.read_text()))
    problem = "multiplies matrices at descriptors whose upper words are no constants: UR7"
    assert row.problems == ([] if right else [problem])


@pytest.mark.parametrize(("predicate", "stray"), [("", []), ("@UP0 ", ["UR5"])])
def test_both_descriptors_are_constant_on_every_path(predicate, stray):
    code = _code(
        "ULDC.64 UR4, c[0x0][0x210]",
        f"{predicate}UMOV UR5, 0x40000040",
        "UMOV UR7, UR5",
        "UMOV UR7, 0x40000040",
        "HGMMA.64x128x16.F32 R24, gdesc[UR4], RZ, !UPT",
        "EXIT",
    )
    assert code.stray_descriptors() == stray


LOOP = ["UIADD3 UR4, UR4, 0x1, URZ", "UISETP.GE.AND UP0, UPT, UR4, UR5, UPT", "@!P0 BRA 0x10", "EXIT"]


def test_registers_carried_by_loops_are_defined_before():
    assert _code("LDCU.64 UR4, c[0x0][0x3a8]", *LOOP).undefined() == []
    assert _code("LDCU UR5, c[0x0][0x3a8]", *LOOP).undefined() == ["UR4"]


def test_definitions_follow_the_flow_not_the_text():
    """Code for rare cases is at the end and jumps back; a write in one branch does not define the other."""
    away = ["BRA 0x30", "STS [UR4], R0", "EXIT", "S2UR UR4, SR_CgaCtaId", "BRA 0x10"]
    assert _code(*away).undefined() == []
    for jump in ("@P1 BRA 0x20", "BRA.U !UP1, 0x20", "BRA P1, 0x20"):
        assert _code(jump, "UMOV UR4, 0x400", "STS [UR4], R0", "EXIT").undefined() == ["UR4"]
    assert _code("CALL.REL.NOINC 0x20", "EXIT", "STS [UR4], R0", "RET.REL.NODEC R2 0x0").undefined() == [
        "UR4"
    ]


def test_predicated_definitions_count():
    assert (
        _code("@UP0 UMOV UR4, 0x1", "@!UP0 UMOV UR4, 0x2", "IMAD.U32 R4, RZ, RZ, UR4", "EXIT").undefined()
        == []
    )


@pytest.mark.parametrize(
    ("instruction", "reads", "writes"),
    [
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR36], RZ, !UPT", {36, 37, 38, 39}, set()),
        ("HGMMA.64x32x16.F32.BF16 R88, R116, gdesc[UR28].tnspB, R88, gsb0", {30, 31}, set()),
        (
            "UTCHMMA tmem[UR25], gdesc[UR68], tmem[UR16], tmem[UR38], idesc[UR39], UPT",
            {16, 25, 38, 39, 68, 69},
            set(),
        ),
        ("LDG.E.128 R28, desc[UR24][R20.64]", {24, 25}, set()),
        ("LDS.128 R4, [R63+UR23+0x2000]", {23}, set()),
        ("LDCU.128 UR12, c[0x0][0x380]", set(), {12, 13, 14, 15}),
        ("R2UR UR5, R0", set(), {5}),
        ("R2UR P6, UR5, R0", set(), {5}),
        ("CREDUX.MIN.S32 UR4, R56", set(), {4}),
        ("VOTEU.ANY UR4, UPT, PT", set(), {4}),
        ("UIADD3.64 UR4, UPT, UPT, UR38, 0x40, URZ", {38, 39}, {4, 5}),
        ("UIADD3 UR4, -UR4, UR7, URZ", {4, 7}, {4}),
        ("UIMAD.WIDE.U32 UR4, UR69, 0xc0, UR40", {40, 41, 69}, {4, 5}),
        ("IMAD.WIDE R20, R9, UR20, R12", {20}, set()),
        ("UISETP.GE.AND.EX UP0, UPT, UR7, UR73, UPT, UP0", {7, 73}, set()),
        ("SYNCS.EXCH.64 URZ, [UR23+0xf800], UR4", {4, 5, 23}, set()),
        ("UTCATOMSWS.FIND_AND_SET.ALIGN UP0, UR6, UR5", {5}, {6}),
        ("BRA.DIV UR8, 0x10", {8}, set()),
        ("UP2UR UR4, UPR, URZ, 0x40", set(), {4}),
    ],
)
def test_uniform_registers_of_instructions(instruction, reads, writes):
    (parsed,) = _code(instruction).instructions
    assert machine_code.uniform_registers(parsed) == (reads, writes)


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
    assert code.undefined() == code.stray_descriptors() == []


TTGIR = """
    %r:4 = scf.for %i = %c0_i32 to %tokens step %c{step}_i32 iter_args(%a = %b) -> (f32) : i32 {{
      %s = tt.dot %q, %k, %z : {operands} -> tensor<64x128xf32, #mma>
      scf.yield %s : f32
    }} loc(#loc)
"""
OPERANDS = "tensor<64x64xbf16, #ttg.dot_op<{opIdx = 0}>> * tensor<64x128xbf16, #other>"


@pytest.mark.parametrize(("step", "copies", "tiles"), [(128, 1, 1), (128, 2, 2), (256, 1, 2), (1, 1, 1)])
def test_unrolled_loops_count_all_their_tiles(step, copies, tiles):
    once = 64 * 64 * 128 // (16 * 8 * 16) // 4
    loop = Loop(500, ["HMMA.16816.F32.BF16"] * once * copies)
    assert (
        compilation.tiles_per_pass(TTGIR.format(step=step, operands=OPERANDS), loop, block_n=128, num_warps=4)
        == tiles
    )


@pytest.mark.parametrize(
    "name",
    ["LDG.E.U16", "LDG.E.U16.CONSTANT", "LDG.E.CONSTANT.S8", "global_load_short_d16_hi", "buffer_load_ubyte"],
)
def test_narrow_loads_are_seen(name):
    assert machine_code.is_narrow_load(name)


@pytest.mark.parametrize(
    "name",
    [
        "LDG.E",
        "LDG.E.64",
        "LDG.E.128",
        "LDGSTS.E.BYPASS.128",
        "LDS.U16",
        "global_load_dwordx4",
        "ds_read_u16",
    ],
)
def test_wide_and_shared_loads_are_not_narrow(name):
    assert not machine_code.is_narrow_load(name)
