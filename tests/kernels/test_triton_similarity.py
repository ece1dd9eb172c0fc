"""similarity_argmax and similarity_topk on Triton, in the interpreter, against float64.

The best and the second best of random scores differ clearly, so indices are compared for equality. Ties are
made on purpose.
"""

import pytest
import torch
import triton
import triton.language as tl

from qalign_kernels import testing
from qalign_kernels._triton import _tile, similarity
from qalign_kernels._triton._configs import split_keys
from qalign_kernels.reference import rearrange as reference_rearrange
from qalign_kernels.reference import similarity as reference

DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _poisoned():
    with testing.poisoned_memory():
        yield


def _features(shape, num_tokens, dtype=torch.float32, seed=0, reference_batch=None):
    generator = torch.Generator().manual_seed(seed)
    batch, heads, _, dim = shape
    query = torch.randn(shape, generator=generator).to(dtype)
    return query, torch.randn((reference_batch or batch, heads, num_tokens, dim), generator=generator).to(
        dtype
    )


def _labels(batch, tokens, seed):
    return torch.randint(
        0, 8, (batch, tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.int32
    )


def _hold(actual, query, keys, similarity, joint, labels=(None, None, None), k=None):
    """Compare index and score with the float64 truth.

    The yardstick is the reference in the precision of the inputs.
    """
    if k is None:
        truth = reference.similarity_argmax(query.double(), keys.double(), similarity, joint, *labels)
        yardstick = reference.similarity_argmax(query, keys, similarity, joint, *labels)
    else:
        truth = reference.similarity_topk(query.double(), keys.double(), k, similarity, joint, *labels)
        yardstick = reference.similarity_topk(query, keys, k, similarity, joint, *labels)
    reduction = query.shape[3] * (query.shape[1] if joint else 1)
    verdict = testing.judge(actual[1], yardstick[1], truth[1], reduction)
    assert verdict.passed, verdict
    assert torch.equal(actual[0], truth[0])
    assert actual[0].dtype == torch.int32 and actual[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("similarity_kind", ["dot", "cosine"])
@pytest.mark.parametrize("joint", [False, True])
def test_argmax(dtype, similarity_kind, joint):
    query, keys = _features((1 if joint else 2, 2, 37, 40), 71, dtype)
    _hold(
        similarity.similarity_argmax(query, keys, similarity_kind, joint), query, keys, similarity_kind, joint
    )


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 128, 160])
@pytest.mark.parametrize("joint", [False, True])
def test_argmax_at_every_head_dim(head_dim, joint):
    query, keys = _features((1, 2, 5, head_dim), 40, seed=head_dim)
    _hold(similarity.similarity_argmax(query, keys, "cosine", joint), query, keys, "cosine", joint)


@pytest.mark.parametrize("rows,tokens", [(1, 1), (1, 31), (17, 32), (3, 33), (16, 200)])
def test_argmax_of_ragged_sizes(rows, tokens):
    query, keys = _features((1, 4 if rows == 1 else 1, rows, 16), tokens, seed=rows)
    _hold(similarity.similarity_argmax(query, keys, "dot", False), query, keys, "dot", False)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("label_batch", [1, 2])
def test_argmax_with_labels(joint, label_batch):
    query, keys = _features((2, 2, 37, 16), 45)
    labels = (_labels(label_batch, 37, 1), _labels(label_batch, 45, 2), None)
    labels[0][:, 5] = 0
    actual = similarity.similarity_argmax(query, keys, "cosine", joint, *labels)
    _hold(actual, query, keys, "cosine", joint, labels)
    assert (actual[0][:, :, 5] == -1).all() and (actual[1][:, :, 5] == float("-inf")).all()


@pytest.mark.parametrize("joint", [False, True])
def test_argmax_with_batch_index(joint):
    query, keys = _features((3, 2, 20, 16), 40, reference_batch=2)
    labels = (_labels(3, 20, 1), _labels(3, 40, 2), torch.tensor([1, 0, 1], dtype=torch.int32))
    _hold(
        similarity.similarity_argmax(query, keys, "cosine", joint, *labels),
        query,
        keys,
        "cosine",
        joint,
        labels,
    )


def test_argmax_of_any_strides():
    generator = torch.Generator().manual_seed(3)
    query = torch.randn((1, 40, 2, 32), generator=generator).transpose(1, 2)[..., ::2].expand(2, -1, -1, -1)
    keys = torch.randn((2, 2, 16, 45), generator=generator).mT
    labels = (_labels(40, 1, 4).T, _labels(45, 2, 5).T, None)
    for joint in (False, True):
        _hold(
            similarity.similarity_argmax(query, keys, "cosine", joint, *labels),
            query,
            keys,
            "cosine",
            joint,
            labels,
        )


