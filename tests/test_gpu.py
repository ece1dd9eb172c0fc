"""The GPU run without a GPU: failing and hanging stages, dying workers, verdicts, plans, the report."""

import contextlib
import json
import os
import subprocess
import sys
import tarfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks import __main__ as benchmarks_main
from benchmarks.gpu import command, first_report, must_show, plan, report
from benchmarks.gpu.must_show import DEFAULT, EAGER, FASTEST, OURS, Bar, Line
from benchmarks.gpu.plan import Group
from benchmarks.gpu.running import arguments, forks, publishing
from benchmarks.gpu.running.journal import Journal
from benchmarks.gpu.running.sequence import Outcome, Stage
from benchmarks.gpu.stages import gluon_joint, measure, right, sanitizer, validation, worker
from benchmarks.gpu.stages.joint_calls import JOINT_CALLS
from benchmarks.gpu.stages.kernels import kernels, sdpa_implementation
from benchmarks.suite import providers, rows, shapes
from benchmarks.suite.rows import Row
from benchmarks.suite.shapes import Shape
from benchmarks.tune import candidates, trials
from benchmarks.tune.table import shipped_tile
from qalign_kernels import _backends
from qalign_kernels._triton import _configs
from qalign_kernels.bench import ops
from qalign_kernels.validation import command as validate

ROOT = Path(__file__).parents[1]
SMALL = Shape("small", 1, 2, 300, 40)
FAILS = "echo; echo 'ValueError: no such clock'; exit 1"
OVERRUNS = "echo '[]' > $1; exec sleep 600"
HANGS = "trap '' TERM; sleep 600 & echo $! > $1; wait"


def _stage(name: str, script: str, *words: object, seconds: float = 60, least_seconds: float = 3) -> Stage:
    """A stage whose process costs next to nothing; `words` are $1 and on, --seconds S comes behind them."""
    return Stage(name, ("sh", "-c", script, name, *map(str, words)), seconds, least_seconds)


def _alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.is_file() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.slow
def test_failing_or_hanging_stages_stop_nothing_else(tmp_path, capsys):
    pid_file = tmp_path / "pid"
    stages = [
        _stage("fails", FAILS, least_seconds=60),
        _stage("overruns", OVERRUNS, tmp_path / "must_show.json", seconds=3),
        _stage("hangs", HANGS, pid_file, seconds=3),
        _stage("never", FAILS, least_seconds=1000),
        _stage("good", ":", least_seconds=60),
    ]
    assert command.execute(stages, tmp_path, 120, report.text) == 1
    outcomes = {
        outcome["stage"]: outcome
        for outcome in json.loads((tmp_path / "stages.json").read_text())["outcomes"]
    }
    assert [outcome["status"] for outcome in outcomes.values()] == [
        "failed",
        "stopped",
        "stopped",
        "skipped",
        "ok",
    ]
    assert outcomes["fails"]["note"] == "exit code 1: ValueError: no such clock"
    assert "at least 1000" in outcomes["never"]["note"]
    assert not _alive(int(pid_file.read_text()))
    text = (tmp_path / "report.md").read_text()
    assert "| fails | failed |" in text and "| hangs | stopped |" in text and "| never | skipped |" in text
    assert f"{len(must_show.LINES)} not measured." in text
    assert "[5/5] good: ok" in capsys.readouterr().out


def test_run_of_good_stages_ends_with_zero(tmp_path):
    assert (
        command.execute(
            [_stage("good", "[ $1 = --seconds ] && [ $2 = 7.5 ]", seconds=7.5)], tmp_path, 120, report.text
        )
        == 0
    )
    assert "| good | ok |" in (tmp_path / "report.md").read_text()


def test_stage_is_shortened_for_those_behind_it(tmp_path):
    stages = [_stage("first", ":", seconds=500), _stage("second", ":", least_seconds=70)]
    assert command.execute(stages, tmp_path, 100, report.text) == 0
    first = json.loads((tmp_path / "stages.json").read_text())["outcomes"][0]
    granted = int(first["note"].removeprefix("shortened to ").split()[0])
    assert 20 <= granted <= 25


def test_report_that_cannot_be_written_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "text", lambda folder, outcomes: 1 / 0)
    assert command.execute([_stage("good", ":")], tmp_path, 60, report.text) == 1
    assert "report: ZeroDivisionError" in capsys.readouterr().out
    assert "could not be written" in (tmp_path / "report.md").read_text()


