"""qalign_attention: each reading against its formula, and what must hold between the readings."""

import pytest
import torch
from torch.nn.functional import normalize
from torch.nn.functional import scaled_dot_product_attention as sdpa

from qalign_kernels import Segment, attention, match_counts, qalign_attention, rearrange_kv, similarity_argmax
from qalign_kernels._choices import REFINEMENTS
from qalign_kernels.testing import (
    judge,
    judge_exact,
    judge_formula,
    matched_queries,
    random_features,
    random_integers,
)

pytestmark = pytest.mark.usefixtures("poisoned")


def draw(device, batch=1, tokens=23, ref_tokens=41, head_dim=40, value_dim=40, dtype=torch.float32):
    """Draw query, ref_query, ref_key, ref_value and the map.

    Every query is a noisy copy of one reference token, so the map is the same in every dtype.
    """
    widths = (head_dim, head_dim, value_dim)
    references = [
        random_features(batch, 2, ref_tokens, width, seed=i, dtype=dtype, device=device)
        for i, width in enumerate(widths)
    ]
    query, index = matched_queries(references[0], tokens, seed=3)
    return [query, *references], index


def options(refinement, features):
    """The arguments that a reading needs beside the tensors."""
    query = features[0]
    own_key = (
        random_features(*query.shape, seed=9, dtype=query.dtype, device=query.device)
        if refinement == "warped_values"
        else None
    )
    return {"refinement": refinement, "own_key": own_key, "topk": 3}


def by_reference(settings, **more):
    """The reading as its formula, on tensors of any precision."""

    def formula(query, ref_query, ref_key, ref_value):
        arguments = settings | more
        if arguments.get("own_key") is not None:
            arguments["own_key"] = arguments["own_key"].to(query.dtype)
        return qalign_attention(query, ref_query, ref_key, ref_value, backend="reference", **arguments)

    return formula


@pytest.mark.parametrize("refinement", REFINEMENTS)
@pytest.mark.parametrize("head_dim", [40, 160])
def test_every_reading_in_every_precision(precision, refinement, head_dim, device):
    backend, dtype = precision
    features, _ = draw(device, batch=1, head_dim=head_dim, value_dim=head_dim, dtype=dtype)
    settings = options(refinement, features)
    output = qalign_attention(*features, backend=backend, **settings)
    assert output.dtype == dtype and output.is_contiguous()
    assert judge_formula(output, by_reference(settings), *features, reduction=2 * head_dim).passed


@pytest.mark.slow
@pytest.mark.parametrize("refinement", REFINEMENTS)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_every_reading_at_the_other_head_dims(backend, refinement, head_dim, device):
    features, _ = draw(device, batch=1, tokens=9, head_dim=head_dim, value_dim=head_dim)
    settings = options(refinement, features)
    output = qalign_attention(*features, backend=backend, **settings)
    assert judge_formula(output, by_reference(settings), *features, reduction=2 * head_dim).passed


@pytest.mark.parametrize("heads", ["joint", "per_head"])
def test_rearranged_is_attention_over_gathered_keys(backend, heads, device):
    features, index = draw(device)

    def formula(query, ref_query, ref_key, ref_value):
        return sdpa(
            query, *(x.take_along_dim(index.long().unsqueeze(-1), dim=2) for x in (ref_key, ref_value))
        )

    assert judge_formula(
        qalign_attention(*features, heads=heads, backend=backend), formula, *features, reduction=80
    ).passed


def test_the_order_of_the_map_does_not_matter(backend, device):
    features, index = draw(device)
    query, _, ref_key, ref_value = features
    order = torch.randperm(index.shape[2], generator=torch.Generator().manual_seed(4)).to(device)
    output = qalign_attention(*features, backend=backend)

    def over_permuted_map(query, ref_query, ref_key, ref_value):
        return sdpa(query, *rearrange_kv(ref_key, ref_value, index[:, :, order], backend="reference"))

    assert judge_formula(output, over_permuted_map, *features, reduction=80).passed
    counts = match_counts(index[:, :, order], ref_key.shape[2], backend=backend)
    counted = attention(query, Segment(ref_key, ref_value, counts=counts), backend=backend)
    assert judge_formula(counted, over_permuted_map, *features, reduction=80).passed