def test_joint_argmax_of_channels_in_a_row():
    query, keys = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in _features((2, 8, 20, 40), 45))
    _hold(similarity.similarity_argmax(query, keys, "cosine", True), query, keys, "cosine", True)


@pytest.mark.parametrize("heads", [3, 19])
def test_joint_argmax_of_any_number_of_heads(heads):
    query, keys = _features((1, heads, 7, 24), 33)
    keys[:, -1] *= 5  # the last head counts
    _hold(similarity.similarity_argmax(query, keys, "cosine", True), query, keys, "cosine", True)


def test_split_keys_covers_the_keys():
    for programs in (1, 32, 300):
        for key_tiles in (1, 3, 64, 1000):
            splits, tiles = split_keys(programs, key_tiles, 128, 264)
            assert (splits - 1) * tiles < key_tiles <= splits * tiles and tiles <= 128


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("joint", [True, False])
def test_argmax_ties_go_to_the_lowest_index(exact, joint):
    tokens = 130  # several splits
    query, keys = torch.ones((1, 1, 3, 16)), torch.ones((1, 1, tokens, 16))
    keys[:, :, [40, 75, 120]] = 2
    index, score = similarity.similarity_argmax(query, keys, "dot", joint, exact=exact)
    assert (index == 40).all()
    index, _ = similarity.similarity_argmax(query, -keys, "dot", joint)
    assert (index == 0).all()


@triton.jit
def _pack_kernel(
    score_ptr, index_ptr, match_ptr, unpacked_score_ptr, unpacked_index_ptr, COUNT: tl.constexpr
):
    places = tl.arange(0, COUNT)
    match = _tile.pack_match(tl.load(score_ptr + places), tl.load(index_ptr + places))
    score, index = _tile.unpack_match(match)
    tl.store(match_ptr + places, match)
    tl.store(unpacked_score_ptr + places, score)
    tl.store(unpacked_index_ptr + places, index)


def test_packed_matches_are_in_order():
    """Packed matches compare as scores do, no match first. A lower index is better; -0 equals 0."""
    ascending = [
        (float("-inf"), -1),
        (float("-inf"), 3),
        (-3e38, 0),
        (-1.0, 2**31 - 1),
        (-1.0, 7),
        (-1e-45, 1),
        (-0.0, 8),
        (0.0, 4),
        (-0.0, 3),
    ]
    ascending += [
        (2e-45, 6),
        (1.0, 2),
        (1.5, 12),
        (1.5, 11),
        (float("inf"), 9),
        (float("inf"), 5),
        (float("nan"), 0),
    ]
    score = torch.tensor([pair[0] for pair in ascending])
    index = torch.tensor([pair[1] for pair in ascending], dtype=torch.int32)
    match, unpacked_score, unpacked_index = (
        torch.empty(16, dtype=torch.int64),
        torch.empty_like(score),
        torch.empty_like(index),
    )
    _pack_kernel[(1,)](score, index, match, unpacked_score, unpacked_index, 16)
    assert (match.diff() > 0).all()
    assert torch.equal(unpacked_index, index)
    torch.testing.assert_close(unpacked_score, score, rtol=0, atol=0, equal_nan=True)
    assert (
        torch.equal(match[:1] >> 32, torch.tensor([similarity.NOTHING.value])) and match[0] & 0xFFFFFFFF == 0
    )


def _counted(query, keys, similarity_kind, joint, labels=(None, None, None)):
    """The matches of `counted_argmax`, unpacked and with the norm of the query; checks their counts."""
    match, counts = similarity.counted_argmax(query, keys, similarity_kind, joint, *labels)
    order, index = (match >> 32).int(), (~match).int()
    assert counts.dtype == torch.int32 and torch.equal(
        counts, reference_rearrange.match_counts(index, keys.shape[2])
    )
    score = (order ^ ((order >> 31) & 0x7FFFFFFF)).view(torch.float32)
    if similarity_kind == "cosine":
        squares = query.double().square().sum(-1)
        score = (
            (score / (squares.sum(1, keepdim=True) if joint else squares).sqrt())
            .float()
            .masked_fill(index < 0, float("-inf"))
        )
    return index, score