def _main(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    return benchmarks_main.main()


def test_help(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        _main(monkeypatch, "gpu", "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--out DIR" in text and "--first" in text and "--minutes M" in text and "default 7" in text


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _main(monkeypatch, "gpu", "--out", str(tmp_path / "out")) == 2
    assert (
        capsys.readouterr().err
        == f"gpu: expected a GPU that torch can use, got torch {torch.__version__} without one\n"
    )
    assert not (tmp_path / "out").exists()


def test_too_little_time_is_refused(monkeypatch, capsys, tmp_path):
    assert _main(monkeypatch, "gpu", "--out", str(tmp_path), "--minutes", "0.5") == 2
    assert capsys.readouterr().err == "gpu: --minutes: expected at least 1, got 0.5\n"


def test_minutes_without_first_only(monkeypatch, capsys, tmp_path):
    assert _main(monkeypatch, "gpu", "--first", "--out", str(tmp_path), "--minutes", "3") == 2
    assert "--minutes: expected without --first" in capsys.readouterr().err


def test_stages_fit_in_the_time_of_the_command(tmp_path):
    stages = {stage.name: stage for stage in command.stages(tmp_path)}
    assert list(stages) == [
        "environment",
        "compile",
        "must_show",
        "validate",
        "ceilings",
        "speed",
        "validate rest",
        "sanitizer",
    ]
    least = {name: stage.least_seconds for name, stage in stages.items()}
    assert sum(least.values()) < 150
    before = sum(
        stages[name].seconds for name in ("environment", "compile", "must_show", "validate", "ceilings")
    )
    assert before + least["speed"] + least["validate rest"] + least["sanitizer"] < 60 * command.MINUTES


def test_first_contact_fits_in_300_seconds(tmp_path):
    stages = command.first_stages(tmp_path)
    assert [stage.name for stage in stages] == ["environment", "right", "core", "kernels", "tiles", "gluon"]
    assert (
        sum(stage.seconds for stage in stages[:-2]) + sum(stage.least_seconds for stage in stages[-2:]) < 280
    )
    assert command.FIRST_SECONDS < 300
    for stage in (*stages, *command.stages(tmp_path)):
        assert (ROOT / "benchmarks" / "gpu" / "stages" / f"{stage.command[3]}.py").is_file()


def test_both_commands_together_write_eight_files():
    assert len({*command.FIRST.files, *command.WHOLE.files}) == 8


def test_published_files_are_whole_and_follow_progress(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    (work / "logs").mkdir(parents=True)
    with publishing.Publisher(work, out, command.WHOLE) as publisher:
        publisher.show()
        assert not list(out.iterdir())
        arguments.write(work, "environment", device="Toy")
        rows.write(work / "speed.json", [1])
        (work / "logs" / "speed.log").write_text("hello")
        publisher.show()
        assert json.loads((out / "run.json").read_text())["environment"]["device"] == "Toy"
        assert json.loads((out / "speed.json").read_text()) == [1]
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert archive.extractfile("logs/speed.log").read() == b"hello"
    assert {file.name for file in out.iterdir()} == {"run.json", "speed.json", "logs.tar.gz"}
    assert rows.kind_of(json.loads((out / "run.json").read_text())) == rows.STAGE


# -- verdicts


def _row(op: str, provider: str, ms: float, graph_ms: float | None = None, **more: object) -> Row:
    return Row(
        device="Toy",
        torch="2",
        triton="3",
        op=op,
        shape=SMALL.size,
        dtype="bf16",
        provider=provider,
        p20_ms=ms,
        p50_ms=ms,
        p80_ms=ms,
        tflops=100 / ms,
        unique_fraction=0.5,
        host_us=5.0,
        layout="processor",
        graph_p50_ms=graph_ms,
        graph_tflops=graph_ms and 100 / graph_ms,
        ceiling_tflops=400.0,
        asked_fraction=0.55,
    )._replace(**more)


def _line(measure: str, must: Bar, *goals: Bar) -> Line:
    return Line("it", "qalign_attention", SMALL, measure, must, goals)


def _judge(line: Line, *rows: Row) -> must_show.Verdict:
    return must_show.judge(line, rows)


@pytest.mark.parametrize(("ms", "word"), [(0.65, "goal"), (0.66, "must"), (0.87, "must"), (0.88, "MISSED")])
def test_time_ratio_is_held_against_must_and_goal(ms, word):
    line = _line("time ratio", Bar(0.87, DEFAULT), Bar(0.65, DEFAULT))
    verdict = _judge(line, _row("qalign_attention", OURS, 9.0, ms), _row("attention", "sdpa", 1.0, 1.0))
    assert verdict.text == word and verdict.measured == (pytest.approx(ms),) * 2 and verdict.mode == "graph"


def test_no_eager_time_stands_for_a_failed_capture():
    """The eager time of a call of many launches is the host's."""
    mine, sdpa = _row("qalign_attention", OURS, 1.0, 0.1), _row("attention", "sdpa", 4.0, 1.0)
    for measure_name, bar in (
        ("time ratio", Bar(0.5, DEFAULT)),
        ("ceiling share", Bar(0.1)),
        ("graph µs", Bar(40)),
    ):
        line = _line(measure_name, bar)
        assert _judge(line, mine, sdpa).measured[0] is not None
        verdict = _judge(line, mine._replace(graph_p50_ms=None, graph_tflops=None), sdpa)
        assert verdict.measured == (None,) and verdict.mode == verdict.text == "not captured"
    line = _line("time ratio", Bar(0.5, DEFAULT))
    assert _judge(line, mine, sdpa._replace(graph_p50_ms=None)).text == "not captured"


def test_fastest_peer_counts():
    line = _line("time ratio", Bar(1.0, DEFAULT), Bar(1.0, FASTEST))
    times = {("qalign_attention", OURS): 1.0, ("attention", "sdpa"): 2.0}
    times |= {("attention", "sdpa cudnn"): 1.25, ("attention", "fa3"): 0.5}
    rows = [_row(*visit, ms, ms) for visit, ms in times.items()]
    assert _judge(line, *rows).measured == (0.5, 2.0) and _judge(line, *rows).text == "must"
    assert (
        _judge(line, *rows[:3]).measured == (0.5, 0.8) and _judge(line, *rows[:3]).text == "goal; without fa3"
    )
    assert (
        _judge(line, *rows[:2]).measured == (0.5, None)
        and _judge(line, *rows[:2]).text == "must; without sdpa cudnn, fa3"
    )
    assert _judge(line, rows[0]).text == _judge(line).text == "not measured"


def test_rows_of_other_calls_do_not_count():
    line = _line("time ratio", Bar(1.0, DEFAULT))
    mine, sdpa = _row("qalign_attention", OURS, 1.0, 1.0), _row("attention", "sdpa", 2.0, 2.0)
    assert _judge(line, mine, sdpa).text == "goal"
    assert _judge(line, mine._replace(layout="contiguous"), sdpa).text == "not measured"
    assert _judge(line, mine._replace(asked_fraction=1.0), sdpa).text == "not measured"
    assert _judge(line, mine._replace(shape=[2, 2, 300, 40]), sdpa).text == "not measured"
    assert _judge(line, mine, sdpa._replace(asked_fraction=None)).text == "not measured"


def test_share_of_the_ceiling():
    line = _line("ceiling share", Bar(0.5), Bar(0.65))
    mine = _row("qalign_attention", OURS, 1.0, 0.5)
    assert _judge(line, mine).measured == (0.5, 0.5) and _judge(line, mine).text == "must"
    verdicts = [_judge(line, mine._replace(ceiling_tflops=ceiling)).text for ceiling in (300.0, 401.0)]
    assert verdicts == ["goal", "MISSED"]


def test_speed_up_and_time_under_a_graph():
    line = _line("speed-up", Bar(3, EAGER), Bar(5, EAGER))
    verdict = _judge(
        line, _row("qalign_attention", OURS, 1.0, 1.0), _row("qalign_attention", "eager sdpa", 4.0, 4.0)
    )
    assert verdict.measured == (4.0, 4.0) and verdict.text == "must"
    line = _line("graph µs", Bar(40), Bar(20))
    assert _judge(line, _row("qalign_attention", OURS, 1.0, 0.0205)).measured == (pytest.approx(20.5),) * 2
    assert _judge(line, _row("qalign_attention", OURS, 0.01)).text == "not captured"


def test_extra_memory_is_in_units_of_keys_values():
    mib = 2**20
    rows, keys_and_values = 2 * 300, 2 * 2 * 2 * 300 * 40
    peak_mib = 0.25 + (1.5 * keys_and_values + must_show.BYTES_PER_ROW * rows) / mib
    line = _line("memory ratio", Bar(2), Bar(1))
    verdict = _judge(line, _row("qalign_attention", OURS, 1.0, peak_mib=peak_mib, output_mib=0.25))
    assert verdict.measured == (pytest.approx(1.5),) * 2 and verdict.text == "must"
    assert _judge(line, _row("qalign_attention", OURS, 1.0)).text == "not measured"


# -- plans


def test_must_show_groups_hold_what_the_lines_need():
    groups = {(group.shape, group.asked_fraction): group.visits for group in plan.must_show_groups()}
    for line in must_show.LINES:
        visits = groups[line.shape, line.asked_fraction]
        assert (line.op, OURS) in visits
        assert all(visit in visits for bar in (line.must, *line.goals) for visit in bar.against)


def test_shapes_of_plans_are_found_by_name():
    names = {*plan.CORE_SHAPES, *gluon_joint.ATTENTION_SHAPES, *gluon_joint.JOINT_SHAPES}
    assert all(shapes.shape_named(name).name == name for name in names)
    with pytest.raises(ValueError, match="^name: expected one of sd15-mid, .*, got sd0$"):
        shapes.shape_named("sd0")


def test_plans_name_ops_and_providers_that_exist():
    names = {op.name for op in ops.OPS}
    measured = {visit for group in plan.must_show_groups() + plan.other_groups() for visit in group.visits}
    assert {op for op, _ in measured} <= names
    assert {op for op, provider in measured if provider == OURS} == names - {"qalign_attention_correlated"}
    assert {group.asked_fraction for group in plan.other_groups()} == {None, 0.35, 0.55, 0.63, 1.0}
    compiled = {
        (visit, group.shape) for part in plan.compile_parts() for group in part for visit in group.visits
    }
    assert {
        (visit, group.shape) for group in plan.other_groups() for visit in group.visits if visit[1] == OURS
    } <= compiled


def test_jobs_of_the_validation_hold_every_op_once():
    jobs = validation.jobs(core=True) + validation.jobs(core=False)
    assert len(jobs) == len(set(jobs))
    assert set(jobs) == {validation.Job(dtype, op) for dtype in validation.DTYPES for op in validate.OPS}
    assert jobs[0] == validation.Job("bfloat16", "qalign_attention rearranged")


def test_contiguous_inputs_stand_beside_where_heads_fold():
    found = {(group.shape.name, group.layout): dict(group.visits) for group in plan.other_groups()}
    assert "qalign_attention" in found["sd15-512px", "contiguous"] and ("sdxl", "contiguous") not in found
    compiled = {(group.shape.name, group.layout) for part in plan.compile_parts() for group in part}
    assert set(found) <= compiled


def test_first_contact_begins_with_core_ops_in_bfloat16(monkeypatch):
    monkeypatch.setattr(right, "target_of", lambda device: "sm_90")
    calls = right.calls()
    assert len(calls) == len(set(calls))
    first = calls[: len(plan.CORE_SHAPES) * len(plan.CORE_OPS)]
    assert {call.name for call in first} == set(plan.CORE_OPS) and {call.dtype for call in first} == {
        "bfloat16"
    }
    tiles = [call for call in calls if call.tile]
    assert ("attention counted softmax", _configs.Tile(64, 128, 4, 3)) in {
        (call.name, call.tile) for call in tiles
    }
    assert {(call.name, call.dtype) for call in calls if not call.tile} == {
        (name, dtype)
        for name in (*(op.name for op in ops.OPS if not op.correlated), *JOINT_CALLS)
        for dtype in right.DTYPES
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", JOINT_CALLS)
def test_joint_checks_accept_right_and_see_wrong_matches(name, device):
    if problem := _backends.triton_problem():
        pytest.skip(problem)
    call = JOINT_CALLS[name]
    inputs = shapes.make_inputs(Shape("", 2, 2, 100, 32), True, torch.float16, device)
    result = call.run(inputs, "triton")
    assert call.check(inputs, result, "triton")
    result[0][..., 5] += 1
    assert not call.check(inputs, result, "triton")


def _process_or_error(what):
    if what == "raise":
        raise ValueError("this call is wrong")
    if what == "die":
        os._exit(7)
    return os.getpid()


@pytest.mark.parametrize(
    "wrong, error", [("raise", "ValueError: this call is wrong"), ("die", "exit code 7")]
)
def test_process_answers_calls_until_one_goes_wrong(tmp_path, wrong, error):
    forks.preload()
    caller, log = forks.Worker(), tmp_path / "log"
    try:
        first, second, failed, third = (
            caller.ask(_process_or_error, what, log=log, seconds=60) for what in ("", "", wrong, "")
        )
    finally:
        caller.end()
    assert first.value == second.value and first.error is None
    assert failed.value is None and error in failed.error
    assert third.value not in (None, first.value)


def test_bits_are_compared_where_there_is_no_number():
    some = torch.tensor([[1.0, float("nan")]])
    assert right._same_bits(some, some.clone()) and not right._same_bits(some, -some)
    assert right._same_bits(torch.tensor(1.0), torch.tensor(1.0))


def test_candidates_are_what_is_launched(monkeypatch):
    if problem := _backends.triton_problem():
        pytest.skip(problem)
    from qalign_kernels._triton._launch import recording

    monkeypatch.setattr(right, "target_of", lambda device: "sm_90")
    for call in right.tile_calls():
        small = call.shape._replace(batch=1, tokens=1032)  # in the bucket of 4096
        inputs = shapes.make_inputs(small, True, torch.float16, "cpu")
        tried = call._replace(shape=small, dtype="float16")
        with right._trying(tried), recording("sm_90") as launches:
            trials.trial_named(call.name).timed.run(inputs, "triton")
        found = {
            (one.arguments.get("BLOCK_M"), one.arguments.get("BLOCK_N"), one.num_warps, one.num_stages)
            for one in launches
        }
        assert tuple(call.tile) in found, call


def test_candidates_are_tiles_of_this_table_that_fit():
    for row in candidates.rows():
        for head_dim in row["head_dims"]:
            key = _configs.Key(row["op"], row["mode"], "sm_90", "3.7", "bfloat16", 4096, head_dim)
            found = candidates.tiles(key)
            assert found and all(_configs.fits(tile, key, 2) for tile in found), (key, found)
            shipped = shipped_tile(key, 2)
            assert set(found) - {shipped} <= set(candidates.candidate_tiles(key, shipped))


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "FA2"),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...>>>", "FA3"),
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at", "FA4"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x64", "cuDNN"),
        (
            "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
            "memory-efficient",
        ),
        ("void softmax_warp_forward<float, float>", "math"),
        ("ampere_gemm", "unknown: ampere_gemm"),
    ],
)
def test_sdpa_is_named_by_the_kernel_that_ran(kernel, name):
    assert sdpa_implementation(["void at::native::elementwise_kernel<>", kernel][-1:]) == name


def _varlen_attention(query, key, value, start_q, start_k, max_q, max_k, *, scale, seqused_k):
    """torch's `varlen_attn`, which has no CPU kernel: rows are [tokens of all sequences, H, D]."""
    outputs = []
    for row, used in enumerate(seqused_k.tolist()):
        own = query[start_q[row] : start_q[row + 1]]
        parts = [own, *(x[start_k[row] : start_k[row + 1]][:used] for x in (key, value))]
        outputs.append(sdpa(*(x.transpose(0, 1) for x in parts), scale=scale).transpose(0, 1))
    return torch.cat(outputs)


def test_kernels_of_one_call_exclude_the_flush(monkeypatch):
    Event = namedtuple("Event", "key device_time_total count")
    events = [
        Event("short", 40.0, 20),
        Event("long", 90.0, 10),
        Event("Memset (Device)", 900.0, 10),
        Event("cpu", 0, 1),
    ]

    class Profile(contextlib.nullcontext):
        def __enter__(self):
            return self

        def key_averages(self):
            return events

    monkeypatch.setattr(torch.profiler, "profile", lambda **options: Profile())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = kernels(lambda: None, rounds=10)
    assert found == [("long", 9.0, 1.0), ("short", 2.0, 2.0)]
    place = {
        "what": "kernel",
        "op": "attention",
        "provider": "sdpa",
        "shape": [1, 2],
        "implementation": "FA2",
    }
    rows = [place | {"name": name, "us": us, "launches": n} for name, us, n in found]
    assert "| attention | sdpa (FA2) | [1, 2] | long | 9.0 | 1 |" in first_report.kernel_table(rows)


def test_sdpa_is_named_by_what_torch_chooses():
    inputs = shapes.make_inputs(SMALL, False, torch.float32, "cpu")
    assert providers.sdpa_implementation("sdpa", inputs) in ("FA2", "math")  # of a CPU
    assert providers.sdpa_implementation("triton", inputs) is None


def test_first_report_names_wrong_and_missing_ops(tmp_path):
    row = {"op": "attention", "shape": [1, 2, 3, 4], "layout": "processor", "dtype": "bfloat16", "tile": None}
    judged = [row | {"right": True, "same_bits": True}, row | {"error": "illegal address"}]
    judged += [
        row | {"right": True, "same_bits": False},
        row | {"right": False, "same_bits": True, "tile": [1, 2, 3, 4]},
    ]
    rows.write(tmp_path / "right.json", judged)
    text = first_report.text(tmp_path, [Outcome("right", "failed", 3.0, "")])
    assert "1 of 4 calls are right" in text and "bfloat16: illegal address" in text
    assert (
        "two calls differ in bits" in text and "tile [1, 2, 3, 4]: wrong" in text and "Not measured." in text
    )


def test_numbers_that_are_not_finite_become_null(tmp_path):
    rows.write(tmp_path / "rows.json", [{"error": float("inf"), "tile": (1, float("nan"))}])
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"error": None, "tile": [1, None]}]