@pytest.mark.parametrize("refinement", ["rearranged", "guided", "topk"])
def test_permuted_queries_permute_the_output(backend, refinement, device):
    features, _ = draw(device)
    settings = options(refinement, features)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(5)).to(device)
    output = qalign_attention(features[0][:, :, order], *features[1:], backend=backend, **settings)

    def permuted(query, *references):
        return by_reference(settings)(query, *references)[:, :, order]

    assert judge_formula(output, permuted, *features, reduction=80).passed


@pytest.mark.parametrize("refinement", ["warped_values", "warped_output", "soft", "none"])
def test_permuted_references_change_nothing(backend, refinement, device):
    features, _ = draw(device)
    settings = options(refinement, features)
    order = torch.randperm(41, generator=torch.Generator().manual_seed(6)).to(device)
    output = qalign_attention(
        features[0], *(x[:, :, order] for x in features[1:]), backend=backend, **settings
    )
    assert judge_formula(output, by_reference(settings), *features, reduction=80).passed


def test_the_picture_itself_as_reference_is_self_attention(backend, device):
    query, key, value = (random_features(1, 2, 30, 40, seed=s, device=device) for s in range(3))
    output = qalign_attention(query, query, key, value, backend=backend)
    assert judge_formula(output, sdpa, query, key, value, reduction=40).passed


def test_none_is_the_matched_value(backend, device):
    features, index = draw(device, value_dim=48)
    output = qalign_attention(*features, refinement="none", backend=backend)
    assert torch.equal(output, features[3].take_along_dim(index.long().unsqueeze(-1), dim=2))


def test_one_best_token_is_none(backend, device):
    features, _ = draw(device)
    output = qalign_attention(*features, refinement="topk", topk=1, backend=backend)
    assert judge_formula(output, by_reference({"refinement": "none"}), *features, reduction=40).passed


@pytest.mark.parametrize("contrast", [1.0, 1.67])
def test_all_best_tokens_are_attention(backend, contrast, device):
    features, _ = draw(device, tokens=5, ref_tokens=11)
    output = qalign_attention(*features, refinement="topk", topk=11, contrast=contrast, backend=backend)

    def formula(query, ref_query, ref_key, ref_value):
        return attention(query, Segment(ref_key, ref_value), contrast=contrast, backend="reference")

    assert judge_formula(output, formula, *features, reduction=41).passed


def test_guided_without_strength_is_attention(backend, device):
    features, _ = draw(device)
    output = qalign_attention(*features, refinement="guided", strength=0.0, backend=backend)
    assert judge_formula(output, lambda q, rq, k, v: sdpa(q, k, v), *features, reduction=40).passed


@pytest.mark.parametrize("refinement", ["guided", "soft"])
def test_endless_strength_is_a_hard_choice(backend, refinement, device):
    features, index = draw(device)
    output = qalign_attention(*features, refinement=refinement, strength=3000.0, backend=backend)
    reading = {"guided": "none", "soft": "rearranged"}[refinement]
    assert judge_formula(
        output, by_reference({"refinement": reading, "heads": "per_head"}), *features, reduction=80
    ).passed


def test_soft_without_strength_is_the_mean_value(backend, device):
    features, _ = draw(device)
    output = qalign_attention(*features, refinement="soft", strength=0.0, backend=backend)
    assert judge_formula(
        output, lambda q, rq, k, v: v.mean(2, keepdim=True).expand(-1, -1, 23, -1), *features, reduction=41
    ).passed


def test_guided_adds_per_head_similarity_to_logits(backend, device):
    features, _ = draw(device)
    output = qalign_attention(
        *features, refinement="guided", strength=7.0, heads="joint", scale=0.3, backend=backend
    )

    def formula(query, ref_query, ref_key, ref_value):
        similarity = normalize(query, dim=-1) @ normalize(ref_query, dim=-1).mT
        return (0.3 * query @ ref_key.mT + 7.0 * similarity).softmax(-1) @ ref_value

    assert judge_formula(output, formula, *features, reduction=40).passed


def test_warped_values_keep_the_own_map(backend, device):
    features, index = draw(device)
    own_key = random_features(1, 2, 23, 40, seed=7, device=device)
    output = qalign_attention(*features, refinement="warped_values", own_key=own_key, backend=backend)

    def formula(query, ref_query, ref_key, ref_value, own_key):
        return sdpa(query, own_key, ref_value.take_along_dim(index.long().unsqueeze(-1), dim=2))

    assert judge_formula(output, formula, *features, own_key, reduction=80).passed


