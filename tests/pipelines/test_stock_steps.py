"""Steps that stock has inside a `__call__`: each of ours gives what stock's pipelines give."""

import copy
import functools

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as of_sd
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img as of_xl

from qalign import BoundedAttentionPipeline
from qalign.context.layers import latent_size, picture_size
from qalign.pipelines import AppearanceTransferPipeline, AttentionDistillationPipeline
from qalign.sampling.bounded_guidance import BoundedGuidance
from tests.processors.models import SIZE, make_pipe, quiet

CONFIGS = {
    "plain": {},
    "mean and deviation": {"latents_mean": [-1.6, 1.9, -1.4, 2.5], "latents_std": [8.5, 5.9, 6.5, 5.2]},
    "mean alone": {"latents_mean": [-1.6, 1.9, -1.4, 2.5]},
    "shift": {"shift_factor": 0.1},
}
IMAGE_TO_IMAGE = {
    "small": (of_sd, of_sd.StableDiffusionImg2ImgPipeline),
    "sdxl": (of_xl, of_xl.StableDiffusionXLImg2ImgPipeline),
}
PROMPT, SUBJECTS = "a fox by an ox", [("fox", (0.0, 0.0, 0.5, 1.0)), ("ox", (0.5, 0.0, 1.0, 1.0))]


def make(family: str, **config):
    """A stock pipeline with a VAE of its own, of this configuration."""
    pipe = make_pipe(family)
    pipe.vae = copy.deepcopy(pipe.vae)
    pipe.vae.register_to_config(**({"scaling_factor": 0.5} | config))
    return pipe


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", IMAGE_TO_IMAGE)
def test_latents_are_scaled_as_stock_scales_them(family: str, config: str, monkeypatch) -> None:
    stock = make(family, **CONFIGS[config])
    ours = AppearanceTransferPipeline.from_pipe(stock)
    latents = torch.randn(1, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    last = {"callback_on_step_end": lambda *_: {"latents": latents}, "guidance_scale": 1.0}
    expected = stock("a", num_inference_steps=1, output_type="pt", **last).images
    with torch.no_grad():
        decoded = ours.image_processor.postprocess(ours._decode(latents), output_type="pt")
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0)

    module, kind = IMAGE_TO_IMAGE[family]
    mode = functools.partial(module.retrieve_latents, sample_mode="argmax")
    monkeypatch.setattr(module, "retrieve_latents", lambda output, generator=None: mode(output))
    pictures = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    pixels = stock.image_processor.preprocess(pictures)
    options = {"add_noise": False} if family == "sdxl" else {}
    step = torch.tensor([0])
    if not options:  # stock always adds noise here: take it away
        monkeypatch.setattr(stock.scheduler, "add_noise", lambda clean, noise, timestep: clean)
    wanted = kind.prepare_latents(stock, pixels, step, 1, 1, torch.float32, "cpu", **options)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(pictures), wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours._scaled(ours._unscaled(latents)), latents)


def test_the_model_may_have_sides_of_its_own() -> None:
    stock = make_pipe("small")
    stock.unet.register_to_config(sample_size=[8, 16])
    seen = []
    stock.unet.register_forward_pre_hook(
        lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])), prepend=True
    )
    assert latent_size(stock) == (8, 16)
    with pytest.raises(ValueError, match="^sample_size: expected a UNet of square pictures, .* got 8 x 16$"):
        picture_size(stock)
    bounded = quiet(BoundedAttentionPipeline.from_pipe(stock))
    quick = {"num_inference_steps": 1, "output_type": "latent", "guidance": BoundedGuidance(iterations=0)}
    assert bounded(PROMPT, SUBJECTS, **quick).images.shape == (1, 4, 8, 16)
    assert bounded(PROMPT, SUBJECTS, height=32, **quick).images.shape == (1, 4, 16, 16)
    seen.clear()
    distilling = quiet(AttentionDistillationPipeline.from_pipe(stock))
    found = distilling.expand(
        torch.rand(3, 32, 32), 32, 64, num_inference_steps=1, iterations=0, output_type="latent"
    )
    assert found.images.shape == (1, 4, 16, 32) and set(seen) == {(16, 16), (8, 16)}
    stock.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="^height, width: expected both, .* no sample_size, got None$"):
        bounded(PROMPT, SUBJECTS, **quick)


@pytest.mark.parametrize("family", IMAGE_TO_IMAGE)
def test_distilled_unets_get_the_guidance_scale(family: str) -> None:
    torch.manual_seed(0)
    stock = make_pipe(family)
    stock.unet = UNet2DConditionModel.from_config(stock.unet.config, time_cond_proj_dim=16).eval()
    calls = []
    stock.unet.register_forward_pre_hook(
        lambda module, inputs, options: calls.append((len(inputs[0]), options.get("timestep_cond"))),
        with_kwargs=True,
    )
    noise = torch.randn(1, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    quick = {"num_inference_steps": 2, "output_type": "latent"}
    expected = stock(PROMPT, latents=noise, guidance_scale=3.5, **quick).images
    embedded = calls[0][1]
    assert embedded is not None and {rows for rows, _ in calls} == {1}

    calls.clear()
    bounded = quiet(BoundedAttentionPipeline.from_pipe(stock))
    free = {"guidance": BoundedGuidance(iterations=0, refine_every=0), "filter_words": ()}
    everywhere = [("fox", (0.0, 0.0, 1.0, 1.0))]
    found = bounded(PROMPT, everywhere, latents=noise, guidance_scale=3.5, **free, **quick).images
    assert found.shape == expected.shape and {rows for rows, _ in calls} == {1}
    assert all(torch.equal(each, embedded) for _, each in calls)

    calls.clear()
    transfer = quiet(AppearanceTransferPipeline.from_pipe(stock))
    with torch.no_grad():
        predict = transfer._guided(*transfer.conditions(PROMPT, 32, 32), 3.5)
        stock.scheduler.set_timesteps(2)
        first, latents = stock.scheduler.timesteps[0], noise
        for timestep in stock.scheduler.timesteps:
            latents = stock.scheduler.step(predict(latents, timestep), timestep, latents).prev_sample
    assert first > 0 and len(calls) == 2 and all(torch.equal(each, embedded) for _, each in calls)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)

    a, b = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    transfer(a, b, PROMPT, **quick, skip=0.0)
    distilling = quiet(AttentionDistillationPipeline.from_pipe(stock))
    for mode in ("optimise", "sample"):
        distilling(a, b, PROMPT, mode=mode, iterations=1, **quick)
    assert all(each is not None for _, each in calls)
