"""Regions from the UNet's own attention: against the embedded scenes and the text, and in a transfer."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")

from qalign import AppearanceTransferPipeline, Regions  # noqa: E402
from qalign.embedded.scenes import BACKGROUNDS, held_out_pairs, render, token_labels  # noqa: E402
from qalign.pipelines import self_regions  # noqa: E402
from qalign.sampling.attention_maps import MapCollector  # noqa: E402
from qalign.sampling.object_masks import noun_map, noun_tokens, object_regions, segment  # noqa: E402
from tests.pipelines.transfers import PROMPT, pictures, seeded, transfer  # noqa: E402
from tests.processors.models import embedded_pipe

BIRDS = 3  # a pair of the six
LEFT = torch.arange(6).expand(4, 6) < 3


@pytest.fixture(scope="module")
def pipe():
    return embedded_pipe(AppearanceTransferPipeline)


@pytest.fixture(scope="module")
def birds():
    """Appearance and structure, and what both show."""
    pair = held_out_pairs(6, seed=1)[BIRDS]
    return render([pair.appearance, pair.structure]).image, "a photo of a bird"


def iou(one, other):
    return ((one & other).sum() / (one | other).sum()).item()


@pytest.mark.slow
def test_embedded_models_object_masks_fit_their_scene(pipe) -> None:
    """The mask beats a mask of everything, which scores the object's share, and those of other scenes."""
    masks, truths = [], []
    for pair in held_out_pairs(12, seed=1):
        scenes = render([pair.appearance, pair.structure])
        if scenes.plans[0] == scenes.plans[1]:
            regions = pipe.self_regions(*scenes.image, f"a photo of a {scenes.plans[0]}")
            masks += [regions.appearance.bool(), regions.structure.bool()]
            truths += list(token_labels(scenes.labels, (32, 32)).view(2, 32, 32) >= len(BACKGROUNDS))
    scores = torch.tensor([[iou(mask, truth) for truth in truths] for mask in masks])
    own, others = scores.diagonal().mean(), scores[~torch.eye(len(scores), dtype=torch.bool)].mean()
    assert len(masks) == 16 and own > others + 0.25  # 0.62, 0.27
    assert own > torch.stack(truths).float().mean() + 0.2  # 0.30


def test_they_are_those_of_the_text(pipe, birds, monkeypatch) -> None:
    """ALGORITHMS.md 8, cluster by cluster, on the maps that three calls of the UNet leave."""
    collected, read = [], MapCollector.maps

    def keep(self):
        collected.append(read(self))
        return collected[-1]

    monkeypatch.setattr(MapCollector, "maps", keep)
    both, prompt = birds
    regions, again = pipe.self_regions(*both, prompt), pipe.self_regions(*both, prompt)
    assert all(
        torch.equal(getattr(regions, name), getattr(again, name)) for name in ("appearance", "structure")
    )
    maps, places = collected[0], noun_tokens(pipe.tokenizer, prompt, "bird")
    masks = []
    for self_map, cross_map in zip(maps.self_map, maps.cross_map):
        labels, of_noun = segment(self_map), noun_map(cross_map, places, maps.cross_grid, maps.grid)
        inside = {label for label in range(5) if of_noun[labels == label].mean() > 0.35}
        masks.append(torch.tensor([label in inside for label in labels.tolist()]).view(maps.grid))
    assert torch.equal(regions.appearance.bool(), masks[0]) and torch.equal(
        regions.structure.bool(), masks[1]
    )
    assert all(0 < mask.float().mean() < 1 for mask in masks)
    assert regions.background is None


def test_maps_are_the_mean_over_noised_pictures(small, monkeypatch) -> None:
    noised, predict = [], small.predict

    def watched(latents, timestep, condition):
        noised.append((latents, int(timestep)))
        return predict(latents, timestep, condition)

    monkeypatch.setattr(small, "predict", watched)
    both = torch.stack([pictures(1)[0], pictures(1, seed=1)[0]])
    small.self_regions(*both, PROMPT)
    clean, alphas = small.encode(both), small.scheduler.alphas_cumprod
    assert [timestep for _, timestep in noised] == [200, 400, 600]
    generator = torch.Generator().manual_seed(0)
    for latents, timestep in noised:
        noise = torch.randn(clean.shape, generator=generator)
        torch.testing.assert_close(
            latents, alphas[timestep].sqrt() * clean + (1 - alphas[timestep]).sqrt() * noise
        )


