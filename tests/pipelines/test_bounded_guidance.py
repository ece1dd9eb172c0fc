"""The loss of bounded attention and the refinement of its masks: formulas, schedule and layers."""

import pytest
import torch

from qalign.context.regions import Regions
from qalign.methods import BoundedAttention
from qalign.methods.attention_distillation import LayerFeatures
from qalign.sampling import bounded_masks
from qalign.sampling.bounded_guidance import BoundedGuidance
from qalign.sampling.bounded_masks import MaskRefiner, bounded_map
from qalign.sampling.object_masks import segment
from qalign_kernels.testing import random_features
from tests.pipelines import literal_bounded

BOXES = torch.zeros(16, 16, dtype=torch.long)
BOXES[2:10, 2:8], BOXES[5:14, 10:15] = 3, 7
REGIONS = Regions(structure=BOXES, background=0)
WORDS = {3: (1, 2), 7: (2, 5)}  # of 9 tokens, one of both subjects
METHOD = BoundedAttention(subject_tokens=WORDS, filter_tokens=(3, 6), eos_token=7)


def features(side=(8, 16), tokens=None, seed=0):
    shapes = {"mid_block": (3, side[0] ** 2, 40), "up_blocks.1": (2, side[1] ** 2, 32)}
    found = {}
    for name, (heads, queries, dim) in shapes.items():
        seed += 10
        query, *others = (
            3**0.5 * random_features(1, heads, n, dim, seed=seed + part)
            for part, n in enumerate([queries] + [tokens or queries] * 2 + [queries])
        )
        found[name] = LayerFeatures(query, *others, None)
    return found


def cells(labels, tokens):
    """The label in the middle of each cell."""
    step = len(labels) // int(tokens**0.5)
    return labels[step // 2 :: step, step // 2 :: step].flatten()


def self_maps(layer, labels):
    tokens = cells(labels, layer.query.shape[2])
    seen = (tokens[:, None] == 0) | (tokens[None] == 0) | (tokens[:, None] == tokens[None])
    return (
        (layer.query.double() @ layer.key.double().mT / layer.query.shape[-1] ** 0.5)
        .masked_fill(~seen, -torch.inf)
        .softmax(-1)[-1]
    )


def cross_maps(layer, labels, optimized):
    tokens, seen = (
        cells(labels, layer.query.shape[2]),
        torch.ones(layer.query.shape[2], layer.key.shape[2], dtype=torch.bool),
    )
    for place in (1, 2, 3, 5, 6):
        seen[:, place] = False
    for label, places in WORDS.items():
        for place in places:
            seen[:, place] |= (tokens == label) | ((tokens == 0) & optimized)
    seen[:, 7] = (tokens != 0) | optimized
    return (
        (layer.query.double() @ layer.key.double().mT / layer.query.shape[-1] ** 0.5)
        .masked_fill(~seen, -torch.inf)
        .softmax(-1)[-1]
    )


def squares(found, labels, maps, context):
    """Σ_s (1 - IoU_s)²."""
    foreground, leaked = dict.fromkeys(WORDS, 0.0), dict.fromkeys(WORDS, 0.0)
    for layer in found.values():
        tokens, table = cells(labels, layer.query.shape[2]), maps(layer, labels)
        for s in WORDS:
            foreground[s] = foreground[s] + table[:, tokens == s][:, :, context(tokens, s)].sum() / len(found)
            leaked[s] = leaked[s] + table[:, tokens == 0][:, :, context(tokens, s)].sum() / len(found)
    return sum((1 - foreground[s] / (foreground[s] + len(WORDS) * leaked[s])) ** 2 for s in WORDS)


def literal(found, cross, labels=BOXES):
    own = squares(found, labels, self_maps, lambda tokens, s: tokens == s)
    return 0.5 * own + 1.5 * squares(
        cross, labels, lambda *given: cross_maps(*given, optimized=True), lambda tokens, s: [*WORDS[s], 7]
    )


def test_loss_and_gradient_are_those_of_the_formula():
    found, cross = (
        {name: LayerFeatures(*(x.requires_grad_() for x in layer[:4]), None) for name, layer in some.items()}
        for some in (features(), features(tokens=9, seed=50))
    )
    loss, truth = BoundedGuidance().loss(found, REGIONS, cross, METHOD), literal(found, cross)
    assert loss.item() == pytest.approx(truth.item(), rel=2e-6)
    wanted = [x for some in (found, cross) for layer in some.values() for x in layer[:2]]
    for gradient, expected in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(truth, wanted)):
        assert (gradient - expected).norm() <= 2e-6 * expected.norm()


