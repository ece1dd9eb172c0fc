"""Tokens sorted by their labels, and attention over them, in the interpreter.

The order is compared with torch's sort, attention with the reference in float64.
"""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from qalign_kernels import testing
from qalign_kernels._triton import _labels, attention, distillation, qalign_attention, rearrange
from qalign_kernels.attention import Guide, Segment
from qalign_kernels.reference.attention import attention as reference

SETS = {
    "single": [1, 2, 4, 1 << 30],
    "background": [1, 2, -1],
    "subject": [0, -1],
    "any": [-1, 0, 1, 2, 4, -(2**31), 3, 5, 7],
}
SCALE = 0.2


@pytest.fixture(autouse=True)
def _sorted(monkeypatch):
    monkeypatch.setattr(_labels, "SORTED_FROM", 1)
    with testing.poisoned_memory():
        yield


def _pick(sets, rows, tokens, seed):
    return torch.tensor(SETS[sets], dtype=torch.int32)[
        testing.random_integers(0, len(SETS[sets]) - 1, rows, tokens, seed=seed).long()
    ]


def _class(label):
    label &= 2**32 - 1
    if label == 0:
        return 34
    if label & (label - 1) == 0:
        return 2 + label.bit_length() - 1
    return 1 if label == 2**32 - 1 else 0


def _classes(labels):
    return torch.tensor([[_class(label) for label in row] for row in labels.tolist()])


@pytest.mark.parametrize("rows,tokens", [(1, 1), (2, 150), (1, 5000)])
def test_tokens_lie_by_class_in_order(rows, tokens):
    labels = _pick("any", rows, tokens, 1)
    order, weights, log_weights, starts = _labels.sort_tokens(labels)
    classes = _classes(labels)
    assert weights is None and log_weights is None
    assert torch.equal(order[:, 0], classes.argsort(stable=True).int())
    assert torch.equal(starts[:, 0, 1:], torch.stack([(classes <= c).sum(1) for c in range(35)], 1).int())
    assert not starts[:, 0, 0].any()


def test_every_bit_is_a_class_of_its_own():
    labels = torch.tensor([[1 << bit for bit in range(31)] + [-(2**31)]], dtype=torch.int32)
    *_, starts = _labels.sort_tokens(labels)
    assert starts[0, 0, 2:35].tolist() == list(range(33))


@pytest.mark.parametrize("label_rows", [1, 2])
@pytest.mark.parametrize("maps", [1, 3])
def test_chosen_tokens_keep_their_weights(label_rows, maps):
    labels, counts = _pick("any", label_rows, 90, 1), testing.random_integers(0, 3, 2, maps, 90, seed=2)
    order, weights, log_weights, starts = _labels.sort_tokens(labels, rearrange.compact(counts))
    classes = _classes(labels).expand(2, -1)
    for b in range(2):
        for g in range(maps):
            chosen = counts[b, g].nonzero().squeeze(1)
            expected = chosen[classes[b, chosen].argsort(stable=True)]
            number = expected.numel()
            assert starts[b, g, -1] == number
            assert torch.equal(order[b, g, :number], expected.int())
            assert torch.equal(weights[b, g, :number], counts[b, g, expected].float())
            torch.testing.assert_close(log_weights[b, g, :number], weights[b, g, :number].log2())


@triton.jit
def _spans_kernel(starts_ptr, lowest, highest, out_ptr, BLOCK: tl.constexpr):
    spans = _labels.visible_spans(starts_ptr, lowest, highest, BLOCK)
    whole, compared = spans.whole, spans.compared
    tl.store(out_ptr, whole)
    tl.store(out_ptr + 1, compared)
    for start in range(0, whole, BLOCK):
        tl.store(
            out_ptr + 2 + start + tl.arange(0, BLOCK), _labels.free_slot(start, spans) + tl.arange(0, BLOCK)
        )
    for position in range(0, compared):
        tl.store(out_ptr + 2 + whole + position, _labels.compared_slots(position, spans))


