"""Scenes: pictures and labels that are a function of the seed alone, at any size."""

import pytest
import torch

from qalign.embedded.scenes import (
    BACKGROUNDS,
    OBJECT_PARTS,
    PARTS,
    PLANS,
    held_out_pairs,
    held_out_seed,
    render,
    token_labels,
    training_seed,
)

SEEDS = [held_out_seed(number) for number in range(48)]


@pytest.fixture(scope="module")
def scenes():
    return render(SEEDS, 64)


def test_a_scene_depends_on_its_seed_alone(scenes):
    order = [7, 3, 41]
    again = render([SEEDS[number] for number in order], 64)
    assert torch.equal(again.image, scenes.image[order]) and torch.equal(again.labels, scenes.labels[order])
    assert again.captions == tuple(scenes.captions[number] for number in order)


def test_training_and_held_out_seeds_never_meet():
    training, held_out = (
        {training_seed(number) for number in range(2000)},
        {held_out_seed(number) for number in range(2000)},
    )
    assert not training & held_out
    assert all(
        seed % 2 == 1 for pair in held_out_pairs(50, seed=3) for seed in (pair.appearance, pair.structure)
    )


def test_values_and_shapes(scenes):
    assert scenes.image.shape == (48, 3, 64, 64) and scenes.image.dtype == torch.float32
    assert 0 <= scenes.image.min() and scenes.image.max() <= 1
    assert scenes.labels.shape == (48, 64, 64) and scenes.labels.dtype == torch.int64
    assert set(scenes.plans) == set(PLANS)


def test_every_part_occurs_and_creature_is_visible(scenes):
    assert set(scenes.labels.unique().tolist()) == set(range(len(PARTS)))
    creature = (scenes.labels >= len(BACKGROUNDS)).float().mean((1, 2))
    assert creature.min() > 0.05 and 0.15 < creature.mean() < 0.5
    wings = (scenes.labels == PARTS.index("wing")).flatten(1).any(1)
    assert not any(wings[row] and plan != "bird" for row, plan in enumerate(scenes.plans))


def test_about_half_of_the_pictures_show_a_herd():
    captions = render([training_seed(number) for number in range(200)], 8).captions
    herds = sum(word in caption for caption in captions for word in ("two ", "three ", "four "))
    assert 70 < herds < 130


def test_a_herd_shares_one_appearance(scenes):
    """With plain textures, the individuals of a picture share the colour of a part; pictures do not."""
    body = PARTS.index("body")
    spread, means = [], []
    for image, labels, caption in zip(scenes.image, scenes.labels, scenes.captions):
        left, right = (
            image[:, :, half].flatten(1)[:, (labels[:, half] == body).flatten()]
            for half in (slice(0, 32), slice(32, 64))
        )
        if any(word in caption for word in ("two ", "four ")) and min(left.shape[1], right.shape[1]) > 30:
            spread.append((left.mean(1) - right.mean(1)).norm())
            means.append(left.mean(1))
    across = torch.cdist(torch.stack(means), torch.stack(means)).sum() / (len(means) * (len(means) - 1))
    assert len(spread) >= 8
    assert torch.stack(spread).median() < 0.35 * across


def test_size_does_not_change_the_scene():
    small, large = render(SEEDS[:8], 32), render(SEEDS[:8], 128)
    pooled = torch.nn.functional.avg_pool2d(large.image, 4)
    assert (pooled - small.image).abs().mean() < 0.06
    assert (token_labels(large.labels, (32, 32)).view(8, 32, 32) == small.labels).float().mean() > 0.9


def test_edges_are_antialiased():
    """A picture drawn four times as large and averaged keeps its edges, because edge pixels have coverage."""
    small, large = render(SEEDS[:16], 64), render(SEEDS[:16], 256)
    exact = torch.nn.functional.avg_pool2d(large.image, 4)
    creature = small.labels >= len(BACKGROUNDS)
    edge = (
        torch.nn.functional.max_pool2d(creature.float(), 3, 1, 1) - creature.float() > 0
    )  # just outside of the creatures
    error = (small.image - exact).abs().mean(1)[edge].mean()
    hard = (large.image[..., 2::4, 2::4] - exact).abs().mean(1)[edge].mean()
    assert error < 0.5 * hard


def test_token_labels_take_the_majority():
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    labels[0, :2, :2] = torch.tensor([[5, 5], [5, 1]])
    labels[0, 2:, 2:] = torch.tensor([[7, 3], [3, 7]])
    assert token_labels(labels, (2, 2)).tolist() == [[5, 0, 0, 3]]


def test_pairs_are_prefix_stable_and_of_both_kinds():
    pairs = held_out_pairs(30, seed=1)
    assert held_out_pairs(10, seed=1) == pairs[:10] and held_out_pairs(10, seed=2) != pairs[:10]
    assert all(pair.appearance != pair.structure for pair in pairs)
    plans = [render([pair.appearance, pair.structure], 8).plans for pair in pairs]
    assert [a == b for a, b in plans] == [number % 3 != 2 for number in range(30)]


def test_labels_tell_object_from_background():
    assert PARTS == BACKGROUNDS + OBJECT_PARTS and len(OBJECT_PARTS) >= 6 and len(set(PARTS)) == len(PARTS)


@pytest.mark.parametrize(
    ("seeds", "size", "name"), [([], 64, "seeds"), ([-1], 64, "seeds"), ([1], 4, "size")]
)
def test_bad_arguments_are_named(seeds, size, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        render(seeds, size)