def test_parts_are_weighted_and_self_attention_suffices():
    found, cross = features(), features(tokens=9, seed=50)
    alone = BoundedGuidance().loss(found, REGIONS)
    assert torch.equal(alone, BoundedGuidance(cross_weight=0.0).loss(found, REGIONS, cross, METHOD))
    both, words = (
        BoundedGuidance(self_weight=weight).loss(found, REGIONS, cross, METHOD) for weight in (0.5, 0.0)
    )
    assert (both - words).item() == pytest.approx(alone.item(), rel=1e-5) and alone > 0.1 and words > 0.1
    assert BoundedGuidance(self_weight=0.0, cross_weight=3.0).loss(
        found, REGIONS, cross, METHOD
    ).item() == pytest.approx(2 * words.item(), rel=1e-6)


def test_loss_depends_on_labels_and_words():
    loss, found, cross = BoundedGuidance().loss, features(), features(tokens=9, seed=50)
    here = loss(found, REGIONS, cross, METHOD)
    assert (
        abs(here - loss(found, Regions(structure=BOXES.T.contiguous(), background=0), cross, METHOD)) > 1e-4
    )
    renamed = torch.where(BOXES == 7, 1, torch.where(BOXES == 3, 2, 5))
    method = BoundedAttention(subject_tokens={2: WORDS[3], 1: WORDS[7]}, filter_tokens=(3, 6), eos_token=7)
    assert loss(found, Regions(structure=renamed, background=5), cross, method).item() == pytest.approx(
        here.item(), rel=1e-6
    )
    for changed in ({"filter_tokens": (3,)}, {"eos_token": 8}, {"subject_tokens": {3: (1,), 7: (2, 5)}}):
        given = {"subject_tokens": WORDS, "filter_tokens": (3, 6), "eos_token": 7} | changed
        assert abs(here - loss(found, REGIONS, cross, BoundedAttention(**given))) > 1e-4
    with pytest.raises(
        ValueError,
        match=r"^method: expected subject_tokens of the labels \[3, 7\] for cross-attention, got none of 7$",
    ):
        loss(found, REGIONS, cross, BoundedAttention(subject_tokens={3: (1,)}, eos_token=7))


@pytest.mark.parametrize(
    "regions",
    [
        Regions(structure=BOXES),
        Regions(appearance=BOXES, background=0),
        Regions(structure=BOXES * 0, background=0),
    ],
)
def test_regions_without_subjects_or_background_are_refused(regions):
    with pytest.raises(ValueError, match="^regions: expected"):
        BoundedGuidance().loss(features(), regions)


def test_the_schedule_is_as_published():
    rates = [BoundedGuidance(rates=(18.0, 5.0)).rate(step, 50) for step in range(50)]
    assert rates[:15] == pytest.approx(torch.linspace(18, 5, 16)[:-1].tolist()) and rates[15:] == [None] * 35
    assert BoundedGuidance(until=0.5).rate(0, 2) == 8.0 and BoundedGuidance(until=0.0).rate(0, 50) is None
    assert [step for step in range(50) if BoundedGuidance().refines(step, 50)] == [15, 20, 25, 30, 35, 40, 45]
    assert [step for step in range(9) if BoundedGuidance(until=0.0, refine_every=4).refines(step, 9)] == [
        4,
        8,
    ]  # at 0 there are no maps
    assert [step for step in range(20) if BoundedGuidance().refines(step, 20)] == [6, 10, 15]
    assert not any(BoundedGuidance(refine_every=0).refines(step, 50) for step in range(50))


