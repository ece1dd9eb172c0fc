"""Attention for Hopper: what it computes, which calls take it, and what the compiler makes of it."""

import contextlib
import itertools
import math
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from qalign_kernels import Segment, _backends

if problem := _backends.triton_problem():
    pytest.skip(problem, allow_module_level=True)

from qalign_kernels._triton import _configs, attention
from qalign_kernels._triton._attention_choice import AttentionCall
from qalign_kernels._triton._launch import recording
from qalign_kernels._triton._segments import LOG2_E, segment_arguments
from tests.gluon_on_cpu import Descriptor, Kernels, Pointer
from tests.project import ROOT
from tests.stubbed import run_over_stub

HOPPER, OTHER = "attention_hopper_kernel", "attention_kernel"
ROWS, BLOCK_N = 128, 64
COMPILED = """
    from benchmarks.static import command as static
    from benchmarks.static.cases import CASES

    jobs, result = [], []
    for dtype in ("bf16", "fp16"):
        cases = [case for case in CASES if case.name in ("attention lse", "attention counts")]
        jobs += static.record(cases, [("sm_90", dtype, dim) for dim in (64, 128)], False)[0]
    jobs = [job for job in jobs if job.kernel.fn.__name__ == "attention_hopper_kernel"]
    for row in static.compile_all(jobs, static.json.loads(static.BUDGETS.read_text()), 1):
        result.append([row.dtype, row.head_dim, row.spill_bytes, row.matrix, row.problems])
"""


