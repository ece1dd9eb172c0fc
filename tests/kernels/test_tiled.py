"""What the tiled path alone has: blocks of any size, the fused route, gradients, memory without N×N.

Every call of an op meets blocks of several sizes, several dtypes and both routes. Each known way to go
wrong is a named risk. Property tests draw further calls from the whole space, the same in every run.
"""
# above 400 lines: all of it draws on one table of calls and ways

import functools
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn.functional import scaled_dot_product_attention as sdpa

import qalign_kernels as qk
from qalign_kernels.attention import Guide, guided_attention
from qalign_kernels.qalign_attention import topk_attention
from qalign_kernels.testing import judge, judge_exact, random_features, random_integers
from qalign_kernels.tiled import _fused
from qalign_kernels.tiled import _labels as tiled_labels
from tests.kernels.ways import BLOCK_BYTES, HEADS, RAGGED, ROW, WAYS, WHOLE, Way

pytestmark = pytest.mark.usefixtures("poisoned")
SMALL = {"q": (2, 3, 13, 8), "r": (2, 3, 21, 8), "k": (2, 3, 21, 8), "v": (2, 3, 21, 8)}
# `poisoned` holds for all examples of a test alike
SAME_IN_EVERY_RUN = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(params=BLOCK_BYTES)
def block_bytes(request):
    with Way(request.param).taken():
        yield


@pytest.fixture
def ragged():
    with Way(RAGGED).taken():
        yield


