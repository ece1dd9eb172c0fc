"""AppearanceTransferPipeline: the inputs of the UNet, the results, and the steps."""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler

from qalign import CrossImage, QAlign
from qalign.pipelines import transfer_loop
from qalign.pipelines.base import expand_condition
from qalign.sampling.attention_maps import MapCollector
from qalign.sampling.object_masks import noun_tokens, object_masks
from tests.pipelines.transfers import PIXELS, PROMPT, make, pictures, seeded, trajectory, transfer, watch


@dataclasses.dataclass(frozen=True)
class Recording(CrossImage):
    """Cross-Image attention that records the steps it edits, and those at which it reads the structure."""

    edited: list = dataclasses.field(default_factory=list)
    structure: list = dataclasses.field(default_factory=list)

    def edit(self, q, k, v, output, reference, site):
        self.edited.append(site.clock.step)
        self.structure.extend([site.clock.step] if site.clock.from_structure else [])
        return super().edit(q, k, v, output, reference, site)


# what is computed


@pytest.mark.parametrize(
    ("family", "prediction_type"), [("sd15", "epsilon"), ("sd21", "v_prediction"), ("sdxl", "epsilon")]
)
def test_without_edit_the_output_is_the_structure(family, prediction_type) -> None:
    pipe = make(family)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction_type)
    options = {"method": None, "adain": None, "inversion_guidance_scale": 1.0}
    inverted = pipe.invert(
        pictures(1)[0],
        pictures(1, seed=1),
        PROMPT,
        num_inference_steps=6,
        inversion_guidance_scale=1.0,
        generator=seeded(),
    )
    steps = trajectory(pipe, **options)
    assert steps.shape == (4, 3, 4, 16, 16) and steps.dtype == torch.float32
    assert torch.equal(steps[:, 0], steps[:, 2])
    torch.testing.assert_close(steps[:-1, 1:], inverted.latents[3:-1], rtol=1e-4, atol=1e-4)
    result = transfer(pipe, **options)
    assert (
        torch.equal(result.images[0], result.reconstructions[1])
        and torch.equal(result.reconstructions, steps[-1, 1:])
        and result.masks is None
    )


@pytest.mark.parametrize("family", ["small", "sdxl"])
def test_several_structures_are_as_many_calls(family) -> None:
    pipe, structures = make(family), pictures(2, seed=1)
    together = transfer(pipe, structures, num_inference_steps=3)
    assert together.images.shape[0] == 2 and together.reconstructions.shape[0] == 3
    for structure, image, reconstruction in zip(structures, together.images, together.reconstructions[1:]):
        alone = transfer(pipe, structure, num_inference_steps=3)
        torch.testing.assert_close(alone.images[0], image, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.reconstructions[1], reconstruction, rtol=1e-4, atol=1e-4)
    assert (together.images[0] - together.images[1]).abs().max() > 0.1


def test_one_generator_for_each_picture(small) -> None:
    structures = pictures(2, seed=1)
    together = transfer(small, structures, generator=[seeded(5), seeded(6), seeded(7)])
    alone = transfer(small, structures[1:], generator=[seeded(5), seeded(7)])
    torch.testing.assert_close(together.images[1], alone.images[0], rtol=1e-4, atol=1e-4)


def test_rows_of_one_call(small, monkeypatch) -> None:
    inverted = small.invert(
        pictures(1)[0], pictures(2, seed=1), PROMPT, num_inference_steps=6, generator=seeded()
    )
    samples = watch(small, monkeypatch)
    transfer(small, inversion=inverted, method=CrossImage(structure_every=0))
    assert [len(sample) for sample in samples] == [7] * 4
    for sample in samples:
        assert torch.equal(sample[:2], sample[2:4])
    first, later = samples[0], samples[-1]
    assert torch.equal(first[4:], inverted.latents[2]) and torch.equal(first[:2], inverted.latents[2, 1:])
    assert not torch.allclose(later[:2], later[5:], atol=1e-2)
    samples.clear()
    transfer(small, inversion=inverted, swap_guidance_scale=1.0)
    assert [len(sample) for sample in samples] == [5] * 4


