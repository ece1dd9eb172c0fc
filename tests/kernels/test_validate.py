"""The judges, the data they are given, and the command that a GPU owner runs first."""

import json
import math

import pytest
import torch

from qalign_kernels.reference.similarity import scores, similarity_argmax
from qalign_kernels.testing import (
    error_budget,
    judge,
    judge_exact,
    judge_formula,
    judge_match,
    matched_queries,
    poisoned_memory,
    random_features,
    random_integers,
    worst_error,
)
from qalign_kernels.validation import command as validate


def test_worst_error_knows_nan_and_infinity():
    truth = torch.tensor([1.0, -math.inf, 2.0]).double()
    assert worst_error(truth.float(), truth) == 0
    assert worst_error(torch.tensor([1.5, -math.inf, 2.0]), truth) == 0.5
    for wrong in (
        [1.0, math.inf, 2.0],
        [1.0, 0.0, 2.0],
        [math.nan, -math.inf, 2.0],
        [1.0, -math.inf, math.inf],
    ):
        assert worst_error(torch.tensor(wrong), truth) == math.inf
    assert worst_error(torch.ones(2), torch.ones(3)) == math.inf


def test_budget_grows_with_dtype_and_reduction():
    truth = torch.linspace(-4, 4, 50).double()
    budgets = [
        error_budget(truth.to(dtype), truth, 100) for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
    assert budgets[0] < budgets[1] < budgets[2] and budgets[0] < 1e-5
    assert error_budget(truth.float(), truth, 10000) > budgets[0]


def test_judge_tells_right_answers_from_wrong_ones():
    query, key = (random_features(1, 2, n, 40, seed=n) for n in (9, 13))
    formula = lambda q, k: (q @ k.mT).softmax(-1)  # noqa: E731
    right = formula(query, key)
    assert judge_formula(right, formula, query, key, reduction=40).passed
    assert not judge_formula(right + 1e-4, formula, query, key, reduction=40).passed
    assert not judge(right.masked_fill(right == right.max(), math.nan), right, right.double(), 40).passed
    assert judge_exact(right, right).passed and not judge_exact(right + 1e-7, right).passed


def test_judge_match_rejects_every_kind_of_wrong_match():
    reference = random_features(1, 1, 30, 32, seed=0)
    query, index = matched_queries(reference, 12, seed=1)
    tables = [
        scores(q, r, "cosine", False) for q, r in ((query, reference), (query.double(), reference.double()))
    ]
    found, score = similarity_argmax(query, reference, "cosine", False)
    assert torch.equal(found, index) and judge_match(found, score, *tables, 32).passed

    def verdict(at, value, of_score=False):
        wrong_index, wrong_score = found.clone(), score.clone()
        (wrong_score if of_score else wrong_index)[0, 0, at] = value
        return judge_match(wrong_index, wrong_score, *tables, 32).passed

    other = (int(index[0, 0, 3]) + 1) % 30
    assert not any(
        (verdict(3, other), verdict(3, -1), verdict(3, 30), verdict(3, 0.5, True), verdict(3, math.nan, True))
    )
    slightly = float(score[0, 0, 3]) * (1 + 2**-16)
    assert not verdict(3, slightly, True)
    changed = score.clone()
    changed[0, 0, 3] = slightly
    assert judge_match(found, changed, *tables, 32, packed=True).passed


def test_judge_match_rejects_a_token_chosen_twice():
    table = torch.tensor([[[[3.0, 3.0, 1.0]]]])
    index, score = torch.tensor([[[[0, 0]]]], dtype=torch.int32), torch.tensor([[[[3.0, 3.0]]]])
    assert not judge_match(index, score, table, table.double(), 1).passed
    index[..., 1] = 1
    assert judge_match(index, score, table, table.double(), 1).passed


def test_matched_queries_have_clear_margins():
    for heads in (1, 4):
        reference = random_features(2, heads, 200, 32, seed=2)
        query, index = matched_queries(reference, 300, seed=3)
        best = scores(query.double(), reference.double(), "cosine", False).topk(2)
        assert torch.equal(best.indices[..., 0].int(), index.expand(-1, heads, -1))
        assert float((best.values[..., 0] - best.values[..., 1]).min()) > 0.05


def test_random_data_are_the_same_in_every_dtype():
    assert torch.equal(
        random_features(3, 4, seed=5, dtype=torch.float16), random_features(3, 4, seed=5).half()
    )
    drawn = random_integers(-1, 4, 200, seed=6)
    assert drawn.dtype == torch.int32 and int(drawn.min()) == -1 and int(drawn.max()) == 3


def test_poisoned_memory_fills_unwritten_parts_then_is_restored():
    mode = torch.get_deterministic_debug_mode()
    with pytest.raises(KeyError), poisoned_memory():
        like = torch.zeros(3, dtype=torch.bfloat16)
        for x in (
            torch.empty(4),
            torch.empty_like(like),
            like.new_empty(2, 2),
            torch.empty_strided((2, 2), (1, 2)),
        ):
            assert bool(x.isnan().all())
        assert torch.empty(3, dtype=torch.int32).tolist() == [2**31 - 1] * 3
        raise KeyError
    assert torch.get_deterministic_debug_mode() == mode


def test_an_op_that_leaves_memory_unwritten_fails(monkeypatch, capsys):
    from qalign_kernels.tiled import probe

    def lazy(query, key, *, scale):
        result = query.new_empty(query.shape[0], query.shape[2], key.shape[2])
        whole = (scale * query @ key.mT).softmax(-1).mean(1)
        result[:, :-1] = whole[:, :-1]  # the last row is forgotten
        return result

    monkeypatch.setattr(probe, "mean_attention_map", lazy)
    assert (
        validate.main(
            [
                "--backend",
                "tiled",
                "--dtype",
                "float32",
                "--device",
                "cpu",
                "--op",
                "mean_attention_map",
                "--quick",
            ]
        )
        == 1
    )
    assert "FAILED" in capsys.readouterr().out


def test_the_table_and_the_file(tmp_path, capsys):
    file = tmp_path / "rows.json"
    arguments = [
        "--backend",
        "tiled",
        "--device",
        "cpu",
        "--quick",
        "--op",
        "label_mass",
        "attention labels",
        "--json",
        str(file),
    ]
    assert validate.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("qalign_kernels ") and lines[2].split() == [
        "op", "backend", "dtype", "cases", "error", "budget", "error/budget", "verdict", "time_s",
    ]  # fmt: skip
    rows = json.loads(file.read_text())["rows"]
    assert {row["op"] for row in rows} == {
        "label_mass",
        "label_mass gradient",
        "attention labels",
        "attention labels gradient",
    }
    assert {row["dtype"] for row in rows} == {"float32", "float16", "bfloat16"}
    assert all(row["passed"] and row["cases"] > 0 and row["error"] <= row["budget"] for row in rows)
    assert sum(" ok " in line for line in lines) == len(rows)


def test_wrong_op_fails_and_shows_its_case(monkeypatch, capsys):
    from qalign_kernels.tiled import rearrange

    monkeypatch.setattr(
        rearrange, "match_counts", lambda index, num_tokens: index.new_ones((*index.shape[:2], num_tokens))
    )
    assert (
        validate.main(["--backend", "tiled", "--dtype", "float32", "--device", "cpu", "--op", "match_counts"])
        == 1
    )
    output = capsys.readouterr().out
    assert "FAILED match_counts, tiled, float32, B=1 H=2 N_q=33 N_k=70" in output and "... and" in output


def test_an_op_that_raises_fails_and_says_what(monkeypatch, capsys):
    from qalign_kernels.tiled import similarity

    def raises(*_):
        raise ArithmeticError("no\nluck")

    monkeypatch.setattr(similarity, "similarity_argmax", raises)
    arguments = [
        "--backend",
        "tiled",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--quick",
        "--op",
        "similarity_argmax",
    ]
    assert validate.main(arguments) == 1
    assert "ArithmeticError: no luck\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "cuda"], "--backend"),
        (["--dtype", "int8"], "--dtype"),
        (["--op", "convolution"], "--op: expected the start of one of similarity_argmax, "),
        (["--device", "tpu"], "--device"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_arguments_end_with_two(arguments, message, capsys):
    try:
        status = validate.main(arguments)
    except SystemExit as refusal:
        status = refusal.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and message in line


def test_every_public_op_has_its_rows():
    import qalign_kernels

    ops = [name for name in qalign_kernels.__all__ if name[0].islower() and name != "use_backend"]
    assert all(any(row.split()[0] == name for row in validate.OPS) for name in ops)
    learned = (
        "rearrange_kv",
        "attention",
        "attention_with_lse",
        "distillation_loss",
        "label_mass",
        "mean_attention_map",
    )
    assert all(f"{name} gradient" in validate.OPS for name in learned)


def test_triton_runs_in_its_interpreter_without_a_gpu(capsys):
    from qalign_kernels import _backends

    if _backends.triton_problem() or not _backends.interpreted():
        pytest.skip("Triton is absent, or not interpreted here")
    assert (
        validate.main(
            ["--backend", "triton", "--device", "cpu", "--quick", "--op", "match_counts", "attention labels"]
        )
        == 0
    )
    output = capsys.readouterr().out
    assert (
        "in its interpreter" in output
        and "triton    float16" in output
        and "triton    bfloat16" not in output
    )