def features(*shapes, dtype=torch.float64):
    return [random_features(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def learned(tensors, dtype=None):
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]


def attention_cases(dtype):
    """Calls of attention by name: tensors [query, *keys, *values], what each segment adds, settings."""
    query, key, value, key2, value2, wide = features(
        SMALL["q"], SMALL["k"], SMALL["v"], (2, 3, 70, 8), (2, 3, 70, 8), (2, 3, 21, 11), dtype=dtype
    )
    one, two = [query, key, value], [query, key, key2, value, value2]
    counts, per_head, few = (
        random_integers(0, high, 2, g, n, seed=g) for high, g, n in ((3, 1, 21), (3, 3, 21), (2, 1, 70))
    )
    labels, key_labels, key2_labels = (1 << random_integers(0, 4, 2, n, seed=n) for n in (13, 21, 70))
    crossed, shared = torch.tensor([[1, 0], [1, 1]], dtype=torch.int32)
    none_counted = torch.stack([torch.zeros_like(counts[0]), counts[1]])
    no_first_head = torch.cat([torch.zeros_like(counts), per_head[:, 1:]], 1)
    return {
        "plain": (one, [{}], {}),
        "counts": (one, [{"counts": counts}], {}),
        "per-head counts": (one, [{"counts": per_head}], {}),
        "shifted counts": (one, [{"counts": counts, "logit_scale": 1.4, "logit_shift": -0.3}], {}),
        "no counted key": (one, [{"counts": none_counted}], {}),
        "no counted key in one head": (one, [{"counts": no_first_head}], {}),
        "wide values": ([query, key, wide], [{"counts": counts}], {"scale": -0.7}),
        "labels": (one, [{"labels": key_labels}], {"query_labels": labels}),
        "empty rows": (one, [{"labels": key_labels[:1] & 3}], {"query_labels": labels}),
        "crossed batch": (one, [{"counts": counts, "batch_index": crossed}], {}),
        "shared batch row": (
            one,
            [{"counts": per_head, "batch_index": shared, "logit_scale": 1.3}],
            {"contrast": 1.67},
        ),
        "shared keys": (one, [{"batch_index": shared}], {}),
        "contrast": (one, [{}], {"contrast": 1.67}),
        "flattening contrast": (
            one,
            [{"counts": counts, "labels": key_labels}],
            {"contrast": 0.6, "query_labels": labels},
        ),
        "segments": (
            two,
            [
                {"counts": counts, "logit_scale": 1.4, "logit_shift": -0.3},
                {"labels": key2_labels, "batch_index": shared},
            ],
            {"query_labels": labels[:1]},
        ),
        "contrasted segments": (
            two,
            [{"counts": per_head, "labels": key_labels}, {"counts": few, "logit_shift": 0.5}],
            {"query_labels": labels, "contrast": 1.67},
        ),
    }


CASES = list(attention_cases(torch.float32))


def attend(tensors, additions, settings, backend="tiled", op=qk.attention):
    query, keys, values = tensors[0], tensors[1 : 1 + len(additions)], tensors[1 + len(additions) :]
    return op(
        query,
        [qk.Segment(k, v, **more) for k, v, more in zip(keys, values, additions)],
        **settings,
        backend=backend,
    )


class Call(NamedTuple):
    """A call of attention: tensors [query, *keys, *values], what each segment adds, settings."""

    tensors: list[torch.Tensor]
    additions: list[dict[str, Any]]
    settings: dict[str, Any]

    def result(self, backend, dtype, op=qk.attention_with_lse):
        return attend([x.to(dtype) for x in self.tensors], self.additions, self.settings, backend, op)

    def gradients(self, backend, dtype, op=qk.attention_with_lse):
        """Of a loss on the output, and on the log-sum-exp where `op` returns one."""
        tensors = learned(self.tensors, dtype)
        result = attend(tensors, self.additions, self.settings, backend, op)
        output, lse = (result, None) if isinstance(result, torch.Tensor) else result
        loss = (output * random_features(*output.shape, seed=9, dtype=dtype)).sum()
        if lse is not None:
            loss = loss + lse[lse.isfinite()].sin().sum()
        return torch.autograd.grad(loss, tensors)


def assert_attention_is_its_formula(call, dtype, way):
    truth, plain = call.result("reference", torch.float64), call.result("reference", dtype)
    with way.taken():
        actual, alone = call.result("tiled", dtype), call.result("tiled", dtype, qk.attention)
    assert actual.output.dtype == alone.dtype == dtype
    assert judge(actual.output, plain.output, truth.output, reduction=91).passed
    assert judge(actual.lse, plain.lse, truth.lse, reduction=91).passed
    assert judge(alone, plain.output, truth.output, reduction=91).passed


def assert_gradients_are_those_of_the_formula(call, dtype, way):
    for op in (qk.attention, qk.attention_with_lse):
        truth = call.gradients("reference", torch.float64, op)
        plain = call.gradients("reference", dtype, op)
        with way.taken():
            actual = call.gradients("tiled", dtype, op)
        for ours, yardstick, true in zip(actual, plain, truth):
            assert ours.dtype == dtype
            assert judge(ours, yardstick, true, reduction=91).passed


F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
RISKS = {
    "the fused route in blocks of a row": ("plain", F32, Way(ROW)),
    "the fused route has no log-sum-exp in bfloat16": ("plain", BF16, Way(WHOLE)),
    "a device in double precision": ("plain", F64, Way(RAGGED, "device")),
    "keys that are not counted are left out": ("counts", F32, Way(ROW)),
    "counts that no host reads": ("counts", BF16, Way(RAGGED, "device")),
    "a shift in the log-sum-exp of the fused route": ("shifted counts", F32, Way(RAGGED)),
    "log-counts in double precision": ("per-head counts", F64, Way(WHOLE)),
    "heads count other keys": ("per-head counts", F32, Way(RAGGED)),
    "blocks of some heads take their counts": ("per-head counts", F64, Way(HEADS, "device")),
    "a batch row counts no key": ("no counted key", F32, Way(WHOLE)),
    "a batch row counts no key, unread": ("no counted key", BF16, Way(ROW, "device")),
    "a head counts no key": ("no counted key in one head", F32, Way(RAGGED)),
    "a head counts no key, unread": ("no counted key in one head", F32, Way(HEADS, "device")),
    "values wider than keys": ("wide values", F32, Way(HEADS)),
    "queries of one label set together": ("labels", F32, Way(RAGGED)),
    "labels compared block by block": ("labels", BF16, Way(HEADS, "device")),
    "queries that see no key": ("empty rows", F32, Way(ROW)),
    "queries that see no key, unread": ("empty rows", BF16, Way(RAGGED, "device")),
    "batch rows crossed": ("crossed batch", F32, Way(HEADS)),
    "batch rows crossed, unread": ("crossed batch", F64, Way(RAGGED, "device")),
    "two batch rows add to one": ("shared batch row", F32, Way(RAGGED)),
    "two batch rows add to one, unread": ("shared batch row", BF16, Way(WHOLE, "device")),
    "two batch rows add to one on the fused route": ("shared keys", F32, Way(WHOLE)),
    "a contrast clips": ("contrast", F32, Way(RAGGED)),
    "a contrast rounds its weights": ("contrast", BF16, Way(HEADS)),
    "a contrast below one gives hidden keys nothing": ("flattening contrast", F32, Way(HEADS)),
    "a contrast below one, unread": ("flattening contrast", F32, Way(ROW, "device")),
    "one segment with labels, one without": ("segments", F32, Way(RAGGED)),
    "segments of other sizes in blocks": ("segments", BF16, Way(HEADS, "device")),
    "a contrast counts the keys of both segments": ("contrasted segments", F32, Way(RAGGED)),
    "a contrast over segments in ragged blocks of rows": ("contrasted segments", F64, Way(RAGGED, "device")),
    "two segments row by row": ("segments", F64, Way(ROW, "device")),
}


@pytest.mark.parametrize("risk", RISKS)
def test_attention_is_its_formula(risk):
    case, dtype, way = RISKS[risk]
    assert_attention_is_its_formula(Call(*attention_cases(dtype)[case]), dtype, way)


@pytest.mark.parametrize("risk", RISKS)
def test_gradients_are_those_of_the_formula(risk):
    case, dtype, way = RISKS[risk]
    assert_gradients_are_those_of_the_formula(Call(*attention_cases(dtype)[case]), dtype, way)


def test_every_case_of_attention_is_a_risk():
    assert {case for case, *_ in RISKS.values()} == set(CASES)


@st.composite
def attention_calls(draw):
    """Draw a call of attention, each option on its own. Every second call may take the fused route."""
    fused, additions = draw(st.booleans()), []
    width = 8 if fused else draw(st.sampled_from((8, 11)))
    shapes = [(2, 3, 21), (2, 3, 70)][: 1 if fused else draw(st.integers(1, 2))]
    for number, (*_, tokens) in enumerate(shapes):
        addition: dict[str, Any] = {
            "logit_scale": draw(st.sampled_from((1.0, 1.4))),
            "logit_shift": draw(st.sampled_from((0.0, -0.3, 0.5))),
        }
        if draw(st.booleans()):
            counts = random_integers(0, 3, 2, draw(st.sampled_from((1, 3))), tokens, seed=number)
            # nothing counted in a batch row, or in some of its heads
            counts[: draw(st.integers(0, 1)), : draw(st.integers(1, 3))] = 0
            addition["counts"] = counts
        if not fused and draw(st.booleans()):
            labels = 1 << random_integers(0, 4, draw(st.sampled_from((1, 2))), tokens, seed=tokens)
            addition["labels"] = labels & draw(st.sampled_from((15, 3)))  # with 3, some queries see nothing
        rows = draw(st.sampled_from((None, (1, 0), (1, 1))))
        if rows is not None:
            addition["batch_index"] = torch.tensor(rows, dtype=torch.int32)
        additions.append(addition)
    chosen: dict[str, Any] = {"contrast": 1.0 if fused else draw(st.sampled_from((1.0, 1.67, 0.6)))}
    if draw(st.booleans()):
        chosen["scale"] = -0.7
    if any("labels" in addition for addition in additions):
        chosen["query_labels"] = 1 << random_integers(0, 4, draw(st.sampled_from((1, 2))), 13, seed=13)
    keys, values = ([(*shape, size) for shape in shapes] for size in (8, width))
    return Call(features(SMALL["q"], *keys, *values), additions, chosen)


@settings(SAME_IN_EVERY_RUN, max_examples=100)
@given(attention_calls(), st.sampled_from((F64, F32, BF16)), WAYS)
def test_any_attention_is_its_formula(call, dtype, way):
    rounded = call._replace(tensors=[x.to(dtype) for x in call.tensors])
    assert_attention_is_its_formula(rounded, dtype, way)


@settings(SAME_IN_EVERY_RUN, max_examples=40)
@given(attention_calls(), st.sampled_from((F64, F32, BF16)), WAYS)
def test_any_gradients_are_those_of_the_formula(call, dtype, way):
    rounded = call._replace(tensors=[x.to(dtype) for x in call.tensors])
    assert_gradients_are_those_of_the_formula(rounded, dtype, way)


@pytest.mark.parametrize("case", CASES)
def test_attention_gradcheck(case):
    tensors, *call = attention_cases(torch.float64)[case]

    def finite(op, *tensors):
        result = attend(tensors, *call, op=op)
        return (
            result
            if isinstance(result, torch.Tensor)
            else (result.output, result.lse.masked_fill(result.lse == float("-inf"), 0))
        )

    for op in (qk.attention, qk.attention_with_lse):
        for route in ("host", "device"):
            with Way(RAGGED, route).taken():
                assert gradcheck(functools.partial(finite, op), learned(tensors), fast_mode=True)


def test_attention_gradcheck_of_every_element(ragged):
    tensors = learned(features((1, 2, 3, 4), (1, 2, 6, 4), (1, 2, 5, 4), (1, 2, 6, 3), (1, 2, 5, 3)))
    additions = [
        {"counts": random_integers(0, 3, 1, 2, 6, seed=1), "logit_scale": 0.7},
        {"labels": random_integers(1, 4, 1, 5, seed=2)},
    ]
    settings = {"contrast": 1.67, "query_labels": random_integers(1, 4, 1, 3, seed=3)}
    assert gradcheck(lambda *tensors: attend(tensors, additions, settings), tensors)


@pytest.mark.parametrize("contrast", [1.0, 1.67])
@pytest.mark.parametrize("batch_index", [None, torch.tensor([1, 1], dtype=torch.int32)])
def test_guided_attention_gradcheck(contrast, batch_index, ragged):
    counts = random_integers(0, 3, 2, 1, 21, seed=1)
    tensors = learned(features(SMALL["q"], SMALL["k"], SMALL["v"], (2, 3, 13, 5), (2, 3, 21, 5)))

    def guided(query, key, value, guide_query, guide_key, backend="tiled"):
        segment = qk.Segment(key, value, counts=counts, batch_index=batch_index)
        return guided_attention(
            query, segment, Guide(guide_query, guide_key, 1.5), contrast=contrast, backend=backend
        )

    truth = guided(*tensors, backend="reference")
    assert judge(guided(*tensors), truth, truth, reduction=21).passed
    assert gradcheck(guided, tensors, fast_mode=True)


@pytest.mark.parametrize("counted", [False, True])
def test_label_mass_gradcheck(counted, ragged):
    classes, counts = (
        random_integers(0, 4, 2, 21, seed=1),
        random_integers(0, 3, 2, 1, 21, seed=2) if counted else None,
    )
    tensors = learned(features(SMALL["q"], SMALL["k"]))
    assert gradcheck(
        lambda q, k: qk.label_mass(q, k, classes, 4, counts=counts, backend="tiled"), tensors, fast_mode=True
    )


def test_mean_attention_map_gradcheck():
    assert gradcheck(
        lambda q, k: qk.mean_attention_map(q, k, backend="tiled"),
        learned(features(SMALL["q"], SMALL["k"])),
        fast_mode=True,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"similarity": "dot", "heads": "per_head"},
        {"batch_index": torch.tensor([1, 1], dtype=torch.int32)},
    ],
)
def test_similarity_score_gradcheck(settings):
    tensors = learned(features(SMALL["q"], SMALL["r"]))
    assert gradcheck(
        lambda q, r: qk.similarity_argmax(q, r, **settings, backend="tiled").score, tensors, fast_mode=True
    )
    assert gradcheck(
        lambda q, r: qk.similarity_topk(q, r, 3, **settings, backend="tiled").score, tensors, fast_mode=True
    )


