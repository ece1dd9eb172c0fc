"""What is the tiled path's own: blocks of any size, the fused route, gradients, and memory that never holds N×N."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import scaled_dot_product_attention as sdpa

import qalign_kernels as qk
from qalign_kernels.attention import Guide, guided_attention
from qalign_kernels.qalign_attention import topk_attention
from qalign_kernels.testing import judge, judge_exact, random_features, random_integers
from qalign_kernels.tiled import _blocks, _fused, _masses
from qalign_kernels.tiled import _labels as tiled_labels

pytestmark = pytest.mark.usefixtures("poisoned")
BLOCK_BYTES = [
    1,
    6_000,
    40_000,
    8 << 20,
]  # one row of one head at a time, ragged blocks, several heads, everything at once
OPTIONS = ("counts", "labels", "logit_scale", "logit_shift", "batch_index")
SMALL = {"q": (2, 3, 13, 8), "r": (2, 3, 21, 8), "k": (2, 3, 21, 8), "v": (2, 3, 21, 8)}


@pytest.fixture(params=BLOCK_BYTES)
def block_bytes(request, monkeypatch):
    monkeypatch.setattr(_blocks, "CPU_BLOCK_BYTES", request.param)


@pytest.fixture(params=["host", "device"])
def route(request, monkeypatch):
    """The device route, which never reads a value, runs on the CPU as well."""
    if request.param == "device":
        for module in (_blocks, _fused, _masses, tiled_labels):
            monkeypatch.setattr(module, "on_host", lambda x: False)


@pytest.fixture
def ragged(monkeypatch):
    monkeypatch.setattr(_blocks, "CPU_BLOCK_BYTES", 6_000)


def features(*shapes, dtype=torch.float64):
    return [random_features(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def learned(tensors, dtype=None):
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]


def attention_cases(dtype):
    """Every way to call attention: name to (tensors [query, *keys, *values], what each segment adds, settings)."""
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_in_blocks_of_any_size(case, dtype, block_bytes, route):
    tensors, *call = attention_cases(dtype)[case]
    truth = attend([x.double() for x in tensors], *call, "reference", qk.attention_with_lse)
    plain = attend(tensors, *call, "reference", qk.attention_with_lse)
    actual = attend(tensors, *call, op=qk.attention_with_lse)
    assert judge(actual.output, plain.output, truth.output, reduction=91).passed
    assert judge(actual.lse, plain.lse, truth.lse, reduction=91).passed
    assert judge(attend(tensors, *call), plain.output, truth.output, reduction=91).passed


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_attention_in_blocks_of_any_size(case, dtype, block_bytes):
    tensors, *call = attention_cases(dtype)[case]

    def gradients(tensors, backend):
        output, lse = attend(tensors, *call, backend, qk.attention_with_lse)
        loss = (output * random_features(*output.shape, seed=9, dtype=output.dtype)).sum()
        return torch.autograd.grad(loss + lse[lse.isfinite()].sin().sum(), tensors)

    truth, plain, actual = (
        gradients(learned(tensors, precision), backend)
        for precision, backend in ((torch.float64, "reference"), (dtype, "reference"), (dtype, "tiled"))
    )
    for ours, yardstick, true in zip(actual, plain, truth):
        assert ours.dtype == dtype
        assert judge(ours, yardstick, true, reduction=91).passed


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", [qk.attention, qk.attention_with_lse])
def test_attention_gradcheck(case, op, ragged, route):
    tensors, *call = attention_cases(torch.float64)[case]

    def finite(*tensors):
        result = attend(tensors, *call, op=op)
        return (
            result
            if isinstance(result, torch.Tensor)
            else (result.output, result.lse.masked_fill(result.lse == float("-inf"), 0))
        )

    assert gradcheck(finite, learned(tensors), fast_mode=True)


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


@pytest.mark.parametrize(
    "refinement", ["rearranged", "guided", "topk", "warped_values", "warped_output", "soft", "none"]
)
@pytest.mark.parametrize("contrast", [1.0, 1.67])
@pytest.mark.parametrize("batch_index", [None, torch.tensor([1, 1], dtype=torch.int32)])
@pytest.mark.parametrize("labelled", [False, True])
def test_qalign_attention_gradients(refinement, contrast, batch_index, labelled, ragged):
    labels = [1 << random_integers(0, 4, 2, n, seed=n) for n in (13, 21)] if labelled else [None, None]
    tensors = learned(features(SMALL["q"], SMALL["r"], SMALL["k"], SMALL["v"], SMALL["q"]))

    def call(query, ref_query, key, value, own_key, backend="tiled"):
        return qk.qalign_attention(
            query, ref_query, key, value, refinement=refinement, own_key=own_key if refinement == "warped_values" else None, topk=4,
            strength=2.0, contrast=contrast, query_labels=labels[0], ref_labels=labels[1], batch_index=batch_index, backend=backend,
        )  # fmt: skip

    weight = random_features(*SMALL["q"], seed=9, dtype=torch.float64)
    actual, truth = (
        torch.autograd.grad((call(*tensors, b) * weight).sum(), tensors, allow_unused=True)
        for b in ("tiled", "reference")
    )
    for ours, true in zip(actual, truth):
        assert (ours is None) == (true is None)
        assert ours is None or judge(ours, true, true, reduction=21).passed
    assert gradcheck(call, tensors, fast_mode=True)


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


def test_absent_keys_are_never_read(ragged, route):
    query, key, value = features(SMALL["q"], SMALL["k"], SMALL["v"], dtype=torch.float32)
    counts = random_integers(0, 2, 2, 3, 21, seed=1)
    absent = (counts == 0).unsqueeze(-1)
    for op in (qk.attention, qk.attention_with_lse):
        clean, dirty = (
            attend(
                [query, *(x.masked_fill(absent, fill) for x in (key, value))], [{"counts": counts}], {}, op=op
            )
            for fill in (0, float("nan"))
        )
        for ours, expected in zip(dirty, clean):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("k", [1, 5, 32, 33, 150])
@pytest.mark.parametrize("heads", ["joint", "per_head"])
@pytest.mark.parametrize("labelled", [False, True])
def test_matches_in_blocks_of_any_size(k, heads, labelled, block_bytes, route):
    # whole numbers: every sum is exact, so ties are many and their order is asked for
    query, reference = (random_integers(-1, 2, 2, 2, n, 5, seed=n).float() for n in (11, 150))
    rows = torch.tensor([1, 0], dtype=torch.int32)
    labels = dict.fromkeys(("query_labels", "reference_labels"))
    if labelled:
        labels = {
            "query_labels": 1 << random_integers(0, 3, 2, 11, seed=3),
            "reference_labels": 1 << random_integers(0, 9, 1, 150, seed=4),
        }
    actual, truth = (
        qk.similarity_topk(
            query, reference, k, similarity="dot", heads=heads, batch_index=rows, **labels, backend=b
        )
        for b in ("tiled", "reference")
    )
    assert judge_exact(actual.index, truth.index).passed and judge_exact(actual.score, truth.score).passed


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
    query, ref_query, key, value = torch.randn(4, 1, {heads}, tokens, 40, generator=torch.Generator().manual_seed(0)){learned}
    return cpu_rise_mib(lambda: {statement})
call(64)
print(call({tokens}))
"""