class Call(types.SimpleNamespace):
    """A call of the kernel on the CPU: [1 or 2, 2, N, D] features, their gathered counts or None."""

    def __init__(self, queries: int, keys: int, dim: int = 64, *, unique: int | None = None, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        shapes = ((2, 2, queries, dim), (2, 2, keys, dim), (2, 2, keys, dim))
        query, key, value = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
        counts = None
        if unique is not None:
            counts = torch.zeros(2, 1, keys)
            counts[..., :unique] = torch.randint(1, 9, (2, 1, unique), generator=generator).float()
            padded = -(-unique // ROWS) * ROWS
            for x in (key, value):
                x[:, :, unique:padded], x[:, :, padded:] = 0.0, float("nan")
        super().__init__(query=query, key=key, value=value, counts=counts, unique=unique)

    def run(self, *, fixed: bool = True, scale: float = 0.125, shift: float = 0.0, rows=None, match=None):
        """The output and log-sum-exp of the kernel."""
        (batch, heads, queries, dim), keys = self.query.shape, self.key.shape[2]
        output, lse = torch.full(self.query.shape, 9.0), torch.full(self.query.shape[:3], 9.0)
        counted = self.counts is not None
        log_weights = torch.log2(self.counts.clamp(min=1)) if counted else None
        segment = types.SimpleNamespace(
            N_K=keys,
            scale=abs(scale) * LOG2_E.value,
            shift=shift * LOG2_E.value,
            NEGATIVE=scale < 0,
            rows_ptr=None if rows is None else Pointer(rows),
            rows_stride=1,
            rows_number=self.key.shape[0],
            unique_ptr=Pointer(torch.full((2,), self.unique, dtype=torch.int32)) if counted else None,
            log_weights_ptr=Pointer(log_weights.flatten()) if counted else None,
            order_stride_b=1,
            maps=1,
        )
        Kernels(ROOT / "qalign_kernels" / "_triton" / "_attention_hopper.py").launch(
            HOPPER,
            batch * heads * -(-queries // ROWS),
            query=Descriptor(self.query, [1, 1, ROWS // 2, dim]),
            key=Descriptor(self.key, [1, 1, BLOCK_N, dim]),
            value=Descriptor(self.value, [1, 1, BLOCK_N, dim]),
            segment=segment,
            output_ptr=Pointer(output.view(-1)),
            lse_ptr=Pointer(lse.view(-1)),
            lse_unit=math.log(2),
            match_ptr=None if match is None else Pointer(match.flatten()),
            H=heads,
            N_Q=queries,
            FIXED=fixed,
            BLOCK_M=ROWS // 2,
            BLOCK_N=BLOCK_N,
            BUFFERS=2,
        )
        return output, lse

    def expected(self, scale: float = 0.125, shift: float = 0.0, rows=None) -> tuple[Tensor, Tensor]:
        """The same in float64."""
        taken = [0, 1] if rows is None else rows.tolist()
        key, value = (x[taken, :, : self.unique].double() for x in (self.key, self.value))
        logits = scale * self.query.double() @ key.mT + shift
        if self.counts is not None:
            logits += self.counts[..., None, : self.unique].double().log()
        return torch.softmax(logits, -1) @ value, torch.logsumexp(logits, -1)


def _close(call: Call, **settings: Any) -> None:
    reference = {name: x for name, x in settings.items() if name != "fixed"}
    for got, wanted in zip(call.run(**settings), call.expected(**reference)):
        assert (got - wanted).abs().max() < 0.02


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "running"])
@pytest.mark.parametrize(
    "sizes",
    [(128, 256, 64), (200, 300, 64), (70, 65, 128), (300, 64, 128)],
    ids=["whole tiles", "ragged", "half a tile", "one tile"],
)
def test_it_computes_attention(sizes, fixed):
    _close(Call(*sizes), fixed=fixed)
    _close(Call(*sizes), fixed=fixed, scale=-0.125, shift=3.0)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "running"])
@pytest.mark.parametrize("unique", [256, 130, 64, 1])
def test_it_computes_attention_over_counts(unique, fixed):
    _close(Call(140, 320, unique=unique), fixed=fixed)
    _close(Call(140, 320, unique=unique), fixed=fixed, scale=-0.125, shift=-2.0)


def test_no_keys_give_zeros():
    output, lse = Call(130, 256, unique=0).run()
    assert (output == 0).all() and (lse == -math.inf).all()


def test_late_maximum_far_above_the_first_is_exact():
    call = Call(256, 320)
    call.key[:, :, 3] = 40 * call.query[:, :, 100]
    _close(call)
    assert call.expected()[1].max() > 128 * math.log(2)  # beyond float32 with the first tile's maximum


def test_keys_come_from_the_named_batch_row():
    _close(Call(128, 128), rows=torch.tensor([1, 0]))


def test_nan_stays_in_its_query_and_batch_row():
    call = Call(200, 150)
    call.query[0, 0, 5] = float("nan")
    call.value[1], call.key[1] = float("nan"), float("nan")
    nan = call.run()[0].isnan()
    assert nan[1].all() and nan[0, 0, 5].all() and int(nan[0].sum()) == 64


def test_match_of_nan_gives_nan():
    match = torch.zeros(2, 1, 200)
    match[1, 0, 7] = float("nan")
    nan = Call(200, 150).run(match=match)[0].isnan()
    assert nan[1, :, 7].all() and int(nan.sum()) == 128


@pytest.fixture
def listed(monkeypatch):
    """The table lists the kernel for every dtype, head dim and number of tokens that it serves."""
    monkeypatch.setattr(_configs, "triton_minor", lambda: "3.7")
    tile = _configs.Tile(128, 128, 8, 3)
    with contextlib.ExitStack() as tried:
        for mode, dtype, tokens, dim in itertools.product(
            ("softmax hopper", "counted softmax hopper"),
            ("bfloat16", "float16"),
            (1024, 4096, 16384),
            (64, 128),
        ):
            key = _configs.Key("attention", mode, "sm_90", "3.7", dtype, tokens, dim)
            tried.enter_context(_configs.trying(key, tile))
        _configs.listed_tile.cache_clear()
        yield
    _configs.listed_tile.cache_clear()


def _features(
    tokens: int = 1024, dtype=torch.bfloat16, *, dim: int = 64, more: int = 0, offset: int = 0
) -> Tensor:
    """[2, 2, N, D] views as processors have them; rows are `more` elements apart, the first `offset` in."""
    pitch = 2 * dim + more
    flat = torch.empty(offset + 2 * tokens * pitch, dtype=dtype)[offset:]
    return flat.view(2, tokens, pitch)[..., : 2 * dim].unflatten(2, (2, dim)).transpose(1, 2)


def _attended(
    query: Tensor, key: Tensor | None = None, *, target="sm_90", segments=1, **settings
) -> set[str]:
    """The kernels of a call with such segments."""
    key = query if key is None else key
    common = {"scale": 0.125, "contrast": 1.0, "query_labels": settings.get("labels"), "guide": None}
    need_lse = settings.pop("need_lse", False)
    with recording(target) as launches:
        attention.attention(query, [Segment(key, key, **settings)] * segments, need_lse=need_lse, **common)
    return {launch.kernel.fn.__name__ for launch in launches} & {HOPPER, OTHER}


def _launched(query: Tensor, **settings: Any) -> set[str]:
    """The kernel of a launch with such settings."""
    settings = {"output": torch.empty(query.shape, dtype=query.dtype), "lse": None, **settings}
    with recording("sm_90") as launches:
        attention.launch_attention(AttentionCall(query, [segment_arguments(query, query, 0.125)], **settings))
    return {launch.kernel.fn.__name__ for launch in launches}


@pytest.mark.parametrize(
    "query",
    [
        _features(),
        _features(dtype=torch.float16),
        _features(dim=128),
        _features(1001),
        _features(16384),
        _features(more=8),
        _features(offset=8),
        _features().contiguous(),
    ],
    ids=["bf16", "fp16", "wide", "ragged", "many", "pitch", "offset", "contiguous"],
)
def test_taken_for_plain_and_counted_attention(query, listed):
    assert _attended(query) == {HOPPER}
    assert _attended(query, batch_index=torch.zeros(2, dtype=torch.int32)) == {HOPPER}
    assert _attended(query, counts=torch.ones(2, 1, query.shape[2], dtype=torch.int32)) == {HOPPER}
    assert _attended(query, need_lse=True) == {HOPPER}


@pytest.mark.parametrize(
    "query",
    [
        _features(dtype=torch.float32),
        _features(256),
        _features(dim=80),
        _features(more=4),
        _features(offset=4),
        _features(dim=128)[..., ::2],
        _features()[:1].expand(2, -1, -1, -1),
    ],
    ids=["fp32", "few tokens", "80 channels", "pitch", "misaligned", "channels apart", "shared"],
)
def test_not_taken_for_other_features(query, listed):
    assert _attended(query) == {OTHER}


def test_not_taken_for_other_calls(listed):
    query, numbers = _features(), torch.empty(2, 2, 1024)
    labels = torch.ones(2, 1024, dtype=torch.int32)
    assert _attended(query, segments=2) == {OTHER}
    assert _attended(query, labels=labels) == {OTHER}
    assert _launched(query, output=None, lse=numbers) == {OTHER}
    assert _launched(query, known=numbers, contrast=1.5) == {OTHER}
    assert _launched(query, exact_weights=True) == {OTHER}
    assert _launched(query, distance=numbers) == {OTHER}
    assert _attended(query, _features(100)) == {OTHER}


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_100", "sm_103", "sm_120", "gfx942"])
def test_not_taken_on_other_architectures(target, listed):
    assert _attended(_features(), target=target) == {OTHER}


def test_not_taken_without_its_row(listed, monkeypatch):
    key = _configs.Key("attention", "softmax hopper", "sm_90", "3.7", "bfloat16", 1024, 64)
    with _configs.trying(key, None):
        assert _attended(_features()) == {OTHER}
        assert _attended(_features(), counts=torch.ones(2, 1, 1024, dtype=torch.int32)) == {HOPPER}
    assert _attended(_features()) == {HOPPER}
    monkeypatch.setattr(_configs, "triton_minor", lambda: "3.9")
    _configs.listed_tile.cache_clear()
    assert _attended(_features()) == {OTHER}


@pytest.mark.slow
def test_the_interpreter_needs_no_gluon():
    code = """
import sys, torch
from qalign_kernels import Segment, attention
x = torch.randn(1, 2, 300, 64, dtype=torch.float16)
output = attention(x, Segment(x, x), backend="triton")
wanted = torch.nn.functional.scaled_dot_product_attention(*[x.float()] * 3)
assert (output.float() - wanted).abs().max() < 0.01
assert "qalign_kernels._triton._attention_hopper" not in sys.modules
"""
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


@pytest.mark.slow
def test_it_compiles_without_spills(tmp_path):
    rows = run_over_stub(COMPILED, tmp_path)
    assert {(row[0], row[1]) for row in rows} == {(x, d) for x in ("bf16", "fp16") for d in (64, 128)}
    assert all(row[2:] == [0, "HGMMA", []] for row in rows), rows


def test_tensors_are_read_by_batch_row_and_head():
    from qalign_kernels._triton import _attention_hopper

    made = _attention_hopper.descriptor(_features(1000, more=64), 128)
    assert (made.shape, made.strides) == ([2, 2, 1000, 64], [192000, 64, 192, 1])
    assert made.block_shape == [1, 1, 128, 64]
