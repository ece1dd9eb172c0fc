"""The joint argmax for Hopper: which calls take it, and what the compiler makes of it."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from qalign_kernels import _backends

if problem := _backends.triton_problem():
    pytest.skip(problem, allow_module_level=True)

from qalign_kernels._triton import _configs, similarity
from qalign_kernels._triton._launch import recording
from tests.project import ROOT
from tests.stubbed import run_over_stub

HOPPER, OTHER = "joint_argmax_hopper_kernel", "_similarity_argmax_kernel"
COMPILED = """
    from benchmarks.static import command as static
    from benchmarks.static.cases import CASES

    jobs, result = [], []
    for dtype in ("bf16", "fp16"):
        cases = [case for case in CASES if case.name == "similarity_argmax cosine joint exact"]
        jobs += static.record(cases, [("sm_90", dtype, 64)], False)[0]
    jobs = [job for job in jobs if "hopper" in job.kernel.fn.__name__]
    for row in static.compile_all(jobs, static.json.loads(static.BUDGETS.read_text()), 1):
        result.append([row.dtype, row.spill_bytes, row.matrix, row.problems])
"""


@pytest.fixture(autouse=True)
def triton_that_is_listed(monkeypatch):
    _configs.listed_tile.cache_clear()
    monkeypatch.setattr(_configs, "triton_minor", lambda: "3.7")
    yield
    _configs.listed_tile.cache_clear()


def _features(
    tokens: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
    *,
    batch: int = 2,
    heads: int = 2,
    dim: int = 64,
    more: int = 0,
    offset: int = 0,
) -> Tensor:
    """[B, H, N, D] views as processors have them; rows are `more` elements apart, the first `offset` in."""
    pitch = heads * dim + more
    flat = torch.empty(offset + batch * tokens * pitch, dtype=dtype)[offset:]
    return flat.view(batch, tokens, pitch)[..., : heads * dim].unflatten(2, (heads, dim)).transpose(1, 2)


def _launched(query: Tensor, reference: Tensor | None = None, *, target="sm_90", joint=True, **settings):
    reference = query if reference is None else reference
    with recording(target) as launches:
        similarity.similarity_argmax(query, reference, "cosine", joint, **settings)
    return {launch.kernel.fn.__name__ for launch in launches} & {HOPPER, OTHER}


@pytest.mark.parametrize(
    "query",
    [
        _features(),
        _features(dtype=torch.float16),
        _features(1000),
        _features(4096, batch=1),
        _features(more=64),
        _features(dim=40, heads=8),
        _features(offset=8),
    ],
    ids=["bf16", "fp16", "ragged", "many", "pitch", "folded", "offset"],
)
def test_taken_where_tokens_are_rows_of_a_matrix(query):
    assert _launched(query) == {HOPPER}
    assert _launched(query, batch_index=torch.zeros(len(query), dtype=torch.int32)) == {HOPPER}


@pytest.mark.parametrize(
    "query",
    [
        _features(dtype=torch.float32),
        _features(100),
        _features(heads=1),
        _features(dim=40),
        _features().contiguous(),
        _features(more=4),
        _features(offset=4),
        _features(dim=128)[..., ::2],
    ],
    ids=[
        "fp32",
        "few tokens",
        "64 channels",
        "80 channels",
        "heads apart",
        "pitch",
        "misaligned",
        "channels apart",
    ],
)
def test_not_taken_for_other_features(query):
    assert _launched(query) == {OTHER}


def test_not_taken_where_batch_is_no_single_matrix():
    flat = torch.empty(2 * 1024 * 128 + 64, dtype=torch.bfloat16)
    apart = flat.as_strided((2, 2, 1024, 64), (1024 * 128 + 64, 64, 128, 1))
    assert _launched(apart) == {OTHER} and _launched(apart[:1]) == {HOPPER}


def test_not_taken_for_fewer_keys_than_a_tile():
    assert _launched(_features(), _features(127)) == {OTHER}
    assert _launched(_features(), _features(128)) == {HOPPER}


def test_not_taken_for_labels_or_single_heads():
    labels = torch.ones(2, 1024, dtype=torch.int32)
    assert _launched(_features(), query_labels=labels, reference_labels=labels) == {OTHER}
    assert _launched(_features(), joint=False) == {OTHER}


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_100", "sm_103", "sm_120", "gfx942"])
def test_not_taken_on_other_architectures(target):
    assert _launched(_features(), target=target) == {OTHER}


def test_not_taken_under_a_triton_without_rows(monkeypatch):
    monkeypatch.setattr(_configs, "triton_minor", lambda: "3.9")
    assert _launched(_features()) == {OTHER}


def test_not_taken_while_its_row_is_away():
    key = _configs.Key("similarity", "joint hopper", "sm_90", "3.7", "bfloat16", 1024, 64)
    with _configs.trying(key, None):
        assert _launched(_features()) == {OTHER}
    assert _launched(_features()) == {HOPPER}


def test_counted_matches_take_it():
    with recording("sm_90") as launches:
        similarity.counted_argmax(_features(), _features(), "cosine", True)
    assert launches[-1].kernel.fn.__name__ == HOPPER and launches[-1].arguments["counts_ptr"] is not None


@pytest.mark.slow
def test_the_interpreter_needs_no_gluon():
    code = """
import sys, torch
from qalign_kernels import similarity_argmax
x = torch.randn(1, 300, 2, 64, dtype=torch.float16).transpose(1, 2)
assert (similarity_argmax(x, x, backend="triton").index == torch.arange(300)).all()
assert "qalign_kernels._triton._joint_hopper" not in sys.modules
"""
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


@pytest.mark.slow
def test_it_compiles_without_spills(tmp_path):
    rows = run_over_stub(COMPILED, tmp_path)
    assert sorted(row[0] for row in rows) == ["bf16"] * 2 + ["fp16"] * 2
    assert all(row[1:] == [0, "HGMMA", []] for row in rows), rows


def test_queries_are_read_as_rows_across_the_batch():
    from qalign_kernels._triton import _joint_hopper

    made = _joint_hopper.descriptor(_features(1000, batch=3, more=64), 128)
    assert (made.shape, made.strides, made.block_shape) == ([3000, 128], [192, 1], [128, 64])
    shared = _features(1000, batch=1).expand(3, -1, -1, -1)
    assert _joint_hopper.descriptor(shared, 128).shape == [1000, 128]