@pytest.mark.parametrize(
    "classes", [(2, 2), (4, 4), (1, 1), (0, 0), (34, 34), (2, 3), (0, 4), (1, 3), (3, 34)]
)
def test_every_key_that_is_seen_is_met_once(classes):
    """A query meets the keys of its label, of all labels and of several labels, each once.

    Keys that every query of the tile sees are not compared.
    """
    lowest, highest = classes
    labels = _pick("any", 1, 200, 3)
    order, *_, starts = _labels.sort_tokens(labels)
    found = torch.full((2 + 256,), -1, dtype=torch.int32)
    _spans_kernel[(1,)](starts, lowest, highest, found, BLOCK=16)
    whole, compared = found[:2].tolist()
    met = found[2 : 2 + whole + compared]
    assert met.unique().numel() == met.numel() and whole % 16 == 0
    key_classes = _classes(labels)[0][order[0, 0, met.long()].long()]
    if lowest == highest == 34:
        wanted, free = [], []
    elif lowest == highest > 1:
        wanted, free = [0, 1, lowest], [1, lowest]
    elif lowest <= 1:
        wanted, free = list(range(34)), [] if (lowest, highest) != (1, 1) else list(range(1, 34))
    else:
        wanted, free = [0, 1, *range(lowest, min(highest, 33) + 1)], []
    assert sorted(key_classes.tolist()) == sorted(c for c in _classes(labels)[0].tolist() if c in wanted)
    assert set(key_classes[:whole].tolist()) <= set(free)
    assert (
        (key_classes[whole:][torch.isin(key_classes[whole:], torch.tensor([*free, -1]))]).numel() < 2 * 16
    )  # less than a tile of each span


def _double(segments):
    return [dataclasses.replace(s, key=s.key.double(), value=s.value.double()) for s in segments]


def _judged(actual, query, segments, guide=None, **settings):
    double_guide = None if guide is None else Guide(guide.query.double(), guide.key.double(), guide.strength)
    yardstick = reference(query, segments, guide=guide, **settings)
    truth = reference(query.double(), _double(segments), guide=double_guide, **settings)
    return all(testing.judge(*each, reduction=200).passed for each in zip(actual, yardstick, truth))


