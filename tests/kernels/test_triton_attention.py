"""attention on Triton, in the interpreter, against the reference in float64.

Every flag is tested alone and together with others.
"""

import dataclasses
import math

import pytest
import torch

from qalign_kernels import testing
from qalign_kernels._triton import attention as kernels
from qalign_kernels._triton._attention_choice import loop_once
from qalign_kernels.attention import Guide, Segment
from qalign_kernels.reference.attention import attention as reference

DTYPES = [torch.float32, torch.float16]
BATCH, HEADS, QUERIES = 2, 2, 37


def _in_double(segment):
    return dataclasses.replace(segment, key=segment.key.double(), value=segment.value.double())


def _check(query, segments, *, scale=None, contrast=1.0, query_labels=None, guide=None):
    settings = {
        "scale": query.shape[3] ** -0.5 if scale is None else scale,
        "contrast": contrast,
        "query_labels": query_labels,
    }
    with testing.poisoned_memory():
        actual = kernels.attention(query, segments, guide=guide, need_lse=True, **settings)
    yardstick = reference(query, segments, guide=guide, **settings)
    guide = None if guide is None else Guide(guide.query.double(), guide.key.double(), guide.strength)
    truth = reference(query.double(), [_in_double(s) for s in segments], guide=guide, **settings)
    reduction = max(query.shape[3], sum(segment.key.shape[2] for segment in segments))
    assert actual[0].dtype == query.dtype and actual[1].dtype == torch.float32
    for ours, theirs, right in zip(actual, yardstick, truth):
        verdict = testing.judge(ours, theirs, right, reduction)
        assert verdict.passed, verdict
    return actual


def _query(dtype, dim=32, seed=0):
    return testing.random_features(BATCH, HEADS, QUERIES, dim, seed=seed, dtype=dtype)


def _segment(dtype, tokens, dim=32, value_dim=None, seed=1, rows=BATCH, **settings):
    key = testing.random_features(rows, HEADS, tokens, dim, seed=seed, dtype=dtype)
    value = testing.random_features(rows, HEADS, tokens, value_dim or dim, seed=seed + 1, dtype=dtype)
    return Segment(key, value, **settings)


def _counts(tokens, maps=1, seed=5):
    return testing.random_integers(0, 4, BATCH, maps, tokens, seed=seed)


def _labels(tokens, rows=BATCH, seed=7):
    return testing.random_integers(0, 4, rows, tokens, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(16, 16), (40, 40), (64, 96), (80, 16), (160, 40)])
def test_head_dims(dtype, dims):
    dim, value_dim = dims
    _check(_query(dtype, dim), [_segment(dtype, 45, dim, value_dim)])


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64])
def test_tail_tiles(tokens):
    _check(_query(torch.float32), [_segment(torch.float32, tokens)])
    _check(_query(torch.float32), [_segment(torch.float32, tokens)], contrast=1.67)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contrast", [1.0, 0.5, 1.67])
@pytest.mark.parametrize("maps", [1, HEADS])
def test_counts(dtype, contrast, maps):
    _check(_query(dtype), [_segment(dtype, 71, counts=_counts(71, maps))], contrast=contrast)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contrast", [1.0, 0.5, 1.67])
def test_labels(dtype, contrast):
    """Some queries have an empty label set and see no key."""
    segment = _segment(dtype, 45, labels=_labels(45))
    output, lse = _check(
        _query(dtype), [segment], query_labels=_labels(QUERIES, rows=1, seed=8), contrast=contrast
    )
    empty = lse == float("-inf")
    assert empty.any() and not output[empty].any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contrast", [1.0, 0.5, 1.67])
