"""`python -m qalign_kernels.bench`: checks before figures, keys of other sizes, errors before work."""

import json
import sys

import pytest
import torch

from qalign_kernels.bench import __main__ as bench
from qalign_kernels.bench import measure
from qalign_kernels.bench.measure import FEATURES, Sizes
from qalign_kernels.bench.ops import OPS, draw, op_named

CROSS = Sizes(batch=2, heads=3, tokens=70, key_tokens=33, head_dim=40, value_dim=48)
BRIEF = ("--device", "cpu", "--shape", "1,2,48,16", "--seconds", "0.01")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_op_takes_keys_of_other_sizes(op):
    inputs = draw(op, CROSS, torch.float32, "cpu")
    assert op.check(inputs, op.run(inputs, "tiled"), "tiled")
    assert op.flops is None or op.flops(CROSS) > 0


def test_inputs_are_random_in_processor_layout():
    inputs = draw(op_named("attention"), CROSS, torch.float32, "cpu")
    for name in FEATURES:
        features = getattr(inputs, name)
        assert features.transpose(1, 2).is_contiguous() and not features.is_contiguous()
        assert 0.9 < features.std() < 1.1
    assert inputs.key.shape == (2, 3, 33, 40) and inputs.value.shape == (2, 3, 33, 48)
    assert not torch.equal(inputs.key, inputs.ref_query)


def test_queries_match_the_fraction_of_other_keys():
    inputs = measure.draw_inputs(CROSS, torch.float32, "cpu", matched_fraction=0.5)
    assert [row.unique().numel() for row in inputs.match_map[:, 0]] == [16, 16]
    assert torch.equal(inputs.counts.sum(-1), torch.full((2, 1), CROSS.tokens))


def test_flops_count_both_products():
    attention, match = (op_named(name).flops(CROSS) for name in ("attention", "similarity_argmax"))
    assert attention == 2 * 2 * 3 * 70 * 33 * (40 + 48) and match == 2 * 2 * 3 * 70 * 33 * 40


def test_rows_hold_time_memory_and_ratio(tmp_path, capsys):
    file = tmp_path / "rows.json"
    arguments = ("--op", "attention", "attention_gradient", *BRIEF, "--key-tokens", "20", "--json", str(file))
    assert bench.main(arguments) == 0
    rows = json.loads(file.read_text())
    assert [(row["op"], row["provider"]) for row in rows] == [
        (op, provider) for op in ("attention", "attention_gradient") for provider in ("tiled", "sdpa")
    ]
    for row in rows:
        assert row["shape"] == [1, 2, 48, 16] and (row["key_tokens"], row["value_dim"]) == (20, 16)
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["ratio_to_sdpa"] > 0
        assert row["peak_mib"] is not None or sys.platform == "win32"
    assert rows[1]["ratio_to_sdpa"] == 1.0 and rows[2]["saved_mib"] > 0
    printed = capsys.readouterr().out
    assert "attention_gradient  1,2,48,16 keys 20  fp32   tiled" in printed


def test_wrong_results_show_no_speed(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.json"
    wrong = op_named("attention")._replace(run=lambda x, backend: torch.zeros_like(x.query))
    monkeypatch.setattr(bench, "op_named", lambda name: wrong)
    assert bench.main(("--op", "attention", *BRIEF, "--json", str(file))) == 1
    printed = capsys.readouterr().out
    assert "FAILED attention on tiled: outside the error budget" in printed and "p50" not in printed
    assert json.loads(file.read_text()) == []


def _status(*arguments):
    """The exit status, whether the parser or the run refuses."""
    try:
        return bench.main(arguments)
    except SystemExit as refusal:
        return refusal.code


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--op nope", "--op: invalid choice: 'nope'"),
        ("--op attention --shape 1,8", "--shape: expected four numbers B,H,N,D above zero"),
        ("--op attention --shape 1,8,0,64", "--shape: expected four numbers B,H,N,D above zero"),
        (
            "--op attention --dtype bf16 --backend triton",
            "--backend: expected a backend that can be measured",
        ),
        ("--op attention --key-tokens 0", "--key-tokens: expected a number above zero"),
        ("--op similarity_topk --key-tokens 5", "--key-tokens: expected at least 8"),
        ("--op attention --seconds nan", "--seconds: expected a finite number"),
        ("--op attention --json {}", "--json: expected a file to write"),
        ("--op attention --backend fast", "--backend: invalid choice: 'fast'"),
    ],
)
def test_bad_arguments_give_one_line(arguments, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure_op", None)  # no work is begun
    status = _status(*BRIEF, *arguments.format(tmp_path).split())
    said = capsys.readouterr()
    assert status == 2 and not said.out
    (line,) = said.err.splitlines()
    assert complaint in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_named(capsys):
    assert _status("--op", "attention", "--shape", "1,2,48,16", "--device", "cuda") == 2
    assert "got cuda, but torch finds no GPU" in capsys.readouterr().err


def test_fresh_processes_that_fail_give_no_figure():
    assert measure.fresh_process_rise_mib(sys.exit, 3, preload="qalign_kernels.bench.ops") is None