def _features(*shapes, dtype=torch.float32):
    return [testing.random_features(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sets,contrast,counted,dtype",
    [
        *((sets, contrast, 1, torch.float32) for sets in SETS for contrast in (1.0, 1.67)),
        ("any", 0.5, 1, torch.float32),
        *(
            ("any", contrast, counted, dtype)
            for contrast in (1.0, 1.67)
            for counted in (None, 2)
            for dtype in (torch.float32, torch.float16)
        ),
    ],
)
def test_attention(sets, contrast, counted, dtype):
    query, key, value = _features((2, 2, 70, 40), (2, 2, 100, 40), (2, 2, 100, 40), dtype=dtype)
    counts = None if counted is None else testing.random_integers(0, 3, 2, counted, 100, seed=5)
    segments = [Segment(key, value, counts=counts, labels=_pick(sets, 1 if counted == 1 else 2, 100, 6))]
    settings = {
        "scale": SCALE,
        "contrast": contrast,
        "query_labels": _pick(sets, 2 if counted == 1 else 1, 70, 7),
    }
    actual = attention.attention(query, segments, guide=None, need_lse=True, **settings)
    assert _judged(actual, query, segments, **settings)


@pytest.mark.parametrize("contrast", [1.0, 1.67])
def test_segments_beside_ones_without_labels(contrast):
    """Queries in one order read segments with and without labels, one of them through a batch index."""
    query, *tensors = _features((2, 2, 70, 32), *[(2, 2, n, 32) for n in (50, 50, 90, 90, 33, 33)])
    key, value, more_key, more_value, last_key, last_value = tensors
    segments = [
        Segment(key, value, logit_scale=-1.0),
        Segment(
            more_key,
            more_value,
            labels=_pick("any", 1, 90, 3),
            logit_shift=0.4,
            batch_index=torch.tensor([1, 0], dtype=torch.int32),
        ),
        Segment(
            last_key,
            last_value,
            labels=_pick("single", 2, 33, 4),
            counts=testing.random_integers(0, 2, 2, 1, 33, seed=8),
        ),
    ]
    settings = {"scale": SCALE, "contrast": contrast, "query_labels": _pick("any", 2, 70, 5)}
    actual = attention.attention(query, segments, guide=None, need_lse=True, **settings)
    assert _judged(actual, query, segments, **settings)


def test_guided():
    query, key, value = _features((1, 2, 70, 32), (1, 2, 90, 32), (1, 2, 90, 32))
    guide = Guide(query.flip(2).contiguous(), key.flip(1).contiguous(), 0.3)
    segments = [Segment(key, value, labels=_pick("any", 1, 90, 3))]
    settings = {"scale": SCALE, "contrast": 1.0, "query_labels": _pick("any", 1, 70, 4)}
    actual = attention.attention(query, segments, guide=guide, need_lse=True, **settings)
    assert _judged(actual, query, segments, guide, **settings)


@pytest.mark.parametrize("growth", [1.0, 400.0])
def test_logits_that_grow_after_the_first_tile(growth):
    """The maximum of the first tile is too small, so that the kernel walks over the keys again."""
    query, key, value = _features((1, 1, 70, 32), (1, 1, 130, 32), (1, 1, 130, 32))
    key[:, :, 64:] *= growth
    segments = [Segment(key, value, labels=torch.ones(1, 130, dtype=torch.int32))]
    settings = {"scale": SCALE, "contrast": 1.0, "query_labels": torch.ones(1, 70, dtype=torch.int32)}
    actual = attention.attention(query, segments, guide=None, need_lse=True, **settings)
    assert _judged(actual, query, segments, **settings)


def test_distillation():
    query, output, key, value = _features((1, 2, 70, 32), (1, 2, 70, 32), (1, 2, 90, 32), (1, 2, 90, 32))
    labels, query_labels = _pick("any", 1, 90, 3), _pick("any", 1, 70, 4)
    settings = {"scale": SCALE, "query_labels": query_labels, "need_signs": True}
    loss, signs = distillation.distillation_loss(
        output, query, [Segment(key, value, labels=labels)], **settings
    )
    ideal, _ = reference(
        query.double(),
        _double([Segment(key, value, labels=labels)]),
        scale=SCALE,
        contrast=1.0,
        query_labels=query_labels,
        guide=None,
    )
    assert torch.equal(signs, (output.double() - ideal).sign().to(torch.int8))
    assert abs(loss.item() - (output - ideal).abs().mean().item()) < 1e-6


@pytest.mark.parametrize("joint,contrast", [(True, 1.0), (False, 1.67)])
def test_rearranged(joint, contrast, monkeypatch):
    """The result without sorting, except for the order of sums."""
    query, ref_query, key, value = _features((2, 2, 40, 32), *[(2, 2, 50, 32)] * 3)
    labels = {"query_labels": _pick("background", 1, 40, 3), "ref_labels": _pick("background", 2, 50, 4)}
    arguments = (query, query, ref_query, key, value, "cosine", joint)
    ours = qalign_attention.rearranged_attention(*arguments, scale=SCALE, contrast=contrast, **labels)
    monkeypatch.setattr(_labels, "SORTED_FROM", 1000)
    plain = qalign_attention.rearranged_attention(*arguments, scale=SCALE, contrast=contrast, **labels)
    assert not torch.equal(ours, torch.zeros_like(ours))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=2e-6)


def test_few_tokens_are_not_sorted(monkeypatch):
    monkeypatch.setattr(_labels, "SORTED_FROM", 100)
    few, many = _pick("single", 1, 99, 1), _pick("single", 1, 100, 2)
    assert _labels.sort_queries(None, [many]) is None
    assert _labels.sort_queries(many, [None, few]) is None
    assert _labels.sort_queries(few, [many]) is None
    assert _labels.sort_queries(many, [None, many]) is not None