REFINEMENTS = ("rearranged", "guided", "topk", "warped_values", "warped_output", "soft", "none")


def refined(tensors, backend, refinement, contrast=1.0, rows=None, labelled=False):
    query, ref_query, key, value, own_key = tensors
    labels = [1 << random_integers(0, 4, 2, n, seed=n) if labelled else None for n in (13, 21)]
    return qk.qalign_attention(
        query,
        ref_query,
        key,
        value,
        refinement=refinement,
        own_key=own_key if refinement == "warped_values" else None,
        topk=4,
        strength=2.0,
        contrast=contrast,
        query_labels=labels[0],
        ref_labels=labels[1],
        batch_index=None if rows is None else torch.tensor(rows, dtype=torch.int32),
        backend=backend,
    )


def assert_refined_gradients(*options):
    """Check the gradients against the formula; return the tensors that have one."""
    tensors = learned(features(SMALL["q"], SMALL["r"], SMALL["k"], SMALL["v"], SMALL["q"]))
    weight = random_features(*SMALL["q"], seed=9, dtype=torch.float64)
    actual, truth = (
        torch.autograd.grad((refined(tensors, b, *options) * weight).sum(), tensors, allow_unused=True)
        for b in ("tiled", "reference")
    )
    for ours, true in zip(actual, truth):
        assert (ours is None) == (true is None)
        assert ours is None or judge(ours, true, true, reduction=21).passed
    return tensors