def test_warped_output_is_reference_self_attention_at_matches(backend, device):
    features, index = draw(device, value_dim=48)
    output = qalign_attention(*features, refinement="warped_output", contrast=1.67, backend=backend)

    def formula(query, ref_query, ref_key, ref_value):
        return sdpa(ref_query, ref_key, ref_value).take_along_dim(index.long().unsqueeze(-1), dim=2)

    assert judge_formula(output, formula, *features, reduction=80).passed


@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_another_query_may_ask(backend, refinement, device):
    """The match follows `match_query`, the logits follow `query`."""
    features, _ = draw(device)
    settings = options(refinement, features) | {"strength": 5.0}
    attending = random_features(*features[0].shape, seed=11, device=device)
    output = qalign_attention(attending, *features[1:], match_query=features[0], backend=backend, **settings)

    def formula(query, asking, *references):
        return by_reference(settings, match_query=asking)(query, *references)

    assert judge_formula(output, formula, attending, *features, reduction=80).passed
    own = by_reference(settings)(attending, *features[1:])
    assert not torch.allclose(output, own, atol=1e-3)  # asking by itself, it would have found others


def test_alignment_query_defaults_to_the_query(backend, device):
    features, _ = draw(device, tokens=9)
    for refinement in REFINEMENTS:
        settings = options(refinement, features)
        both = (
            qalign_attention(*features, match_query=asking, backend=backend, **settings)
            for asking in (None, features[0])
        )
        assert torch.equal(*both)


def test_joint_is_per_head_for_one_head(backend, device):
    features = [x[:, :1] for x in draw(device)[0]]
    for heads in ("joint", "per_head"):
        output = qalign_attention(*features, heads=heads, backend=backend)
        assert judge_formula(output, by_reference({"heads": "joint"}), *features, reduction=40).passed


@pytest.mark.parametrize(
    ("refinement", "heads"),
    [*((name, "per_head") for name in REFINEMENTS), ("rearranged", "joint"), ("topk", "joint")],
)
def test_contrast_labels_and_another_width(backend, refinement, heads, device):
    features, index = draw(device, value_dim=64)
    ref_labels = random_integers(1, 4, 1, 41, seed=8, device=device)
    query_labels = ref_labels.take_along_dim(index.squeeze(1).long(), dim=1)
    query_labels[:, 0] = 4  # a set that no reference token meets
    labels = {"query_labels": query_labels, "ref_labels": ref_labels}
    settings = options(refinement, features) | labels | {"contrast": 1.67, "strength": 5.0, "heads": heads}
    output = qalign_attention(*features, backend=backend, **settings)
    assert judge_formula(output, by_reference(settings), *features, reduction=80).passed
    if refinement not in ("warped_values", "soft"):  # these attend the warped tokens of others
        assert judge_exact(output[:, :, 0], torch.zeros_like(output[:, :, 0])).passed


@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_batch_index_is_explicit_indexing(backend, refinement, device):
    features, _ = draw(device, batch=2)
    rows = torch.tensor([1, 1], dtype=torch.int32, device=device)
    query = matched_queries(features[1][[1, 1]], 23, seed=10)[0]
    features = [query, *features[1:]]
    settings = options(refinement, features)
    output = qalign_attention(*features, batch_index=rows, backend=backend, **settings)

    def explicit(query, *references):
        return by_reference(settings)(query, *(x[[1, 1]] for x in references))

    assert judge_formula(output, explicit, *features, reduction=80).passed


@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_strides_do_not_matter(backend, refinement, device):
    packed = random_features(1, 37, 3, 2, 48, seed=11, device=device)
    references = [x.expand(2, -1, -1, -1) for x in packed[..., 3:43].permute(2, 0, 3, 1, 4)]
    query = matched_queries(references[0], 20, seed=12)[0].transpose(1, 2).contiguous().transpose(1, 2)
    features = [query, *references]
    settings = options(refinement, features)
    assert judge_formula(
        qalign_attention(*features, backend=backend, **settings),
        by_reference(settings),
        *features,
        reduction=80,
    ).passed


