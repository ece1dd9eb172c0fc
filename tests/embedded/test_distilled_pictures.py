"""Attention distillation on the embedded model, judged by colours and by independently read features."""

import functools

import pytest
import torch

from qalign import AttentionDistillation, AttentionDistillationPipeline, Regions
from qalign.embedded.scenes import held_out_pairs, render
from qalign.evaluation.picture_metrics import colour_error
from tests.pipelines.test_distillation_pipeline import Literal
from tests.pipelines.transfers import seeded
from tests.processors.models import embedded_pipe

pytestmark = pytest.mark.slow
SIZE, GRID = 64, 16  # pixels, latents
TIMESTEP = torch.tensor(301)
LEFT_RIGHT = (torch.arange(GRID) >= GRID // 2).long().expand(GRID, GRID)
TOP_BOTTOM = LEFT_RIGHT.T
WINDOWS = (slice(0, GRID), slice(GRID // 2, None))  # columns of 3 / 2 GRID, stride GRID / 2


def pipe():
    return embedded_pipe(AttentionDistillationPipeline)


@functools.cache
def scenes():
    """Appearance and structure."""
    pair = held_out_pairs(1)[0]
    return render([pair.appearance, pair.structure], SIZE)


def latents(picture):
    with torch.no_grad():
        return pipe().encode(picture[None])


def picture(latents):
    with torch.no_grad():
        return (pipe()._decode(latents)[0] / 2 + 0.5).clamp(0, 1)


def make(*pictures, steps=10, **options):
    return pipe()(
        *pictures, num_inference_steps=steps, generator=seeded(), output_type="latent", **options
    ).images


def tokens(labels, number):
    side = int(number**0.5)
    return labels[GRID // side // 2 :: GRID // side, GRID // side // 2 :: GRID // side].flatten()


@torch.no_grad()
def distance(found, style, labels=None):
    """The distance of attention outputs from their ideal, map by map, within labels if given."""
    literal, total = Literal(pipe()), 0.0
    for (q, _, _, out), (_, k, v, _) in zip(
        literal.features(found, TIMESTEP), literal.features(style, TIMESTEP)
    ):
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if labels is not None:
            rows, columns = tokens(labels[0], q.shape[2]), tokens(labels[1], k.shape[2])
            scores = scores.masked_fill(rows[:, None] != columns, -torch.inf)
        total += (out - scores.softmax(-1) @ v).abs().mean().item()
    return total


@torch.no_grad()
def change(found, content):
    """Of the queries."""
    literal = Literal(pipe())
    return sum(
        (own[0] - other[0]).abs().mean().item()
        for own, other in zip(*(literal.features(x, TIMESTEP) for x in (found, content)))
    )


def test_style_transfer_takes_style_and_keeps_content():
    style, content = (latents(each) for each in scenes().image)
    kept, free = (
        make(*scenes().image, method=AttentionDistillation(content_weight=weight)) for weight in (0.25, 0.0)
    )
    assert distance(kept, style) < 0.85 * distance(content, style)
    assert change(kept, content) < 0.85 * change(free, content)


def test_appearance_transfer_gives_each_part_its_own_colour():
    (appearance, structure), (of_appearance, of_structure) = scenes().image, scenes().labels

    def error(shown):
        return colour_error(shown, of_structure, appearance, of_appearance).nanmean().item()

    moved, decoded = (
        picture(make(appearance, structure, steps=20, learning_rate=0.2)),
        picture(latents(structure)),
    )
    assert error(moved) < 0.9 * min(error(structure), error(decoded))


def test_a_texture_is_made_of_noise():
    style = scenes().image[0]
    noise = torch.randn(1, 4, GRID, GRID, generator=seeded())
    assert distance(make(style, steps=15), latents(style)) < 0.7 * distance(noise, latents(style))


def test_every_window_of_an_expanded_texture_matches():
    style = scenes().image[0]
    options = {"window": GRID, "stride": GRID // 2, "num_inference_steps": 6, "output_type": "latent"}
    plain, drawn = (
        pipe().expand(style, SIZE, 3 * SIZE // 2, iterations=count, generator=seeded(), **options).images
        for count in (0, 2)
    )
    for columns in WINDOWS:
        assert distance(drawn[..., columns], latents(style)) < 0.85 * distance(
            plain[..., columns], latents(style)
        )


@functools.cache
def two_textures():
    """Side by side."""
    return torch.cat([each[:, :, : SIZE // 2] for each in render([1, 3], SIZE).image], -1)


def test_a_masked_texture_draws_from_its_own_label():
    style = two_textures()
    maps = (None, Regions(appearance=LEFT_RIGHT, structure=TOP_BOTTOM))
    plain, masked = (
        distance(make(style, regions=regions), latents(style), (TOP_BOTTOM, LEFT_RIGHT)) for regions in maps
    )
    assert masked < 0.92 * plain


def test_expanded_masked_texture_draws_from_its_own_label():
    style, labels = two_textures(), TOP_BOTTOM.repeat(1, 2)[:, : 3 * GRID // 2]
    options = {
        "window": GRID,
        "stride": GRID // 2,
        "num_inference_steps": 6,
        "iterations": 2,
        "output_type": "latent",
    }
    masked, swapped = (
        pipe()
        .expand(
            style,
            SIZE,
            3 * SIZE // 2,
            regions=Regions(appearance=LEFT_RIGHT, structure=each),
            generator=seeded(),
            **options,
        )
        .images
        for each in (labels, 1 - labels)
    )
    for columns in WINDOWS:
        one, other = (
            distance(found[..., columns], latents(style), (TOP_BOTTOM, LEFT_RIGHT))
            for found in (masked, swapped)
        )
        assert one < 0.92 * other


def test_a_picture_of_a_prompt_takes_the_style():
    style = scenes().image[0]
    options = {"mode": "sample", "adain": False, "learning_rate": 0.05}
    bird, fish = (
        make(style, None, f"a photo of a {kind}", iterations=0, **options) for kind in ("bird", "fish")
    )
    drawn = make(style, None, "a photo of a bird", iterations=3, **options)
    assert distance(drawn, latents(style)) < 0.85 * distance(bird, latents(style))
    assert (drawn - bird).abs().mean() < 0.9 * (drawn - fish).abs().mean()  # it is still what the prompt says