@pytest.mark.parametrize("options", [(), (1.67, (1, 1), True)], ids=["plain", "all options"])
@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_qalign_attention_gradients(refinement, options, ragged):
    tensors = assert_refined_gradients(refinement, *options)
    assert gradcheck(lambda *x: refined(x, "tiled", refinement, *options), tensors, fast_mode=True)


@settings(SAME_IN_EVERY_RUN, max_examples=30)
@given(
    st.sampled_from(REFINEMENTS),
    st.sampled_from((1.0, 1.67)),
    st.sampled_from((None, (1, 0), (1, 1))),
    st.booleans(),
    st.sampled_from(BLOCK_BYTES),
)
def test_any_qalign_attention_gradients(refinement, contrast, rows, labelled, block_bytes):
    with Way(block_bytes).taken():
        assert_refined_gradients(refinement, contrast, rows, labelled)


@pytest.mark.parametrize("contrast", [1.0, 1.67])
def test_stride_0(contrast, ragged):
    query, key, value = learned(features((1, 3, 13, 8), (1, 3, 1, 8), (1, 1, 21, 8)))

    def call(query, key, value, layout=lambda x: x):
        query, key, value = map(
            layout, (query.expand(2, -1, -1, -1), key.expand(2, -1, 21, -1), value.expand(2, 3, -1, -1))
        )
        return qk.attention(query, qk.Segment(key, value), contrast=contrast, backend="tiled")

    truth = call(query, key, value, torch.clone)
    assert judge(call(query, key, value), truth, truth, reduction=21).passed
    assert gradcheck(call, [query, key, value], fast_mode=True)