@pytest.mark.slow
@pytest.mark.parametrize("similarity_kind", ["dot", "cosine"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    "rows,tokens", [(5, 130), (70, 20)]
)  # several splits, fewer queries than keys; one, more queries than keys
def test_counted_argmax(similarity_kind, joint, rows, tokens):
    query, keys = _features((2, 2 if joint else 1, rows, 16), tokens, reference_batch=3)
    labels = (None, None, torch.tensor([2, 0], dtype=torch.int32))
    _hold(_counted(query, keys, similarity_kind, joint, labels), query, keys, similarity_kind, joint, labels)


@pytest.mark.parametrize("rising", [True, False])
def test_counted_argmax_holds_when_later_splits_are_better(rising):
    """Five splits of negative scores: some better than all before, some worse, two equal."""
    keys = torch.arange(-150.0, 0.0) if rising else -torch.arange(1.0, 151.0)
    keys[70] = keys[149 if rising else 0] = -0.5
    query, keys = torch.ones((1, 1, 30, 1)), keys.reshape(1, 1, -1, 1)
    query[:, :, 20] = 2
    index, score = _counted(query.expand(-1, -1, -1, 16), keys.expand(-1, -1, -1, 16) / 16, "dot", False)
    assert (index == (70 if rising else 0)).all()
    assert torch.equal(score, (-0.5 * query).squeeze(-1))


@pytest.mark.parametrize("similarity_kind", ["dot", "cosine"])
def test_counted_argmax_of_a_split_without_admissible_keys(similarity_kind):
    query, keys = _features((2, 1, 17, 16), 100)
    labels = (_labels(2, 17, 1), _labels(2, 100, 2), None)
    labels[0][:, 5] = 0
    labels[1][0, 32:64], labels[1][1, :96] = 0, 0  # the second of four splits; all but the last
    actual = _counted(query, keys, similarity_kind, True, labels)
    _hold(actual, query, keys, similarity_kind, True, labels)
    assert (actual[0][:, :, 5] == -1).all() and (actual[1][:, :, 5] == float("-inf")).all()
    assert set(actual[0][1].unique().tolist()) <= {-1, 96, 97, 98, 99}


@pytest.mark.parametrize("joint", [False, True])
def test_counted_argmax_of_nan(joint):
    """A NaN in any split becomes the score; the match and the counts name the first token."""
    query, keys = _features((1, 1, 20, 16), 130)
    query[0, 0, 3, 2] = float("nan")
    index, score = _counted(query, keys, "cosine", joint)
    assert score.isnan().sum() == 1 and score[0, 0, 3].isnan() and index[0, 0, 3] == 0
    query[0, 0, 7, 2] = float("inf")  # the cosine gives NaN for it as well
    index, score = _counted(query, keys, "cosine", joint)
    assert score.isnan().sum() == 2 and score[0, 0, [3, 7]].isnan().all() and (index[0, 0, [3, 7]] == 0).all()
    keys[0, 0, 70, 5] = float("nan")
    index, score = _counted(query, keys, "cosine", joint)
    assert score.isnan().all() and (index == 0).all()


@pytest.mark.parametrize("similarity_kind", ["dot", "cosine"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_argmax_has_little_regret(dtype, similarity_kind):
    query, keys = _features((1, 1, 50, 40), 170, dtype)
    index, score = similarity.similarity_argmax(query, keys, similarity_kind, False, exact=False)
    table = reference.scores(query.double(), keys.double(), similarity_kind, False)
    best, runner_up = table.topk(2, dim=-1).values.unbind(-1)
    slack = 2**-15 * best.abs()
    assert (table.take_along_dim(index.long().unsqueeze(-1), -1).squeeze(-1) >= best - slack).all()
    assert ((score - best).abs() <= slack).all()
    clear = best - runner_up > slack
    assert clear.any() and torch.equal(index[clear], table.argmax(-1).int()[clear])


def test_packed_argmax_with_labels():
    query, keys = _features((2, 2, 20, 16), 71)
    labels = (_labels(2, 20, 1), _labels(2, 71, 2), None)
    index, score = similarity.similarity_argmax(query, keys, "cosine", False, *labels, exact=False)
    expected_index, expected_score = reference.similarity_argmax(
        query.double(), keys.double(), "cosine", False, *labels
    )
    assert torch.equal(index, expected_index)
    found = index >= 0
    assert not found.all() and (score[~found] == float("-inf")).all()
    assert ((score - expected_score).abs()[found] <= 2**-15 * expected_score.abs()[found]).all()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("similarity_kind", ["dot", "cosine"])
@pytest.mark.parametrize("joint", [True, False])
def test_argmax_of_nan(exact, similarity_kind, joint):
    query, keys = _features((2, 2, 20, 16), 40)
    query[0, 0, 3, 2] = float("nan")
    keys[1, 1, 39, 5] = float("nan")
    index, score = similarity.similarity_argmax(query, keys, similarity_kind, joint, exact=exact)
    expected = reference.similarity_argmax(query, keys, similarity_kind, joint)[1]
    assert torch.equal(score.isnan(), expected.isnan()) and score.isnan().any() and not score.isnan().all()
    assert ((index >= 0) & (index < 40)).all()


@pytest.mark.parametrize("joint", [True, False])
def test_argmax_of_nan_that_labels_hide(joint):
    query, keys = _features((1, 1, 20, 16), 71)
    query[0, 0, 3, 2], keys[:, :, 40] = float("nan"), float("nan")
    labels = (torch.ones((1, 20), dtype=torch.int32), torch.ones((1, 71), dtype=torch.int32), None)
    labels[0][0, 3], labels[1][0, 40] = 4, 2
    for kind in ("dot", "cosine"):
        index, score = similarity.similarity_argmax(query, keys, kind, joint, *labels)
        assert not score.isnan().any() and (index != 40).all()
        assert (index[:, :, 3] == -1).all() and (score[:, :, 3] == float("-inf")).all()


def test_argmax_of_infinite_scores():
    query, keys = _features((1, 1, 5, 16), 40)
    query[0, 0, 2], keys[0, 0, 33] = query[0, 0, 2].abs(), float("inf")
    expected = reference.similarity_argmax(query, keys, "dot", False)
    actual = similarity.similarity_argmax(query, keys, "dot", False)
    assert actual[0][0, 0, 2] == 33 and actual[1][0, 0, 2] == float("inf")
    assert torch.equal(actual[1].isnan(), expected[1].isnan())


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("k", [1, 5, 64])
def test_topk(joint, k):
    query, keys = _features((1, 2 if joint else 1, 19, 40), 71, torch.float16 if k == 5 else torch.float32)
    _hold(similarity.similarity_topk(query, keys, k, "cosine", joint), query, keys, "cosine", joint, k=k)


def test_topk_of_few_admissible_keys():
    query, keys = _features((2, 1, 19, 16), 45)
    labels = (
        _labels(2, 19, 1),
        _labels(1, 45, 2) * (torch.rand(45, generator=torch.Generator().manual_seed(3)) < 0.2),
        None,
    )
    actual = similarity.similarity_topk(query, keys, 8, "dot", False, *labels)
    _hold(actual, query, keys, "dot", False, labels, k=8)
    assert (actual[0] == -1).any() and (actual[1][actual[0] == -1] == float("-inf")).all()


def test_topk_ties_go_to_the_lowest_index():
    keys = torch.ones((1, 1, 100, 16))
    keys[:, :, [20, 50, 90]] = 2
    index, _ = similarity.similarity_topk(torch.ones((1, 1, 3, 16)), keys, 6, "dot", False)
    assert (index == torch.tensor([20, 50, 90, 0, 1, 2])).all()
    index, _ = similarity.similarity_topk(-torch.ones((1, 1, 3, 16)), keys, 100 - 40, "dot", True)
    assert (index == torch.tensor([x for x in range(63) if x not in (20, 50)][:60])).all()


@pytest.mark.parametrize("similarity_kind", ["dot", "cosine"])
def test_topk_of_nan_as_the_reference_sorts_it(similarity_kind):
    query, keys = _features((1, 1, 10, 16), 71)
    query[0, 0, 3, 2] = float("nan")
    keys[0, 0, 65, 5] = float("nan")
    actual = similarity.similarity_topk(query, keys, 4, similarity_kind, False)
    expected = reference.similarity_topk(query, keys, 4, similarity_kind, False)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1].isnan(), expected[1].isnan())


def test_packed_argmax_of_negative_scores():
    """Bits of negative scores compare in reverse: rows with negative scores only need a second walk."""
    query, keys = _features((1, 2, 40, 16), 170)
    query[..., 0], keys[..., 0], query[:, 1, 7, 0] = 0, 1, -50
    query[:, 0, :, 0] = -50
    keys[:, :, [33, 90, 160]] = keys[:, :, [5]]
    index, score = similarity.similarity_argmax(query, keys, "dot", False, exact=False)
    table = reference.scores(query.double(), keys.double(), "dot", False)
    best = table.amax(-1)
    assert (best[:, 0] < 0).all() and best[0, 1, 7] < 0 and (best[0, 1, :7] > 0).all()
    assert ((score - best).abs() <= 2**-15 * best.abs()).all()
    clear = best - table.masked_fill(table == best[..., None], float("-inf")).amax(-1) > 2**-15 * best.abs()
    assert clear.any() and torch.equal(index[clear], table.argmax(-1).int()[clear])