def test_three_segments_with_everything(dtype, contrast):
    segments = [
        _segment(dtype, 45, value_dim=40, counts=_counts(45), labels=_labels(45), logit_scale=1.5),
        _segment(
            dtype,
            64,
            value_dim=40,
            seed=11,
            logit_scale=-0.5,
            logit_shift=1.0,
            batch_index=torch.tensor([1, 0], dtype=torch.int32),
        ),
        _segment(
            dtype,
            5,
            value_dim=40,
            seed=21,
            rows=1,
            labels=_labels(5, rows=1),
            batch_index=torch.zeros(2, dtype=torch.int32),
            logit_scale=0.0,
        ),
    ]
    _check(_query(dtype), segments, query_labels=_labels(QUERIES, seed=8), contrast=contrast)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_scale_of_any_sign(scale):
    _check(_query(torch.float32), [_segment(torch.float32, 45, counts=_counts(45))], scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contrast", [1.0, 1.67])
@pytest.mark.parametrize("counted", [False, True])
def test_guide(dtype, contrast, counted):
    segment = _segment(dtype, 45, 40, counts=_counts(45) if counted else None, labels=_labels(45))
    guide = Guide(_query(dtype, 40, seed=31), segment.key.flip(2), 3.0)
    _check(
        _query(dtype, 40), [segment], guide=guide, contrast=contrast, query_labels=_labels(QUERIES, seed=8)
    )


def test_views():
    """Transposed, channel-strided and expanded tensors are read without a copy."""
    storage = testing.random_features(BATCH, QUERIES, HEADS, 3, 80, seed=41)
    query, key, value = (storage[:, :, :, i, ::2].transpose(1, 2) for i in range(3))
    _check(query, [Segment(key, value)])
    counts = _counts(QUERIES)[:, :, :1].expand(-1, -1, QUERIES)
    _check(
        query,
        [
            Segment(
                key[:1].expand(BATCH, -1, -1, -1), value[:1, :1].expand(BATCH, HEADS, -1, -1), counts=counts
            )
        ],
    )


def test_segments_equal_their_concatenation():
    parts = [_segment(torch.float32, 33), _segment(torch.float32, 20, seed=11)]
    whole = Segment(torch.cat([s.key for s in parts], 2), torch.cat([s.value for s in parts], 2))
    for contrast in (1.0, 1.67):
        settings = {"scale": 0.2, "contrast": contrast, "query_labels": None, "guide": None, "need_lse": True}
        apart, together = (
            kernels.attention(_query(torch.float32), parts, **settings),
            kernels.attention(_query(torch.float32), [whole], **settings),
        )
        for ours, theirs in zip(apart, together):
            assert testing.worst_error(ours, theirs) <= testing.error_budget(theirs, theirs, 53)


def test_counts_equal_repeated_keys():
    segment, counts = _segment(torch.float32, 21), _counts(21)[:1].expand(BATCH, -1, -1)
    rows = counts[0, 0].long()
    repeated = Segment(segment.key.repeat_interleave(rows, 2), segment.value.repeat_interleave(rows, 2))
    settings = {"scale": 0.2, "contrast": 1.67, "query_labels": None, "guide": None, "need_lse": False}
    counted = kernels.attention(
        _query(torch.float32), [dataclasses.replace(segment, counts=counts)], **settings
    )[0]
    expected = kernels.attention(_query(torch.float32), [repeated], **settings)[0]
    assert testing.worst_error(counted, expected) <= testing.error_budget(expected, expected, int(rows.sum()))


@pytest.mark.parametrize("contrast", [1.0, 1.67])
def test_counts_beyond_the_range_of_float16(contrast):
    counts = _counts(45)
    counts[:, :, 3] = 1_000_000
    _check(
        _query(torch.float16),
        [_segment(torch.float16, 45, counts=counts), _segment(torch.float16, 20, seed=11)],
        contrast=contrast,
    )


@pytest.mark.parametrize("contrast", [1.0, 1.67])
def test_no_key_gives_zeros(contrast):
    segment = _segment(torch.float32, 45, counts=torch.zeros((BATCH, 1, 45), dtype=torch.int32))
    output, lse = _check(_query(torch.float32), [segment], contrast=contrast)
    assert not output.any() and (lse == float("-inf")).all()


@pytest.mark.parametrize("contrast", [1.0, 1.67])
@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_nan_gives_nan(contrast, place):
    query, segment = _query(torch.float32), _segment(torch.float32, 45)
    tensor = {"query": query, "key": segment.key, "value": segment.value}[place]
    tensor[1, 1, 3, 4] = float("nan")
    settings = {"scale": 0.2, "contrast": contrast, "query_labels": None, "guide": None}
    output, _ = kernels.attention(query, [segment], need_lse=False, **settings)
    assert torch.equal(output.isnan(), reference(query, [segment], **settings)[0].isnan())


def test_lse_is_left_out_unless_needed():
    settings = {"scale": 1.0, "contrast": 1.67, "query_labels": None, "guide": None}
    assert (
        kernels.attention(_query(torch.float32), [_segment(torch.float32, 9)], need_lse=False, **settings)[1]
        is None
    )


def test_large_logits_stay_finite():
    query = 40 * _query(torch.float32)
    _check(
        query,
        [_segment(torch.float32, 45, counts=_counts(45)), _segment(torch.float32, 33, seed=11)],
        scale=1.0,
    )


@pytest.mark.parametrize("counted", [False, True])
def test_keys_far_above_those_of_the_first_tile(counted):
    """The weights of one query tile overflow with the first maximum: the running maximum replaces it."""
    query, segment = (
        _query(torch.float32),
        _segment(torch.float32, 71, counts=_counts(71) if counted else None),
    )
    query[:, :, 32:] *= 0.01
    segment.key[:, :, 40:] *= 40
    logits = torch.einsum("bhqd,bhkd->bhqk", query, segment.key) / math.log(2)
    assert (logits.amax(-1) - logits[..., :32].amax(-1)).amax((0, 1))[:32].max() > 128
    _check(query, [segment], scale=1.0)


@pytest.mark.parametrize("below", [30, 300])
def test_query_far_below_those_of_its_tile(below):
    """With counts, a tile has one maximum. If weights of a query vanish, the running one replaces it."""
    query, segment = _query(torch.float32), _segment(torch.float32, 71, counts=_counts(71))
    segment.key[..., 0], query[..., 0], query[:, :, 3, 0] = 1, 0, -below
    _check(query, [segment], scale=1.0)


@pytest.mark.parametrize(
    "dims, looped",
    [((64,), False), ((128, 64), False), ((40,), True), ((96, 96), True), ((64, 16), True), ((160,), True)],
)
def test_narrow_parts_are_multiplied_in_loops(dims, looped):
    assert loop_once("sm_90", dims) == looped
    assert not loop_once("sm_100", dims)