def test_only_what_asks_gets_a_gradient(ragged):
    query, key, value = features(SMALL["q"], SMALL["k"], SMALL["v"], dtype=torch.float32)
    key.requires_grad_()
    qk.attention(query, qk.Segment(key, value), contrast=1.67, backend="tiled").sum().backward()
    assert key.grad is not None and query.grad is None and value.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fused_route_is_sdpa_bit_by_bit(dtype):
    query, key, value = features((3, 2, 70, 40), (2, 2, 90, 40), (2, 2, 90, 40), dtype=dtype)
    rows, ones = torch.tensor([1, 0, 1], dtype=torch.int32), torch.ones(3, 1, 90, dtype=torch.int32)
    expected = sdpa(query, key[rows.long()], value[rows.long()], scale=0.2 * 1.5)
    for counts in (None, ones):
        segment = qk.Segment(key, value, counts=counts, batch_index=rows, logit_scale=1.5, logit_shift=3.0)
        assert torch.equal(qk.attention(query, segment, scale=0.2, backend="tiled"), expected)


@pytest.mark.parametrize("route", ["host", "device"])
def test_absent_keys_are_never_read(route):
    query, key, value = features(SMALL["q"], SMALL["k"], SMALL["v"], dtype=torch.float32)
    counts = random_integers(0, 2, 2, 3, 21, seed=1)
    absent = (counts == 0).unsqueeze(-1)
    for op in (qk.attention, qk.attention_with_lse):
        with Way(RAGGED, route).taken():
            clean, dirty = (
                attend(
                    [query, *(x.masked_fill(absent, fill) for x in (key, value))],
                    [{"counts": counts}],
                    {},
                    op=op,
                )
                for fill in (0, float("nan"))
            )
        for ours, expected in zip(dirty, clean):
            assert torch.equal(ours, expected)