@pytest.mark.parametrize("peer", providers.CHANNEL_PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_two_channels_of_any_sdpa(monkeypatch, peer, dtype):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", _varlen_attention)
    op = ops.op_named("attention_counts")
    inputs = shapes.make_inputs(SMALL, False, dtype, "cpu")
    assert op.check(inputs, providers.build(peer, op, inputs)(), "reference")


# -- workers


BUSY = "attention triton [1, 2, 3, 4]"


def _supervise(
    tmp_path: Path, visit: str, end: str, seconds: float = 100, stall_seconds: float = 60
) -> tuple[int, Journal]:
    """Workers that are busy with the visit, until it is to be left out."""
    journal = Journal(tmp_path / "speed.journal")
    journal.add("begin", visit)
    worker_command = ("sh", "-c", f"grep -q skip $1 || {end}", "worker", str(journal.path))
    return measure.supervise(worker_command, journal, arguments.Clock(seconds), stall_seconds), journal


def test_next_worker_skips_the_visit_that_killed_one(tmp_path):
    code, journal = _supervise(tmp_path, BUSY, "exit 5")
    assert code == 0
    assert journal.texts("failure") == [f"{BUSY}: ended the process with exit code 5"]
    assert journal.texts("skip") == [BUSY] and journal.left_open() is None


def test_peer_that_hangs_is_a_note(tmp_path):
    peer = "attention fa3 [1, 2, 3, 4]"
    code, journal = _supervise(tmp_path, peer, "exec sleep 600", stall_seconds=3)
    assert code == 0
    assert journal.texts("note") == [f"{peer}: did not finish"] and not journal.texts("failure")


def test_worker_is_stopped_when_time_is_up(tmp_path):
    code, journal = _supervise(tmp_path, BUSY, "exec sleep 600", seconds=2)
    assert code == 0
    assert journal.texts("note") == [f"stopped at the end of its time in {BUSY}"]


def test_workers_that_never_start_are_a_failure(tmp_path):
    journal = Journal(tmp_path / "speed.journal")
    assert measure.supervise(("sh", "-c", FAILS), journal, arguments.Clock(300)) == 1
    assert (
        "ValueError: no such clock" in journal.texts("failure")[0]
        and len(journal.texts("failure")) == measure.WORKERS + 1
    )


@pytest.fixture
def on_cpu(monkeypatch):
    """The worker as it is, on the CPU: no graphs, no memory counters, tiled PyTorch as ours."""

    def no_graph(call):
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(worker, "DEVICE", "cpu")
    monkeypatch.setattr(worker, "DTYPE", "fp32")
    monkeypatch.setattr(worker, "OURS", "tiled")
    monkeypatch.setattr(worker, "ROUNDS", 2)
    monkeypatch.setattr(worker, "capture", no_graph)
    monkeypatch.setattr(worker, "large_matmul", lambda: lambda: None)
    monkeypatch.setattr(worker.measurement, "cuda_peak_mib", lambda call: 1.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


GROUP = Group(
    SMALL,
    0.35,
    (
        ("qalign_attention", "tiled"),
        ("qalign_attention", "eager sdpa"),
        ("attention", "fa3"),
        ("attention", "sdpa"),
    ),
)


def test_worker_measures_a_group(on_cpu, tmp_path):
    where = worker.files(tmp_path, "speed")
    (tmp_path / "logs").mkdir()
    with torch.no_grad():
        worker.measure_groups([GROUP], where, arguments.Clock(600))
    found = {(row.op, row.provider): row for row in rows.read(where.rows)[1]}
    assert list(found) == [visit for visit in GROUP.visits if visit[1] != "fa3"]
    mine, sdpa = found["qalign_attention", "tiled"], found["attention", "sdpa"]
    assert (
        abs(mine.unique_fraction - 0.35) < 0.02 and mine.asked_fraction == 0.35 and mine.shape == SMALL.size
    )
    assert sdpa.ratio_to_sdpa == 1.0 and 0 < mine.p20_ms <= mine.p50_ms <= mine.p80_ms
    assert mine.output_mib == pytest.approx(2 * 300 * 40 * 4 / 2**20, abs=1e-3) and mine.graph_p50_ms is None
    notes = where.journal.texts("note")
    assert any(
        note.startswith("attention fa3 [1, 2, 300, 40] U/N 0.35: ModuleNotFoundError")
        or "ImportError" in note
        for note in notes
    )
    assert any("no CUDA graph, RuntimeError: no graphs here" in note for note in notes)
    assert where.journal.texts("group") == [GROUP.name] and not where.journal.texts("failure")
    assert mine.layout == "processor" and mine.ceiling_tflops > 0 and not mine.host_bound
    text = report.speed_table([list(found.values())])
    assert f"| qalign_attention | {SMALL.size} | {mine.unique_fraction:.3g} | tiled |" in text
    assert "| not captured |" in text


def test_speed_table_ratios_stay_within_one_run():
    more = {"ceiling_tflops": 200.0}
    first = [_row("attention", OURS, 1.0, 1.0, **more), _row("attention", "sdpa", 2.0, 2.0, **more)]
    second = [_row("attention", OURS, 3.0, 3.0, **more)]
    lines = report.speed_table([first, second]).splitlines()[2:]
    assert [line.split(" | ")[6:9] for line in lines] == [
        ["100", "0.5", "0.5"],
        ["50", "0.25", "1"],
        ["33.3", "0.167", "-"],
    ]


def test_worker_shows_no_figure_for_a_failed_check(on_cpu, tmp_path, monkeypatch):
    wrong = ops.OPS[0]._replace(check=lambda x, result, backend: False)
    monkeypatch.setattr(worker, "op_named", lambda name: wrong)
    journal = Journal(tmp_path / "journal")
    with torch.no_grad():
        found = list(
            worker.measure(Group(SMALL, None, ((wrong.name, "tiled"),)), journal, arguments.Clock(600))
        )
    assert found == [[]] * worker.REPEATS
    assert journal.texts("failure") == [f"similarity_argmax tiled {SMALL.size} U/N by chance: check failed"]


def test_lost_device_ends_worker_and_names_visit(on_cpu, tmp_path, monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access")

    journal = Journal(tmp_path / "journal")
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with torch.no_grad(), pytest.raises(worker.BrokenDevice, match="illegal memory access"):
        list(worker.measure(GROUP, journal, arguments.Clock(600)))
    assert journal.left_open() == f"qalign_attention tiled {GROUP.name}"


def test_worker_without_time_measures_nothing(on_cpu, tmp_path):
    where = worker.files(tmp_path, "speed")
    (tmp_path / "logs").mkdir()
    worker.measure_groups([GROUP], where, arguments.Clock(1))
    assert (
        where.journal.texts("note") == [f"{GROUP.name}: not measured, no time left"]
        and not where.rows.exists()
    )


# -- validation, sanitizer, rates


def test_validation_merges_jobs_and_names_missing_ones(tmp_path, capsys):
    row = {
        "op": "attention",
        "backend": "triton",
        "dtype": "bfloat16",
        "cases": 3,
        "error": 1.0,
        "ratio": 0.5,
        "passed": True,
        "failures": [],
    }
    jobs = [validation.Job(dtype, "attention") for dtype in validation.DTYPES]
    merged = validation.Merged(tmp_path, jobs, "Toy")
    merged.add(jobs[0], forks.Answer({"rows": [row], "dropped": ["attention, bfloat16, B=9"]}))
    merged.add(jobs[1], forks.Answer(error="ended its process with exit code -11"))
    assert merged.without_memory() == jobs[:1]
    again = validation.Merged(tmp_path, [], "Toy")
    assert again.conclude() == 1
    said = capsys.readouterr().out
    assert "unfinished: float16 attention, ended its process with exit code -11" in said
    assert "unfinished: float32 attention, stopped" in said and "3 cases, 0 failed, 2 ops unfinished" in said
    assert "not run for lack of memory: attention, bfloat16, B=9" in said
    assert rows.kind_of(again.content) == rows.VALIDATION
    text = report.text(tmp_path, [Outcome("validate", "failed", 0.1, "")])
    assert (
        "Not run for lack of memory: attention, bfloat16, B=9." in text
        and "float32 attention (stopped)" in text
    )
    merged.add(jobs[0], forks.Answer({"rows": [row], "dropped": []}))
    assert len(merged.content["rows"]) == 1 and not merged.content["dropped"]


@pytest.mark.parametrize(("code", "summary", "expected"), [(0, "0 errors", 0), (99, "4 errors", 1)])
def test_sanitizer_reads_the_summary(tmp_path, monkeypatch, code, summary, expected):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!/bin/sh\necho 'called attention [1]'\necho '========= ERROR SUMMARY: {summary}'\nexit {code}\n"
    )
    tool.chmod(0o755)
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(sanitizer, "program", lambda: str(tool))
    monkeypatch.setattr(sys, "argv", ["sanitizer", "--out", str(tmp_path), "--seconds", "60"])
    assert sanitizer.main() == expected
    rows = json.loads((tmp_path / "sanitizer.json").read_text())["rows"]
    found = [(row["tool"], row["part"], row["verdict"], row["calls"]) for row in rows]
    assert found == [
        (tool, part, summary, ["attention [1]"])
        for tool in ("memcheck", "racecheck")
        for part in range(sanitizer.PARTS)
    ]


def test_missing_sanitizer_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer, "program", lambda: None)
    monkeypatch.setattr(sys, "argv", ["sanitizer", "--out", str(tmp_path), "--seconds", "60"])
    assert sanitizer.main() == 0
    assert "compute-sanitizer is not installed." in report.text(
        tmp_path, [Outcome("sanitizer", "ok", 0.1, "")]
    )


RATES = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.gpu.stages import instruction_rates as rates
names = rates.rate_kernel.arg_names
types = ["*fp32", "*fp32", "*i64", "i32", "constexpr", "constexpr", "constexpr"]
for name, mode in rates.MODES.items():
    constants = {(4,): mode, (5,): rates.UNROLL, (6,): rates.BLOCK}
    source = ASTSource(rates.rate_kernel, dict(zip(names, types)), constants, {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": rates.WARPS})
    print(name, rates.loop_contents(compiled), sep="|")
"""


@pytest.mark.slow
def test_rate_kernel_loops_hold_only_the_chain():
    pytest.importorskip("triton")
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = inherited | {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RATES], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    loops = {
        name: eval(contents) for name, contents in (line.split("|") for line in done.stdout.splitlines())
    }
    chain = 16 * 8  # unrolled steps, chains of a lane
    for name, instruction in (("FFMA", "FFMA"), ("FMNMX", "FMNMX"), ("LOP3", "LOP3"), ("MUFU.EX2", "MUFU")):
        assert loops[name][instruction] == chain and sum(loops[name].values()) <= chain + 6, name
    assert loops["FMNMX and FFMA"]["FMNMX"] == loops["FMNMX and FFMA"]["FFMA"] == chain // 2


def test_lanes_per_clock_counts_every_warps_instructions():
    pytest.importorskip("triton")
    from benchmarks.gpu.stages.instruction_rates import lanes_per_clock

    instructions = (
        1000 * 16 * 8 * 8 * 2
    )  # iterations, unrolled steps, chains, warps, programs on a multiprocessor
    assert lanes_per_clock(1000, cycle_count=instructions / 4) == 128