def test_default_layers_are_the_published_ones():
    attentions = "mid_block.attentions.0.transformer_blocks.0.attn1"
    small = [
        attentions,
        *(
            f"up_blocks.{block}.attentions.{layer}.transformer_blocks.0.attn1"
            for block in (1, 2, 3)
            for layer in range(3)
        ),
    ]
    assert BoundedGuidance().default_layers(small) == small[:4]
    large = [
        f"up_blocks.{block}.attentions.{layer}.transformer_blocks.{n}.attn1"
        for block in (0, 1)
        for layer in range(3)
        for n in range(10)
    ]
    assert BoundedGuidance().default_layers([attentions, *large]) == large[1:7]


# masks


@pytest.mark.parametrize("rows", [1, 2])
def test_maps_are_the_last_rows_bounded_attention(rows):
    layer = LayerFeatures(*(random_features(rows, 3, 64, 40, seed=seed) for seed in range(4)), None)
    bits = REGIONS.picture_labels("structure", 64, torch.device("cpu"))[0]
    expected = self_maps(layer, BOXES).mean(0)
    assert (bounded_map(layer, bits, bits) - expected).norm() <= 2e-6 * expected.norm()
    assert (bounded_map(layer, bits, bits) == 0).sum() > 0  # a subject does not see the other


def literal_masks(self_map, cross_map, present, labels_of_clusters, nouns):
    """The subject of each token by the published rule, cluster by cluster."""
    maps = {}
    for s, place in nouns.items():
        m = cross_map[:, place]
        maps[s] = literal_bounded.word_map(m) * (present == s)
    found = torch.zeros(len(present), dtype=torch.long)
    for cluster in labels_of_clusters.unique():
        inside = labels_of_clusters == cluster
        scores = {s: m[inside].sum() / min(m.sum(), inside.sum()) for s, m in maps.items()}
        best = max(scores, key=scores.get)
        if scores[best] >= 0.2:
            found[inside] = best
    return found