def assert_matches_are_exact(k, heads, labelled, way, rows=(1, 0)):
    # whole numbers: every sum is exact, so that ties are many and their order is part of the answer
    query, reference = (random_integers(-1, 2, 2, 2, n, 5, seed=n).float() for n in (11, 150))
    options = {"similarity": "dot", "heads": heads, "batch_index": torch.tensor(rows, dtype=torch.int32)}
    if labelled:
        options["query_labels"] = 1 << random_integers(0, 3, 2, 11, seed=3)
        options["reference_labels"] = 1 << random_integers(0, 9, 1, 150, seed=4)
    truth = qk.similarity_topk(query, reference, k, **options, backend="reference")
    with way.taken():
        actual = qk.similarity_topk(query, reference, k, **options, backend="tiled")
    assert judge_exact(actual.index, truth.index).passed and judge_exact(actual.score, truth.score).passed


@pytest.mark.parametrize(
    ("k", "heads", "labelled", "way"),
    [
        pytest.param(1, "joint", False, Way(ROW), id="one match, row by row"),
        pytest.param(1, "per_head", True, Way(RAGGED), id="one match of a label"),
        pytest.param(5, "joint", True, Way(RAGGED, "device"), id="labels compared block by block"),
        pytest.param(5, "per_head", False, Way(HEADS), id="blocks of some heads"),
        pytest.param(32, "joint", True, Way(WHOLE), id="the most that is extracted"),
        pytest.param(32, "per_head", False, Way(RAGGED, "device"), id="the most that is extracted, unread"),
        pytest.param(33, "joint", False, Way(RAGGED), id="the least that is sorted"),
        pytest.param(33, "per_head", True, Way(HEADS, "device"), id="the least that is sorted, unread"),
        pytest.param(150, "joint", True, Way(ROW), id="more than a label has"),
        pytest.param(150, "per_head", False, Way(WHOLE, "device"), id="all of them"),
    ],
)
def test_matches_are_exact(k, heads, labelled, way):
    assert_matches_are_exact(k, heads, labelled, way)


@settings(SAME_IN_EVERY_RUN, max_examples=60)
@given(
    st.sampled_from((1, 5, 32, 33, 150)) | st.integers(1, 150),
    st.sampled_from(("joint", "per_head")),
    st.booleans(),
    WAYS,
    st.sampled_from(((0, 1), (1, 0), (1, 1))),
)
def test_any_matches_are_exact(k, heads, labelled, way, rows):
    assert_matches_are_exact(k, heads, labelled, way, rows)


@pytest.mark.parametrize("k", [1, 4, 40])
def test_nan_scores_come_first_and_stay_in_range(k):
    query, reference = features((1, 2, 6, 8), (1, 2, 130, 8), dtype=torch.float32)
    query[:, :, 2] = float("nan")
    reference[:, :, 70] = float("nan")
    index, score = qk.similarity_topk(query, reference, k, backend="tiled")
    assert score[..., 0].isnan().all()
    assert index.min() >= 0 and index.max() < 130 and (index[:, :, [0, 1, 3, 4, 5], 0] == 70).all()


def test_probes_in_blocks_of_any_size(block_bytes):
    query, key = features(SMALL["q"], SMALL["k"], dtype=torch.bfloat16)
    classes, counts = random_integers(0, 9, 1, 21, seed=1), random_integers(0, 3, 2, 3, 21, seed=2)
    for op in (
        lambda q, k, backend: qk.label_mass(q, k, classes, 8, counts=counts, backend=backend),
        lambda q, k, backend: qk.label_mass(q, k, classes, 9, backend=backend),
        lambda q, k, backend: qk.mean_attention_map(q, k, backend=backend),
    ):
        truth, plain, actual = (
            op(query.double(), key.double(), "reference"),
            op(query, key, "reference"),
            op(query, key, "tiled"),
        )
        assert judge(actual, plain, truth, reduction=21).passed


