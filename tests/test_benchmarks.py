"""The benchmarks: inputs and peers, failing checks, memory, rows and reports."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import __main__ as benchmarks_main
from benchmarks import report
from benchmarks.quality import bounded, distillation, distillation_step
from benchmarks.speed import command as speed
from benchmarks.speed import memory
from benchmarks.static import cases
from benchmarks.static.budgets import BUDGETS
from benchmarks.suite import eager
from benchmarks.suite.shapes import CONTIGUOUS, Shape, make_inputs
from qalign.embedded import scenes
from qalign_kernels import similarity_argmax
from qalign_kernels.bench import measure
from qalign_kernels.bench.ops import OPS

ROOT = Path(__file__).parents[1]
SMALL = Shape("small", 2, 4, 300, 40)
COLUMNS = [
    "device",
    "torch",
    "triton",
    "op",
    "shape",
    "dtype",
    "provider",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "tflops",
    "peak_mib",
    "saved_mib",
    "ratio_to_sdpa",
    "unique_fraction",
    "host_us",
    "host_bound",
    "layout",
    "commit",
    "graph_p20_ms",
    "graph_p50_ms",
    "graph_p80_ms",
    "graph_tflops",
    "ceiling_tflops",
    "implementation",
    "output_mib",
    "asked_fraction",
    "layers",
    "gradient_difference",
]


def _speed(*arguments: str, code: str = "") -> subprocess.CompletedProcess:
    program = f"import sys; from benchmarks.__main__ import main\n{code}\nsys.exit(main())"
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }  # it runs a pytest of its own
    environment = {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        program,
        "speed",
        "--device",
        "cpu",
        "--shape",
        "sd15-mid",
        "--seconds",
        "0.02",
        "--no-memory",
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("correlated", "fraction", "within"), [(True, 0.55, 0.01), (False, 0.632, 0.05)])
def test_inputs_match_the_promised_fraction_of_tokens(correlated, fraction, within):
    inputs = make_inputs(Shape("", 2, 8, 1024, 40), correlated, torch.float32, "cpu")
    index = similarity_argmax(inputs.query, inputs.ref_query, backend="tiled").index
    assert abs(measure.unique_fraction(index) - fraction) < within
    assert abs(measure.unique_fraction(inputs.match_map) - fraction) < within
    assert torch.equal(inputs.counts.sum(-1), torch.full((2, 1), 1024))


@pytest.mark.parametrize("fraction", [0.35, 0.55, 0.63, 1.0])
def test_correlated_inputs_match_the_chosen_fraction(fraction):
    inputs = make_inputs(Shape("", 2, 4, 256, 40), True, torch.float32, "cpu", asked_fraction=fraction)
    match = similarity_argmax(inputs.query, inputs.ref_query, backend="tiled")
    assert measure.unique_fraction(match.index) == pytest.approx(fraction, abs=0.01)
    assert (inputs.counts > 0).float().mean().item() == pytest.approx(fraction, abs=0.01)


def test_inputs_lie_as_attention_processors_have_them():
    shape = Shape("", 2, 4, 300, 40)
    usual = make_inputs(shape, False, torch.float32, "cpu")
    other = make_inputs(shape, False, torch.float32, "cpu", layout=CONTIGUOUS)
    for name in measure.FEATURES:
        here, there = getattr(usual, name), getattr(other, name)
        assert here.transpose(1, 2).is_contiguous() and there.is_contiguous() and torch.equal(here, there)


def test_static_compiles_for_the_strides_of_measured_inputs():
    shape = Shape("", cases.BATCH, cases.NUM_HEADS, 4096, 40)
    measured = make_inputs(shape._replace(tokens=48), False, torch.bfloat16, "cpu")
    compiled = cases._features(shape.head_dim, torch.bfloat16, 48, 1)[0]
    assert compiled.stride() == measured.query.stride()


@pytest.mark.parametrize(
    ("op", "head_dim", "count"),
    [("qalign_attention", 40, 2), ("qalign_attention", 64, 1), ("attention", 40, 1)],
)
def test_head_folding_ops_are_measured_in_both_layouts(op, head_dim, count):
    options = benchmarks_main.parser().parse_args(["speed", "--op", op, "--shape", "sd15", "sdxl"])
    items = speed.choose_items(options, "cuda")
    found = {
        (item.layout, item.provider)
        for item in items
        if item.op.name == op and item.shape.head_dim == head_dim
    }
    assert len({layout for layout, _ in found}) == count
    assert {name for layout, name in found if layout == CONTIGUOUS} <= {"triton", "sdpa"}


class Stamp(float):
    """Seconds of a time line that only `spend` moves."""

    def __sub__(self, earlier):
        return float(self) - float(earlier)


@pytest.mark.parametrize(
    ("host_ms", "flushes", "bound"), [(0.01, 2, False), (0.3, 6, False), (9.0, 32, True)]
)
def test_flushes_take_longer_than_the_host(monkeypatch, host_ms, flushes, bound):
    """The eager time of a call whose launches take longer than one flush was that of the host."""
    now = [0.0]

    def spend(ms):
        now[0] += ms / 1e3

    monkeypatch.setattr(measure, "_flush", torch.empty(0))
    monkeypatch.setattr(measure, "before_round", lambda count=1: spend(0.1 * count))
    monkeypatch.setattr(measure, "stamp", lambda: Stamp(now[0]))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    hidden = measure.hide_host(lambda: spend(host_ms))
    assert (hidden.flushes, hidden.host_bound) == (flushes, bound)
    assert hidden.host_seconds == pytest.approx(host_ms / 1e3)


def test_label_sets_are_equal_regions():
    inputs = make_inputs(SMALL, False, torch.float32, "cpu")
    for sets, count in ((inputs.bit_sets, measure.NUM_LABELS), (inputs.half_sets, 2)):
        found, sizes = sets[0].unique(return_counts=True)
        assert found.tolist() == [1 << label for label in range(count)] and sizes.unique().tolist() == [
            SMALL.tokens // count
        ]


def test_inputs_are_the_same_for_a_seed():
    first, again, other = (make_inputs(SMALL, True, torch.float32, "cpu", seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.query, other.query)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_checks_take_what_is_right_from_everyone(op):
    inputs = make_inputs(SMALL, op.correlated, torch.float32, "cpu")
    assert op.check(inputs, op.run(inputs, "tiled"), "tiled")
    peer = eager.peer(op.name)(inputs)
    assert op.check(inputs, peer, "reference")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_checks_see_one_wrong_row(op):
    inputs = make_inputs(SMALL, op.correlated, torch.float32, "cpu")
    result = op.run(inputs, "tiled")
    parts = result if isinstance(result, tuple) else (result,)
    parts[0].select(-2 if parts[0].is_floating_point() else 2, -1).add_(1)
    assert not op.check(inputs, result, "tiled")


@pytest.mark.slow
def test_rows_have_their_columns(tmp_path):
    done = _speed("--op", "match_counts", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["provider"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert set(rows) == {"tiled", "sdpa", "eager", "reference"}
    for row in rows.values():
        assert list(row) == COLUMNS
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["shape"] == [2, 8, 256, 160] and row["dtype"] == "fp32"
    assert rows["sdpa"]["ratio_to_sdpa"] == 1.0
    assert 0.55 < rows["tiled"]["unique_fraction"] < 0.7


@pytest.mark.slow
def test_no_figure_for_a_failed_check(tmp_path):
    sabotage = (
        "from qalign_kernels.bench import ops\n"
        "wrong = {'run': lambda x, backend: x.counts + 1}\n"
        "ops.OPS[:] = [op._replace(**wrong) if op.name == 'match_counts' else op for op in ops.OPS]"
    )
    done = _speed("--op", "match_counts", "--json", str(tmp_path / "rows.json"), code=sabotage)
    assert done.returncode == 1
    assert "check failed: match_counts [2, 8, 256, 160] tiled" in done.stdout
    assert "tiled" not in {row["provider"] for row in json.loads((tmp_path / "rows.json").read_text())}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--op", "nonsense"), "--op: expected part of an op's name"),
        (("--device", "cuda"), "--device: expected a device"),
    ],
)
def test_bad_arguments_give_one_line(arguments, complaint):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = _speed(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr and len(done.stderr.splitlines()) == 1


def test_percentiles():
    assert measure.percentiles([float(x) for x in range(11)]) == (2.0, 5.0, 8.0)
    assert measure.percentiles([3.0]) == (3.0, 3.0, 3.0)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the peak of a process restarts on Linux only"
)
def test_memory_sees_the_scores_that_eager_holds():
    shape = (*Shape("", 1, 8, 1024, 40),)
    scores_mib = 8 * 1024 * 1024 * 4 / measure.MIB
    eager, tiled = (
        memory.cpu_peak_mib(provider, "attention", shape, torch.float32) for provider in ("eager", "tiled")
    )
    assert scores_mib < eager < 4 * scores_mib
    assert 0 < tiled < scores_mib


def test_distillation_step_saves_output_lse_and_signs():
    inputs = make_inputs(SMALL, False, torch.float32, "cpu")
    step = next(op for op in OPS if op.name == "distillation_step")
    elements, rows = inputs.query.numel(), inputs.query[..., 0].numel()
    ours, peer = (
        measure.saved_mib(call, inputs)[0]
        for call in (lambda: step.run(inputs, "tiled"), lambda: eager.peer(step.name)(inputs))
    )
    assert ours == (elements * 4 + rows * 4 + elements) / measure.MIB
    assert peer == (elements * 4 + rows * 4 + elements * 4) / measure.MIB


def test_optimisation_step_is_that_of_the_plain_pipeline():
    rows = distillation_step.measure(
        distillation_step.make("embedded", torch.float32, "cpu"), "embedded", "fp32", "cpu", rounds=2
    )
    ours, peer = rows
    assert (ours.provider, peer.provider) == ("tiled", "eager") and ours.shape == peer.shape == [
        1,
        1,
        1024,
        32,
    ]
    assert len(ours.layers) == 6 and 0 < ours.saved_mib < peer.saved_mib
    assert ours.gradient_difference < 2e-5
    assert all(row.p50_ms > 0 and row.op == "optimisation_step embedded" for row in rows)
    assert "optimisation_step embedded" in distillation_step.table(rows)


def _row(provider: str, tokens: int, p50_ms: float, **more) -> dict:
    row = dict.fromkeys(COLUMNS) | {
        "device": "Toy GPU",
        "torch": "2",
        "triton": "3",
        "op": "qalign_attention",
        "dtype": "bf16",
        "commit": "abc",
    }
    times = {
        "p20_ms": p50_ms,
        "p50_ms": p50_ms,
        "p80_ms": p50_ms,
        "ratio_to_sdpa": p50_ms / 2,
        "peak_mib": p50_ms * 3,
    }
    return row | {"shape": [1, 8, tokens, 40], "provider": provider} | times | more


@pytest.fixture
def results(tmp_path) -> Path:
    rows = [
        _row(provider, tokens, scale * tokens / 1024)
        for provider, scale in (("tiled", 1.5), ("eager", 4.25))
        for tokens in (1024, 4096)
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    return file


def _report(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([str(x) for x in arguments]))


def test_report_writes_tables_and_a_plot(results, tmp_path):
    assert _report(results, "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Toy GPU, bf16, PyTorch 2, Triton 3, commit abc" in text
    assert "| qalign_attention | [1, 8, 4096, 40] | eager |" in text
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_summary_has_ours_beside_eager(results):
    line = "| qalign_attention | [1, 8, 1024, 40] | tiled | 1.5 | 0.75 | 4.25 | - | 4.5 | 12.8 | - | - |"
    assert line in report.summary(report.by_device(report.read([results]).times)[0])


def test_report_shows_accuracy_and_machine_code(results, tmp_path):
    checked = {"op": "attention", "backend": "tiled", "cases": 2, "failures": [], "passed": True}
    validation = {"device": ["Toy"], "rows": [{**checked, "dtype": "float32", "error": 1.5e-7, "ratio": 0.3}]}
    validation["rows"].append(
        {**checked, "dtype": "float16", "error": 1.0, "ratio": 9.0, "passed": False, "failures": ["it"]}
    )
    compiled = {
        "triton": "3.7.1",
        "cases": ["attention plain"],
        "target": "sm_90",
        "dtype": "bf16",
        "head_dim": 64,
        "registers": 200,
    }
    compiled |= {
        "spill_bytes": 0,
        "shared_kib": 96.0,
        "lane_instructions": 5.5,
        "problems": [],
        "tile": "128x128",
        "flags": [],
    }
    compiled |= {"kernel": "attention_kernel"}
    backward = [
        {
            **compiled,
            "cases": ["attention_backward"],
            "kernel": kernel,
            "flags": flags,
            "registers": registers,
        }
        for registers, (kernel, flags) in enumerate(
            [("key_gradient_kernel", []), ("key_gradient_kernel", ["RAGGED"]), ("query_gradient_kernel", [])]
        )
    ]
    files = [tmp_path / "validate.json", tmp_path / "static.json"]
    for file, content in zip(
        files,
        (
            validation,
            [compiled, {**compiled, "spill_bytes": 8, "problems": ["spills"], "cases": ["other"]}, *backward],
        ),
    ):
        file.write_text(json.dumps(content))
    assert _report(results, *files, "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| attention | tiled | 1.5e-07 (0.30) | FAILED | - |" in text and "4 cases, 1 failed" in text
    assert "| sm_90 | bf16 | 3.7.1 | 5 | 200 | 1 | 96 of 227 | 1 |" in text
    limits = {
        budget["case"]: budget["limits"]["3.7"]
        for budget in json.loads(BUDGETS.read_text())["lane_instructions"]
    }
    assert f"| attention plain | sm_90 | 128x128 | 200 | 5.5 | {limits['attention plain']} |" in text
    (held,) = [
        line for line in text.splitlines() if line.startswith("| attention_backward")
    ]  # a budget is of the kernel and flags that it names
    assert held == "| attention_backward key_gradient_kernel | sm_90 | 128x128 | 0 | 5.5 | 10.2 |"


def test_report_takes_the_files_of_a_gpu_run(tmp_path):
    rows = [_row("triton", 1024, ms, asked_fraction=fraction) for ms, fraction in ((1.5, 0.35), (2.5, 1.0))]
    files = [tmp_path / "speed.json", tmp_path / "ceilings.json"]
    for file, content in zip(files, (rows, {"stage": "ceilings", "rows": []})):
        file.write_text(json.dumps(content))
    assert _report(*files, "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| triton | 1.5 | 1.5 |" in text and "| triton | 2.5 | 2.5 |" in text


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1]"])
def test_report_names_a_bad_file(tmp_path, content):
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"^{file}: expected"):
        _report(file)


def test_distillation_resumes_and_refuses_other_settings(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(pair, name, **settings):
        if len(measured) == 9:
            raise KeyboardInterrupt
        measured.append((pair.structure, name))
        return dict.fromkeys(
            ("time_s", "colour_error", "layout_iou", "distillation"), float(len(measured))
        ), torch.zeros(3, 8, 8)

    monkeypatch.setattr(distillation, "measure", measure)
    parser = argparse.ArgumentParser()
    distillation.add_arguments(parser)
    path = str(tmp_path / "new" / "figures.json")
    with pytest.raises(KeyboardInterrupt):
        distillation.run(parser.parse_args(["--pairs", "2", "--json", path]))
    kept = json.loads(Path(path).read_text())
    assert [len(pair["methods"]) for pair in kept["pairs"]] == [7, 2]
    later = dict.fromkeys(("time_s", "colour_error", "layout_iou", "distillation"), 10.0)
    monkeypatch.setattr(distillation, "measure", lambda pair, name, **settings: (later, torch.ones(3, 8, 8)))
    assert (
        distillation.run(
            parser.parse_args(["--pairs", "3", "--json", path, "--sheet", str(tmp_path / "sheet.png")])
        )
        == 0
    )
    assert Image.open(tmp_path / "sheet.png").width > 0  # of the third pair
    report = json.loads(Path(path).read_text())
    assert report["pairs"][0] == kept["pairs"][0] and [len(pair["methods"]) for pair in report["pairs"]] == [
        7,
        7,
        7,
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["untouched", "3", *["6.33"] * 3, "-", "-", "6.33"]
    with pytest.raises(ValueError, match="^--json: expected a report of {'steps': 5"):
        distillation.run(parser.parse_args(["--steps", "5", "--json", path]))


def test_bounded_resumes_and_refuses_other_settings(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(plan, layout, seed, name, **settings):
        if len(measured) == 7:
            raise KeyboardInterrupt
        measured.append((plan, layout, seed, name))
        return dict.fromkeys(
            ("time_s", "inside", "covered", "background", "both", "denoising"), float(len(measured))
        ), torch.zeros(3, 16, 16)

    monkeypatch.setattr(bounded, "measure", measure)
    parser = argparse.ArgumentParser()
    bounded.add_arguments(parser)
    path = str(tmp_path / "new" / "figures.json")
    with pytest.raises(KeyboardInterrupt):
        bounded.run(parser.parse_args(["--pictures", "4", "--json", path]))
    assert [each[:3] for each in measured[::5]] == [("quadruped", "above", 0), ("bird", "above", 1)]
    later = dict.fromkeys(("time_s", "inside", "covered", "background", "both", "denoising"), 10.0)
    monkeypatch.setattr(bounded, "measure", lambda *given, **settings: (later, torch.ones(3, 16, 16)))
    assert (
        bounded.run(
            parser.parse_args(["--pictures", "4", "--json", path, "--sheet", str(tmp_path / "sheet.png")])
        )
        == 0
    )
    report = json.loads(Path(path).read_text())
    assert [(each["plan"], each["layout"]) for each in report["pictures"]][2:] == [
        ("fish", "above"),
        ("quadruped", "falling"),
    ]
    assert (
        report["pictures"][0]["methods"]["masks alone"]["inside"] == 2 and (tmp_path / "sheet.png").is_file()
    )
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "untouched",
        "4",
        *["6.75"] * 5,
        "-",
        "-",
        "6.75",
    ]
    with pytest.raises(ValueError, match="^--json: expected a report of {'steps': 5"):
        bounded.run(parser.parse_args(["--steps", "5", "--json", path]))


def test_shares_are_of_the_boxes_that_were_given():
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:16, :16] = True
    assert bounded.shares(mask, ((0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1))) == {
        "inside": 1,
        "covered": 0.5,
        "background": 0,
        "both": 0,
    }
    mask[24:, 16:] = True
    found = bounded.shares(mask, ((0, 0, 0.5, 0.25), (0.5, 0.5, 1, 1)))
    assert found == {
        "inside": pytest.approx(256 / 384),
        "covered": 0.75,
        "background": pytest.approx(128 / 640),
        "both": 1,
    }


def test_creatures_of_held_out_scenes_are_found():
    seeds = [scenes.held_out_seed(number) for number in range(200, 230)]
    drawn = scenes.render(
        [seed for seed, plan in zip(seeds, scenes.render(seeds, 16).plans) if plan == "fish"][:2]
    )
    truth = scenes.token_labels(drawn.labels, (32, 32)).view(2, 32, 32) >= len(scenes.BACKGROUNDS)
    for picture, mask in zip(drawn.image, truth):
        found = bounded.creature(picture, "fish")
        assert (found & mask).sum() > 0.6 * (found | mask).sum()