def test_plain_rows_equal_a_call_without_edit(monkeypatch) -> None:
    pipe, scale = make("sd15"), 2.0
    inverted = pipe.invert(
        pictures(1)[0], pictures(1, seed=1), PROMPT, num_inference_steps=4, generator=seeded()
    )
    options = {
        "inversion": inverted,
        "adain": None,
        "skip": 0.5,
        "edit_steps": (0.0, 1.0),
        "guidance_start": 0.0,
    }
    outputs = {}
    editing = QAlign(structure_every=0)  # the first step's output is the structure's own
    for name, method, swap in (("guided", editing, scale), ("edited", editing, 1.0), ("plain", None, 1.0)):
        forward, seen = pipe.unet.forward, []
        with monkeypatch.context() as patch:
            patch.setattr(
                pipe.unet,
                "forward",
                lambda *args, forward=forward, seen=seen, **kwargs: (
                    seen.append(forward(*args, **kwargs)) or seen[-1]
                ),
            )
            outputs[name] = trajectory(pipe, method=method, swap_guidance_scale=swap, **options)[0]
    # a step is affine in the prediction, so guiding predictions is guiding the results of the step
    expected = outputs["plain"] + scale * (outputs["edited"] - outputs["plain"])
    torch.testing.assert_close(outputs["guided"], expected, rtol=1e-4, atol=1e-4)
    assert (outputs["guided"][0] - outputs["plain"][0]).abs().max() > 1e-3


def test_ddim_inversion_is_walked_back_by_ddim(small) -> None:
    inverted = small.invert(
        pictures(1)[0],
        pictures(1, seed=1),
        PROMPT,
        num_inference_steps=6,
        inversion="ddim",
        inversion_guidance_scale=1.0,
    )
    assert inverted.noises is None
    scheduler = DDIMScheduler.from_config(small.scheduler.config)
    scheduler.set_timesteps(6)
    latents, embeddings = (
        inverted.latents[2],
        small.encode_prompt(PROMPT, "cpu", 1, False)[0].expand(2, -1, -1),
    )
    steps = trajectory(small, inversion=inverted, method=None, adain=None)
    for timestep, made in zip(scheduler.timesteps[2:], steps):
        with torch.no_grad():
            latents = scheduler.step(
                small.unet(latents, timestep, embeddings).sample, timestep, latents
            ).prev_sample
        torch.testing.assert_close(made[1:], latents, rtol=1e-4, atol=1e-4)