@pytest.mark.parametrize("group", [1, 3])
def test_topk_attention_in_blocks_of_any_size(group, block_bytes):
    index = random_integers(-1, 21, 2, group, 13, 6, seed=1)
    rows = torch.tensor([1, 1], dtype=torch.int32)
    tensors = features(SMALL["q"], SMALL["k"], (2, 3, 21, 11), dtype=torch.float32)
    truth, plain, actual = (
        topk_attention(
            *(x.to(dtype) for x in tensors), index, contrast=1.67, batch_index=rows, backend=backend
        )
        for dtype, backend in (
            (torch.float64, "reference"),
            (torch.float32, "reference"),
            (torch.float32, "tiled"),
        )
    )
    assert judge(actual, plain, truth, reduction=8).passed


MEASURE = """
import torch
import qalign_kernels as qk
from qalign_kernels.bench.measure import cpu_rise_mib
torch.set_num_threads(1)
def call(tokens):
    torch.manual_seed(0)
    query, ref_query, key, value = torch.randn(4, 1, {heads}, tokens, 40){learned}
    return cpu_rise_mib(lambda: {statement})
call(64)
print(call({tokens}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement",
    [
        "qk.similarity_topk(query, ref_query, 40)",
        "qk.attention_with_lse(query, qk.Segment(key, value))",
        "qk.attention(query, qk.Segment(key, value, labels=(one := torch.ones(1, tokens).int())), "
        "contrast=1.67, query_labels=one)",
        "qk.qalign_attention(query, ref_query, key, value, refinement='guided')",
        "qk.qalign_attention(query, ref_query, key, value, refinement='topk')",
        "qk.label_mass(query, key, torch.zeros(1, tokens).int(), 8)",
        "torch.autograd.grad(qk.qalign_attention(query, ref_query, key, value, contrast=1.67).sum(), "
        "[query, key, value])",
    ],
)
def test_extra_memory_stays_below_one_map(statement):
    # a map [1, 1, 4096, 4096] in float32 is 64 MiB, and plain PyTorch holds several
    assert measured_mib(statement, heads=1) <= 48


@pytest.mark.slow
def test_extra_memory_of_the_main_case():
    assert measured_mib("qk.qalign_attention(query, ref_query, key, value)", heads=8) <= 64


def measured_mib(statement, heads):
    """By how much a call at 4096 tokens raises the peak memory of a fresh process."""
    program = MEASURE.format(
        statement=statement,
        learned=".requires_grad_()" if "grad" in statement else "",
        heads=heads,
        tokens=4096,
    )
    return float(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    )


def test_queries_of_one_label_set_go_together(monkeypatch):
    labels, keys = (
        torch.tensor([[1, 2, 1, 4, 0]], dtype=torch.int32),
        torch.tensor([[2, 3, 2], [1, 1, 1]], dtype=torch.int32),
    )
    first, *others = tiled_labels.group_queries(labels, [keys, None], 2)
    assert (first.batch, first.queries.tolist(), [None if x is None else x.tolist() for x in first.keys]) == (
        slice(0, 1),
        [4],
        [[], None],
    )
    assert [(group.batch.start, group.queries.tolist()) for group in others] == [
        (0, [0, 2]),
        (0, [1]),
        (0, [3]),
    ] + [(1, queries) for queries in ([4], [0, 2], [1], [3])]
    assert others[4].keys[0] is None  # it sees all
    monkeypatch.setattr(tiled_labels, "MOST_GROUPS", 3)
    assert tiled_labels.group_queries(labels, [keys], 2) is None
    assert (
        tiled_labels.group_queries(None, [None], 2) is tiled_labels.group_queries(labels, [None], 2) is None
    )


def test_two_equal_labels_cost_half(monkeypatch):
    query, key, value = features((1, 2, 512, 16), (1, 2, 512, 16), (1, 2, 512, 16), dtype=torch.float32)
    labels = 1 + (torch.arange(512) * 7 // 3 % 2 == 0).int().unsqueeze(0)
    scores, attend = [], _fused._sdpa

    def count(query, key, *arguments):
        scores.append(query.shape[2] * key.shape[2])
        return attend(query, key, *arguments)

    monkeypatch.setattr(_fused, "_sdpa", count)
    qk.attention(query, qk.Segment(key, value, labels=labels), query_labels=labels, backend="tiled")
    assert len(scores) == 2 and sum(scores) < 0.52 * 512**2
