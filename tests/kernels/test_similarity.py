"""similarity_argmax and similarity_topk: what must hold on every backend, then scores against float64."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from qalign_kernels import similarity_argmax, similarity_topk
from qalign_kernels.reference.similarity import scores
from qalign_kernels.testing import (
    judge,
    judge_formula,
    judge_match,
    matched_queries,
    random_features,
    random_integers,
)

pytestmark = pytest.mark.usefixtures("poisoned")
SETTINGS = [("cosine", "joint"), ("cosine", "per_head"), ("dot", "joint"), ("dot", "per_head")]


@pytest.fixture
def pair(device):
    """query [2, 2, 23, 40] and reference [2, 2, 41, 40]."""
    return [random_features(2, 2, n, 40, seed=n, device=device) for n in (23, 41)]


def judged(match, query, reference, similarity, heads, packed=False, **options):
    """The verdict on a match by the score tables of its arguments."""
    joint = heads == "joint"
    tables = [
        scores(q, r, similarity, joint, **options)
        for q, r in ((query, reference), (query.double(), reference.double()))
    ]
    return judge_match(*match, *tables, query.shape[-1] * (query.shape[1] if joint else 1), packed=packed)


@pytest.mark.parametrize(
    ("head_dim", "similarity", "heads"),
    [
        (32, "cosine", "joint"),
        (40, "cosine", "per_head"),
        (40, "dot", "joint"),
        (160, "cosine", "joint"),
        (160, "dot", "per_head"),
    ],
)
def test_best_score_in_every_precision(precision, head_dim, similarity, heads, device):
    backend, dtype = precision
    query, reference = (
        random_features(1, 2, n, head_dim, seed=n, dtype=dtype, device=device) for n in (19, 35)
    )
    match = similarity_argmax(query, reference, similarity=similarity, heads=heads, backend=backend)
    assert match.index.dtype == torch.int32 and match.score.dtype == torch.float32
    assert match.index.shape == match.score.shape == (1, 1 if heads == "joint" else 2, 19)
    assert judged(match, query, reference, similarity, heads).passed


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_best_score_at_the_other_head_dims(backend, head_dim, device):
    query, reference = (random_features(1, 2, n, head_dim, seed=n, device=device) for n in (19, 35))
    assert judged(
        similarity_argmax(query, reference, backend=backend), query, reference, "cosine", "joint"
    ).passed


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("heads", ["joint", "per_head"])
def test_clear_match_is_found(precision, heads, exact, device):
    backend, dtype = precision
    reference = random_features(1, 2, 70, 64, seed=0, dtype=dtype, device=device)
    query, index = matched_queries(reference, 20, seed=1)
    match = similarity_argmax(query, reference, heads=heads, exact=exact, backend=backend)
    assert torch.equal(match.index, index.expand_as(match.index))


def test_packed_scores_lose_seven_bits_and_no_more(device, backend):
    query, reference = (random_features(1, 2, n, 40, seed=n, device=device) for n in (20, 150))
    match = similarity_argmax(query, reference, exact=False, backend=backend)
    assert judged(match, query, reference, "cosine", "joint", packed=True).passed


def test_ties_go_to_the_lowest_index(backend, device):
    # whole numbers: scores are exact in any order of summation
    distinct = random_integers(-3, 4, 1, 2, 17, 32, seed=2, device=device).float()
    reference = distinct.repeat(
        1, 1, 12, 1
    )  # each token comes 12 times, 17 apart: within a tile and across tiles
    query = distinct[:, :, :9]
    for heads in ("joint", "per_head"):
        match = similarity_argmax(query, reference, similarity="dot", heads=heads, backend=backend)
        assert int(match.index.max()) < 17
        assert judged(match, query, reference, "dot", heads).passed
    zeros = similarity_argmax(torch.zeros_like(query), reference, backend=backend)
    assert torch.equal(zeros.index, torch.zeros_like(zeros.index)) and torch.equal(
        zeros.score, torch.zeros_like(zeros.score)
    )


def test_topk_ties_go_to_the_lowest_indices(backend, device):
    token = random_integers(-3, 4, 1, 1, 1, 32, seed=3, device=device).float()
    index = similarity_topk(token, token.repeat(1, 1, 90, 1), 5, similarity="dot", backend=backend).index
    assert index.flatten().tolist() == [0, 1, 2, 3, 4]


def test_joint_is_per_head_for_one_head(backend, pair):
    query, reference = (x[:, :1] for x in pair)
    joint, per_head = (
        similarity_argmax(query, reference, heads=heads, backend=backend) for heads in ("joint", "per_head")
    )
    assert (
        judged(joint, query, reference, "cosine", "per_head").passed
        and judged(per_head, query, reference, "cosine", "joint").passed
    )


def test_joint_is_per_head_over_concatenated_heads(backend, pair):
    query, reference = pair
    joined = [x.transpose(1, 2).flatten(2).unsqueeze(1) for x in pair]
    assert judged(similarity_argmax(query, reference, backend=backend), *joined, "cosine", "joint").passed


def test_only_cosine_ignores_the_norm_of_keys(backend, pair):
    query, reference = pair
    scaled = reference * torch.linspace(0.1, 10, 41, device=query.device).unsqueeze(-1)
    assert judged(
        similarity_argmax(query, scaled, backend=backend), query, reference, "cosine", "joint"
    ).passed
    assert judged(
        similarity_argmax(query, scaled, similarity="dot", backend=backend), query, scaled, "dot", "joint"
    ).passed
    large = reference.clone()
    large[:, :, 7] *= 1000
    hub = similarity_argmax(query, large, similarity="dot", backend=backend).index == 7
    assert hub.float().mean() > 0.3 and not torch.equal(
        similarity_argmax(query, large, backend=backend).index == 7, hub
    )


def test_the_norm_of_a_query_never_matters(backend, pair):
    query, reference = pair
    for similarity in ("cosine", "dot"):
        match = similarity_argmax(4 * query, reference, similarity=similarity, backend=backend)
        rescaled = match._replace(score=match.score / (4 if similarity == "dot" else 1))
        assert judged(rescaled, query, reference, similarity, "joint").passed


def test_permuted_references_permute_the_map(backend, device):
    reference = random_features(1, 2, 60, 40, seed=4, device=device)
    query, index = matched_queries(reference, 30, seed=5)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(6)).to(device)
    match = similarity_argmax(query, reference[:, :, order], backend=backend)
    assert torch.equal(order[match.index.long()].int(), index)


@pytest.mark.parametrize(("similarity", "heads"), SETTINGS)
def test_labels_admit_pairs_whose_sets_meet(backend, similarity, heads, pair):
    query, reference = pair
    labels = {
        "query_labels": random_integers(0, 8, 2, 23, seed=7, device=query.device),
        "reference_labels": random_integers(1, 8, 1, 41, seed=8, device=query.device),
    }
    labels["query_labels"][:, 0], labels["query_labels"][:, 1] = 0, -1
    match = similarity_argmax(query, reference, similarity=similarity, heads=heads, backend=backend, **labels)
    assert judged(match, query, reference, similarity, heads, **labels).passed
    assert torch.equal(match.index[:, :, 0], torch.full_like(match.index[:, :, 0], -1))
    assert torch.equal(match.score[:, :, 0], torch.full_like(match.score[:, :, 0], -math.inf))
    labels["reference_labels"] = labels["reference_labels"][:, :12]
    topk = similarity_topk(
        query, reference[:, :, :12], 8, similarity=similarity, heads=heads, backend=backend, **labels
    )
    assert judged(topk, query, reference[:, :, :12], similarity, heads, **labels).passed
    assert torch.equal(topk.index < 0, topk.score == -math.inf) and bool((topk.index < 0).any())


def test_batch_index_is_explicit_indexing(backend, pair):
    query, reference = pair
    rows = torch.tensor([1, 0], dtype=torch.int32, device=query.device)
    assert judged(
        similarity_argmax(query, reference, batch_index=rows, backend=backend),
        query,
        reference[[1, 0]],
        "cosine",
        "joint",
    ).passed
    shared = torch.zeros(2, dtype=torch.int32, device=query.device)
    match = similarity_topk(query, reference[:1], 4, batch_index=shared, backend=backend)
    assert judged(match, query, reference[[0, 0]], "cosine", "joint").passed


def test_strides_do_not_matter(backend, device):
    packed = random_features(2, 37, 2, 2, 48, seed=9, device=device)
    query, reference = packed[..., 3:43].permute(2, 0, 3, 1, 4)
    assert judged(
        similarity_argmax(query, reference, backend=backend), query, reference, "cosine", "joint"
    ).passed
    shared = reference[:1].expand(2, -1, -1, -1)
    assert judged(
        similarity_argmax(query, shared, heads="per_head", backend=backend),
        query,
        shared,
        "cosine",
        "per_head",
    ).passed


def test_offsets_past_two_gigabytes(backend, far):
    for heads in ("joint", "per_head"):
        assert judged(
            similarity_argmax(far, far, heads=heads, backend=backend), far, far, "cosine", heads
        ).passed


@pytest.mark.parametrize(("query_tokens", "reference_tokens"), [(1, 1), (1, 50), (50, 1), (65, 129)])
def test_ragged_sizes(backend, query_tokens, reference_tokens, device):
    query, reference = (
        random_features(1, 1, n, 40, seed=n, device=device) for n in (query_tokens, reference_tokens)
    )
    assert judged(
        similarity_argmax(query, reference, backend=backend), query, reference, "cosine", "joint"
    ).passed


@pytest.mark.parametrize(("similarity", "heads"), SETTINGS)
@pytest.mark.parametrize("k", [1, 5, 14])
def test_topk(backend, k, similarity, heads, pair):
    query, reference = pair[0][:, :, :9], pair[1][:, :, : max(k, 13)]
    match = similarity_topk(query, reference, k, similarity=similarity, heads=heads, backend=backend)
    assert match.index.shape == match.score.shape == (2, 1 if heads == "joint" else 2, 9, k)
    assert bool((match.score[..., 1:] <= match.score[..., :-1]).all())
    assert judged(match, query, reference, similarity, heads).passed


@pytest.mark.parametrize("k", [40, 41])
def test_topk_of_nearly_all_tokens(k, pair):
    query, reference = pair
    sets = [random_integers(1, 8, *shape, seed=7, device=query.device) for shape in ((2, 23), (1, 41))]
    labels = dict(zip(("query_labels", "reference_labels"), sets))
    for options in ({}, labels):
        match = similarity_topk(query, reference, k, backend="tiled", **options)
        assert judged(match, query, reference, "cosine", "joint", **options).passed


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_nan_gives_nan_and_an_index_in_range(backend, similarity, exact, pair):
    query, reference = (x.clone() for x in pair)
    query[0, 1, 4, 3] = float("nan")
    match = similarity_argmax(query, reference, similarity=similarity, exact=exact, backend=backend)
    bad = torch.zeros(2, 1, 23, dtype=torch.bool, device=query.device)
    bad[0, 0, 4] = True
    assert torch.equal(match.score.isnan(), bad)
    assert 0 <= int(match.index.min()) and int(match.index.max()) < 41
    reference[1, 0, 40, 0] = float("nan")  # one key: every score row of that picture holds a NaN
    bad[1] = True
    match = similarity_argmax(query, reference, similarity=similarity, exact=exact, backend=backend)
    assert torch.equal(match.score.isnan(), bad)
    assert 0 <= int(match.index.min()) and int(match.index.max()) < 41
    topk = similarity_topk(query, reference, 3, similarity=similarity, backend=backend)
    assert -1 <= int(topk.index.min()) and int(topk.index.max()) < 41


def test_infinite_features_keep_the_index_in_range(backend, pair):
    query, reference = (x.clone() for x in pair)
    query[0, 0, 0, 0], reference[1, 0, 0, 0] = math.inf, -math.inf
    for similarity in ("cosine", "dot"):
        match = similarity_argmax(query, reference, similarity=similarity, backend=backend)
        assert -1 <= int(match.index.min()) and int(match.index.max()) < 41


def test_repeats_are_equal_in_every_bit(backend, pair):
    first, second = (similarity_argmax(*pair, backend=backend) for _ in range(2))
    assert torch.equal(first.index, second.index) and torch.equal(first.score, second.score)
    first, second = (similarity_topk(*pair, 3, backend=backend) for _ in range(2))
    assert torch.equal(first.index, second.index) and torch.equal(first.score, second.score)


@pytest.mark.parametrize(("similarity", "heads"), SETTINGS)
def test_score_gradient_is_that_of_the_matched_pair(similarity, heads, pair):
    query, reference = pair
    index = similarity_argmax(
        query, reference, similarity=similarity, heads=heads, backend="tiled"
    ).index.long()

    def gradients(query, reference, score):
        leaves = [x.detach().clone().requires_grad_() for x in (query, reference)]
        found = score(*leaves)
        weight = torch.linspace(-1, 1, found.shape[-1], dtype=found.dtype)
        return torch.autograd.grad((found * weight).sum(), leaves)

    def formula(query, reference):
        query, reference = (
            x.transpose(1, 2).flatten(2).unsqueeze(1) if heads == "joint" else x for x in (query, reference)
        )
        if similarity == "cosine":
            query, reference = normalize(query, dim=-1), normalize(reference, dim=-1)
        return (query * reference.take_along_dim(index.unsqueeze(-1), dim=2)).sum(-1)

    actual = gradients(
        query,
        reference,
        lambda *x: similarity_argmax(*x, similarity=similarity, heads=heads, backend="tiled").score,
    )
    truth = gradients(query.double(), reference.double(), formula)
    for got, same, exact in zip(actual, gradients(query, reference, formula), truth):
        assert judge(got, same, exact, 120).passed


def test_float64_scores_are_float64(pair):
    query, reference = (x.double() for x in pair)
    for backend in ("tiled", "reference"):
        match = similarity_argmax(query, reference, backend=backend)
        assert match.score.dtype == torch.float64
        assert judge_formula(
            match.score, lambda q, r: scores(q, r, "cosine", True).amax(-1), query, reference, reduction=1
        ).passed