def test_masks_become_two_mutually_hidden_regions() -> None:
    regions = object_regions(torch.stack([LEFT, ~LEFT]))
    assert torch.equal(regions.appearance, LEFT.long()) and torch.equal(regions.structure, 1 - LEFT.long())
    assert not (
        regions.picture_labels("appearance", 24, torch.device("cpu"))
        & regions.query_labels("appearance", 24, 24, torch.device("cpu"))
    )[0].any()


@pytest.mark.parametrize("missing", [torch.ones_like(LEFT), torch.zeros_like(LEFT)])
@pytest.mark.parametrize("which", [0, 1])
def test_an_object_that_is_not_found_restricts_nothing(missing, which) -> None:
    masks = [LEFT, LEFT]
    masks[which] = missing
    regions = object_regions(torch.stack(masks))
    queries, keys = (
        regions.query_labels("appearance", 24, 24, torch.device("cpu")),
        regions.picture_labels("appearance", 24, torch.device("cpu")),
    )
    assert ((queries[0, :, None] & keys[0]) != 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("known", [False, True])
def test_a_transfer_finds_them_itself(pipe, birds, known) -> None:
    (appearance, structure), prompt = birds
    found = pipe.self_regions(appearance, structure, prompt)
    options = {"num_inference_steps": 3, "edit_steps": (0, 1), "adain": None, "output_type": "latent"}
    if known:
        options["inversion"] = pipe.invert(
            appearance, structure, prompt, num_inference_steps=3, generator=seeded()
        )
    given, own, without = (
        pipe(appearance, structure, prompt, regions=regions, generator=seeded(), **options)
        for regions in (found, "self", None)
    )
    assert torch.equal(own.images, given.images) and not torch.allclose(own.images, without.images, atol=1e-2)
    assert isinstance(own.regions, Regions) and torch.equal(own.regions.structure, found.structure)
    assert given.regions is found and without.regions is None


def test_sizes_that_are_not_square(small) -> None:
    appearance, structure = pictures(1, 24, 40)[0], pictures(1, 24, 40, seed=1)[0]
    regions = small.self_regions(appearance, structure, PROMPT)
    assert regions.appearance.shape == regions.structure.shape == (12, 20)
    taller = small.self_regions(appearance, structure, PROMPT, height=40, width=24)
    assert taller.structure.shape == (20, 12)


def test_a_noun_may_be_named(small, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(
        self_regions,
        "object_masks",
        lambda maps, places, **_: calls.append(places) or LEFT.expand(2, 4, 6),
    )
    for noun in (None, "zebra", "tree"):
        small.self_regions(pictures(1)[0], pictures(1, seed=1)[0], "a zebra by a tree", noun=noun)
    assert calls[0] == calls[1] == noun_tokens(small.tokenizer, "a zebra by a tree", "zebra") != calls[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt": ""},
            "noun: expected a word of the prompt with regions='self', got none, and the prompt ''",
        ),
        ({"noun": "horse"}, "noun: expected a word of the prompt 'a zebra', got 'horse'"),
        ({"structures": pictures(2)}, "regions: expected one structure with 'self', got 2"),
    ],
)
def test_refusals_come_before_any_work(small, monkeypatch, options, message) -> None:
    monkeypatch.setattr(small, "_invert", None)
    with pytest.raises(ValueError, match=message):
        transfer(small, regions="self", **options)


def test_other_words_are_refused(small) -> None:
    with pytest.raises(TypeError, match="regions: expected Regions"):
        transfer(small, regions="parts")


def test_label_map_reaches_layers_of_other_size(small) -> None:
    regions = object_regions(F.interpolate(torch.stack([LEFT, LEFT])[None].float(), (16, 16))[0].bool())
    assert regions.picture_labels("structure", 64, torch.device("cpu")).unique().tolist() == [1, 2]
