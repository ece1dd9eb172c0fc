"""BoundedAttentionPipeline against a literal transcription of the official code, with overlapping boxes."""

import pytest
import torch
from diffusers import DDIMScheduler

from qalign import BoundedGuidance
from qalign.pipelines import BoundedAttentionPipeline
from qalign.sampling.object_masks import segment
from tests.pipelines.literal_bounded import Published, run
from tests.pipelines.transfers import seeded
from tests.processors.models import make_pipe, pipe_of

PROMPT = "an ox by a fox"  # start, a, n, o, x, b, y, a, f, o, x, end
BOXES = [(0.0, 0.1, 0.65, 0.9), (0.35, 0.3, 1.0, 0.8)]  # they overlap on 4 x 4 and on 8 x 8, not on 2 x 2
STEPS, SCALE = 6, 5.0
GUIDANCE = BoundedGuidance(rates=(300.0, 60.0), until=3 / 6, iterations=3, enough=0.7, refine_every=2)


def clusters_of():
    """k-means that starts where it last ended, as `MaskRefiner` runs it."""
    centres = None

    def cluster(rows):
        nonlocal centres
        labels = segment(rows.float(), clusters=6, seed=0, starts=100, centres=centres)
        centres = torch.stack([rows[labels == number].mean(0) for number in range(6)])
        return labels

    return cluster


@pytest.fixture(scope="module")
def pair():
    """(the result and its latents after each step, the literal run's state and latents)."""
    noise, latents = torch.randn(1, 4, 16, 16, generator=seeded(3)), []

    def note(pipe, step, timestep, given):
        latents.append(given["latents"])
        return {}

    pipe = pipe_of(BoundedAttentionPipeline, "sd15")
    found = pipe(
        PROMPT,
        [("ox", BOXES[0]), ("fox", BOXES[1])],
        latents=noise,
        guidance=GUIDANCE,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        filter_words=("an", "by", "a"),
        output_type="latent",
        callback_on_step_end=note,
    )
    stock = make_pipe("sd15")
    text = torch.cat(stock.encode_prompt(PROMPT, "cpu", 1, True)[::-1]).double()  # [empty; prompt]
    scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    mid, *up = [
        name.removesuffix(".attn1.processor")
        for name in stock.unet.attn_processors
        if name.startswith(("mid_block", "up_blocks.1")) and "attn1" in name
    ][::-1]
    published = Published(
        BOXES, [(3, 4), (8, 9, 10)], 11, (1, 2, 5, 6, 7), [mid, *up], up, clusters_of(),
        guided=3, iterations=3, rates=(300.0, 60.0), enough=0.7, refine_every=2,
    )  # fmt: skip
    with torch.no_grad():
        literal = run(stock.unet.double(), scheduler, noise.double(), text, published, SCALE)
    return found, latents, published, literal


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def test_losses_are_those_of_the_published_code(pair):
    found, _, published, _ = pair
    steps = [int(step) for step, _ in published.losses]
    assert found.losses[:, 0].tolist() == steps and set(steps) == {0, 1, 2}
    assert len(steps) < 9  # the stop test ended a step, after its update
    torch.testing.assert_close(
        found.losses[:, 1].double(), torch.tensor([loss for _, loss in published.losses]).double(),
        rtol=2e-5, atol=0,
    )  # fmt: skip


def test_guided_steps_are_those_of_the_published_code(pair):
    _, latents, _, literal = pair
    for step in range(3):
        assert relative(latents[step], literal[step]) < 2e-5
    assert relative(literal[2], literal[0]) > 1e-2


def test_refined_steps_are_those_of_the_published_code(pair):
    found, latents, published, literal = pair
    labels = torch.zeros(4, 4, dtype=torch.long)
    for label, mask in enumerate(published.masks, 1):
        labels[mask] = label
    expected = labels.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(found.regions.structure, expected)
    assert not torch.equal(labels.flatten() > 0, published.box_masks(4).any(0))
    for step in range(3, STEPS):
        assert relative(latents[step], literal[step]) < 2e-5