@pytest.mark.parametrize(
    "statement",
    [
        "qk.similarity_topk(query, ref_query, 40)",
        "qk.attention_with_lse(query, qk.Segment(key, value))",
        "qk.attention(query, qk.Segment(key, value, labels=torch.ones(1, tokens).int()), contrast=1.67, query_labels=torch.ones(1, tokens).int())",
        "qk.qalign_attention(query, ref_query, key, value, refinement='guided')",
        "qk.qalign_attention(query, ref_query, key, value, refinement='topk')",
        "qk.label_mass(query, key, torch.zeros(1, tokens).int(), 8)",
        "torch.autograd.grad(qk.qalign_attention(query, ref_query, key, value, contrast=1.67).sum(), [query, key, value])",
    ],
)
def test_extra_memory_stays_below_one_map(statement):
    # a map [1, 1, 4096, 4096] in float32 is 64 MiB, and plain PyTorch holds several
    assert measured_mib(statement, heads=1) <= 48


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
    scores, attend = [], _fused.scaled_dot_product_attention

    def count(query, key, *arguments, **settings):
        scores.append(query.shape[2] * key.shape[2])
        return attend(query, key, *arguments, **settings)

    monkeypatch.setattr(_fused, "scaled_dot_product_attention", count)
    qk.attention(query, qk.Segment(key, value, labels=labels), query_labels=labels, backend="tiled")
    assert len(scores) == 2 and sum(scores) < 0.52 * 512**2