def test_guidance_of_the_inversion(small, monkeypatch) -> None:
    """Edit-friendly noises of the first step by hand: (x_{t-1} - μ) / σ with μ of the guided prediction."""
    options = {"num_inference_steps": 2, "generator": seeded(3)}
    inverted = small.invert(
        pictures(1)[0], pictures(1, seed=1), PROMPT, inversion_guidance_scale=3.5, **options
    )
    condition, empty = small.encode_prompt(PROMPT, "cpu", 1, True)
    sample, timestep = inverted.latents[0], inverted.timesteps[0]
    with torch.no_grad():
        with_prompt, without = (
            small.unet(sample, timestep, each.expand(2, -1, -1)).sample for each in (condition, empty)
        )
    scheduler = DDIMScheduler.from_config(small.scheduler.config)
    scheduler.set_timesteps(2)
    stepped = scheduler.step(
        without + 3.5 * (with_prompt - without), timestep, sample, eta=1.0, variance_noise=inverted.noises[0]
    ).prev_sample  # eta = 1, where η and η² are the same
    torch.testing.assert_close(stepped, inverted.latents[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("steps", "skip", "edited", "structure"),
    [(25, 0.32, range(3, 17), [6]), (20, 0.0, range(4, 20), [6, 11]), (3, 0.0, [1, 2], [1])],
)
def test_steps_of_the_edit(small, steps, skip, edited, structure) -> None:
    method = Recording()
    transfer(small, num_inference_steps=steps, skip=skip, method=method, adain=None)
    assert sorted(set(method.edited)) == list(edited)
    assert sorted(set(method.structure)) == structure


# AdaIN and its masks


def test_adain_inside_masks_from_its_step_on(small, pair, monkeypatch) -> None:
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, :6], masks[1, 9:] = True, True
    monkeypatch.setattr(transfer_loop, "object_masks", lambda maps, noun: masks)
    without, masked, whole = (
        trajectory(small, inversion=pair, adain=adain) for adain in (None, "masked", "whole")
    )
    assert torch.equal(without[:2], masked[:2]) and torch.equal(without[:2], whole[:2]), (
        "before 20/68 of 4 steps"
    )
    (output, appearance, structure), plain = masked[2], without[2]
    assert (
        torch.equal(output[:, ~masks[1]], plain[0][:, ~masks[1]])
        and torch.equal(appearance, plain[1])
        and torch.equal(structure, plain[2])
    )
    for moment in (torch.mean, torch.std):
        torch.testing.assert_close(
            moment(output[:, masks[1]], -1), moment(appearance[:, masks[0]], -1), rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(
            moment(whole[2, 0].flatten(1), -1), moment(appearance.flatten(1), -1), rtol=1e-3, atol=1e-3
        )
    torch.testing.assert_close(
        masked[3, 0][:, masks[1]].mean(-1), masked[3, 1][:, masks[0]].mean(-1), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("family", ["small", "sdxl"])
def test_masks_are_those_of_the_pictures_own_attention(family) -> None:
    pipe = make(family)
    inverted = pipe.invert(
        pictures(1)[0], pictures(2, seed=1), PROMPT, num_inference_steps=6, generator=seeded()
    )
    options = {"inversion": inverted, "adain": "masked", "noun": "zebra"}
    steps, masks = trajectory(pipe, **options), transfer(pipe, **options).masks
    rows, tokens = (
        steps[1, 2:],
        256 if family == "small" else None,
    )  # 20/68 of 4 steps: the third, so the latents after the second
    condition = expand_condition(pipe.conditions(PROMPT, PIXELS, PIXELS)[0], 3)
    with torch.no_grad(), MapCollector(pipe, self_tokens=tokens) as collector:
        pipe.unet(rows, inverted.timesteps[4], **condition)
    assert masks.shape == (3, 16, 16) and masks.dtype == torch.bool
    assert torch.equal(masks, object_masks(collector.maps(), noun_tokens(pipe.tokenizer, PROMPT, "zebra")))


def test_without_prompt_the_whole_picture_is_object(small) -> None:
    masked = transfer(small, prompt="", adain="masked")
    assert masked.masks.all()
    torch.testing.assert_close(masked.images, transfer(small, prompt="").images)


# methods, layers, FreeU


def test_methods_by_name(small, pair) -> None:
    results = {
        name: transfer(small, inversion=pair, method=name).images for name in ("qalign", "cross_image")
    }
    assert torch.equal(results["qalign"], transfer(small, inversion=pair).images)
    assert torch.equal(results["cross_image"], transfer(small, inversion=pair, method=CrossImage()).images)
    assert not torch.allclose(results["qalign"], results["cross_image"], atol=1e-3)


def test_layers_and_a_window_without_steps() -> None:
    pipe = make("sd15")
    inverted = pipe.invert(
        pictures(1)[0], pictures(1, seed=1), PROMPT, num_inference_steps=4, generator=seeded()
    )
    images = [
        transfer(pipe, inversion=inverted, adain=None, layers=layers).images
        for layers in (None, ["up_blocks.2", "up_blocks.3"], "mid")
    ]
    assert torch.equal(images[0], images[1]) and not torch.allclose(images[0], images[2], atol=1e-3)
    nothing = transfer(pipe, inversion=inverted, adain=None, edit_steps=(0.9, 0.95))
    torch.testing.assert_close(nothing.images[0], nothing.reconstructions[1], rtol=1e-5, atol=1e-5)


def test_freeu_acts_throughout_and_is_off_afterwards(small) -> None:
    before = transfer(small, method=None, adain=None)
    with_freeu = transfer(small, method=None, adain=None, freeu=True, inversion_guidance_scale=1.0)
    clean = small.invert(pictures(1)[0], pictures(1, seed=1), num_inference_steps=1).latents[-1]
    assert not torch.allclose(with_freeu.images, before.images, atol=1e-3)
    assert (with_freeu.reconstructions - clean).abs().mean() < (
        before.reconstructions - clean
    ).abs().mean() + 1
    inverted = small.invert(
        pictures(1)[0],
        pictures(1, seed=1),
        PROMPT,
        num_inference_steps=6,
        freeu=True,
        inversion_guidance_scale=1.0,
        generator=seeded(),
    )
    steps = trajectory(small, inversion=inverted, method=None, adain=None, freeu=True)
    torch.testing.assert_close(steps[:-1, 1:], inverted.latents[3:-1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        trajectory(small, inversion=inverted, method=None, adain=None)[:-1, 1:],
        inverted.latents[3:-1],
        atol=1e-2,
    )
    assert torch.equal(transfer(small, method=None, adain=None).images, before.images)