def test_masks_are_refined_as_published():
    refiner, nouns = MaskRefiner(REGIONS, {3: 2, 7: 5}), {3: 2, 7: 5}
    passes = [(features((8, 8), seed=seed), features((8, 8), 9, seed=seed + 5)) for seed in (0, 100, 200)]
    centres, regions = None, REGIONS
    for number, (found, cross) in enumerate(passes, 1):
        refiner.add(found, regions, cross, METHOD)
        taken = passes[:number] if number < 3 else passes
        maps = [
            (self_maps(a, BOXES), cross_maps(b, BOXES, False))
            for own, words in taken
            for a, b in zip(own.values(), words.values())
        ]
        self_map, cross_map = (torch.stack([each.mean(0) for each in some]).mean(0) for some in zip(*maps))
        torch.testing.assert_close(refiner.self_map.double(), self_map, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(refiner.cross_map.double(), cross_map, rtol=1e-5, atol=1e-7)
        rows = (self_map / (self_map.max(0).values + 1e-5)).float()
        clusters = segment(rows, clusters=6, seed=0, starts=100, centres=centres)
        refined = refiner.refine(REGIONS)
        expected = literal_masks(self_map, cross_map, cells(BOXES, 64), clusters, nouns)
        assert {3, 7} <= set(expected.tolist()) and torch.equal(cells(refined.structure, 64), expected)
        assert (
            torch.equal(
                refined.structure, expected.view(8, 8).repeat_interleave(2, 0).repeat_interleave(2, 1)
            )
            and refined.background == 0
        )
        centres = torch.stack([rows[clusters == cluster].mean(0) for cluster in range(6)])
        torch.testing.assert_close(refiner.centres, centres)


def planted(refiner, groups, words):
    """Tokens of a group see each other, and `words` gives each group's attention to tokens 2 and 5."""
    refiner.count = 1
    refiner.self_map = (4.0 * (groups[:, None] == groups)).softmax(-1)
    refiner.cross_map = torch.zeros(len(groups), 9)
    refiner.cross_map[:, [2, 5]] = torch.tensor(words)[groups]


def test_masks_follow_subjects_and_restart_where_lost():
    refiner, halves = (
        MaskRefiner(REGIONS, {3: 2, 7: 5}, clusters=2),
        torch.arange(64) % 8 // 2,
    )  # four stripes, 0 and 1 under the first box
    planted(refiner, halves, [[0.1, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.1]])
    found = refiner.refine(REGIONS)
    stripes = cells(found.structure, 64).view(8, 8)
    assert (
        (stripes[:, 2:4] == 3).all()
        and (stripes[:, [0, 1, 6, 7]] == 0).all()
        and (stripes[:, 4:6] == 7).all()
    )
    planted(
        refiner, halves, [[0.1, 0.9], [0.1, 0.9], [0.1, 0.9], [0.1, 0.1]]
    )  # no token attends to the first one's word
    again = refiner.refine(found).structure
    assert torch.equal(again == 3, BOXES == 3)  # its whole box
    assert (again[:, 8:12] == 7).all()


def test_later_clusters_start_where_the_last_ended(monkeypatch):
    given, real = [], segment
    monkeypatch.setattr(
        bounded_masks, "segment", lambda rows, **options: given.append(options) or real(rows, **options)
    )
    refiner = MaskRefiner(REGIONS, {3: 2, 7: 5}, seed=4)
    for seed in (0, 100):
        refiner.add(features((8, 8), seed=seed), REGIONS, features((8, 8), 9, seed=seed + 5), METHOD)
        refiner.refine(REGIONS)
    assert [(each["clusters"], each["seed"], each["starts"]) for each in given] == [(6, 4, 100)] * 2
    assert given[0]["centres"] is None and given[1]["centres"].shape == (6, 64)


def test_maps_of_different_grids_are_refused():
    refiner = MaskRefiner(REGIONS, {3: 2, 7: 5})
    with pytest.raises(
        ValueError, match="^mask_layers: expected layers of one number of tokens, got 64, 256$"
    ):
        refiner.add(features(), REGIONS, features(tokens=9), METHOD)


@pytest.mark.parametrize("offset", [0.0, 0.4])
def test_word_maps_divide_by_the_maximum_alone(offset):
    """A map that is high everywhere stays above the threshold everywhere."""
    attention = torch.tensor([0.0, 0.05, 0.1]) + offset
    expected = torch.sigmoid(10 * (attention / (attention.max() + 1e-5) - 0.2))
    expected = (expected - expected.min()) / (expected.max() - expected.min() + 1e-5)
    torch.testing.assert_close(bounded_masks.word_map(attention), expected)


def test_overlapping_boxes_share_their_tokens():
    boxes = Regions.from_boxes([(0.0, 0.0, 0.6, 1.0), (0.4, 0.0, 1.0, 1.0), (0.0, 0.0, 0.3, 0.3)], 16, 16)
    bits = boxes.picture_labels("structure", 64, torch.device("cpu")).view(8, 8)
    assert bits[7].tolist() == [2, 2, 2, 6, 6, 4, 4, 4] and bits[0, 0] == 2 | 8
    hidden = Regions.from_boxes(
        [(0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 0.5, 1.0)], 16, 16
    )  # nothing of the first is in front
    assert bounded_masks.subjects_of(hidden) == [1, 2]
    method = BoundedAttention(subject_tokens={1: (1,), 2: (2,)}, eos_token=7)
    found = BoundedGuidance(self_weight=1.0).loss(features(), hidden)
    alone = BoundedGuidance(self_weight=2.0).loss(
        features(), Regions.from_boxes([(0.0, 0.0, 0.5, 1.0)], 16, 16)
    )
    assert found > alone > 0  # S is 2
    assert BoundedGuidance().loss(features(), hidden, features(tokens=9), method).isfinite()


@pytest.mark.parametrize("tokens", [16, 64, 256])
def test_boxes_are_rounded_on_each_grid(tokens):
    box, side = (0.15, 0.3, 0.62, 0.9), int(tokens**0.5)
    bits = Regions.from_boxes([box], 16, 16).picture_labels("structure", tokens, torch.device("cpu"))
    expected = torch.full((side, side), -1)
    expected[round(0.3 * side) : round(0.9 * side), round(0.15 * side) : round(0.62 * side)] = 2
    assert torch.equal(bits[0], expected.flatten().int())