@pytest.mark.parametrize("sizes", [(1, 1), (1, 30), (30, 1), (33, 70)])
def test_ragged_sizes(backend, sizes, device):
    features, _ = draw(device, batch=1, tokens=sizes[0], ref_tokens=sizes[1])
    assert judge_formula(
        qalign_attention(*features, backend=backend), by_reference({}), *features, reduction=80
    ).passed


@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_a_nan_query_gives_nan_in_its_row(backend, refinement, device):
    features, _ = draw(device)
    settings = options(refinement, features)
    features[0] = features[0].clone()
    features[0][0, 1, 4, 3] = float("nan")
    output = qalign_attention(*features, heads="per_head", backend=backend, **settings)
    assert bool(output[0, 1, 4].isnan().all())
    assert not bool(output[0, 0].isnan().any())


@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_nan_reference_query_gives_nan_where_compared(backend, refinement, device):
    features, _ = draw(device)
    settings = options(refinement, features)
    features[1] = features[1].clone()
    features[1][0, 1, 4, 3] = float("nan")
    output = qalign_attention(*features, heads="per_head", backend=backend, **settings)
    assert bool(output[0, 1].isnan().all())
    assert not bool(output[0, 0].isnan().any())


def test_no_strength_with_labels_is_attention_with_labels(backend, device):
    (query, ref_query, key, value), _ = draw(device)
    labels, ref_labels = (random_integers(1, 4, 1, x.shape[2], seed=21, device=device) for x in (query, key))
    guided = qalign_attention(
        query,
        ref_query,
        key,
        value,
        refinement="guided",
        strength=0.0,
        query_labels=labels,
        ref_labels=ref_labels,
        backend=backend,
    )
    plain = attention(query, Segment(key, value, labels=ref_labels), query_labels=labels, backend=backend)
    exact = attention(
        query.double(),
        Segment(key.double(), value.double(), labels=ref_labels),
        query_labels=labels,
        backend="reference",
    )
    assert judge(guided, plain, exact, reduction=key.shape[2]).passed


@pytest.mark.parametrize("refinement", ["rearranged", "guided", "topk"])
def test_repeats_are_equal_in_every_bit(backend, refinement, device):
    features, _ = draw(device)
    settings = options(refinement, features)
    assert torch.equal(
        *(qalign_attention(*features, contrast=1.67, backend=backend, **settings) for _ in range(2))
    )


@pytest.mark.parametrize("contrast", [1.0, 1.67])
@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_gradients_are_those_of_the_formula(refinement, contrast, device):
    features, _ = draw(device)
    settings = options(refinement, features) | {"contrast": contrast, "strength": 3.0}
    weights = random_features(1, 2, 23, 40, seed=13, device=device)

    def gradients(dtype, backend):
        leaves = [x.detach().to(dtype).requires_grad_() for x in features]
        own_key = settings["own_key"]
        arguments = (
            settings if own_key is None else settings | {"own_key": own_key.to(dtype).requires_grad_()}
        )
        loss = (qalign_attention(*leaves, backend=backend, **arguments) * weights).sum()
        wanted = leaves + ([] if own_key is None else [arguments["own_key"]])
        return [
            torch.zeros_like(x) if g is None else g
            for x, g in zip(wanted, torch.autograd.grad(loss, wanted, allow_unused=True))
        ]

    cases = (
        gradients(torch.float32, "tiled"),
        gradients(torch.float32, "reference"),
        gradients(torch.float64, "reference"),
    )
    for actual, same, truth in zip(*cases):
        assert judge(actual, same, truth, 41 * 40).passed


def test_the_map_is_that_of_similarity_argmax(backend, device):
    features, index = draw(device)
    assert torch.equal(similarity_argmax(*features[:2], backend=backend).index, index)


def test_repeated_calls_read_their_own_tensors(precision, device):
    """From the third call on Triton's launches are replayed: on a GPU the results must still be right."""
    backend, dtype = precision
    for seed in range(4):
        features, _ = draw(device, tokens=17, dtype=dtype)
        features = [
            x + random_features(*x.shape, seed=10 + seed, dtype=dtype, device=device) / 8 for x in features
        ]
        output = qalign_attention(*features, backend=backend, scale=0.2)
        settings = {"refinement": "rearranged", "scale": 0.2}
        assert judge_formula(output, by_reference(settings), *features, reduction=80).passed
