"""Latents that methods change: StyleID's start, Visual Style Prompting's colours and early guidance."""

import pytest
import torch

from qalign import BatchLayout, FeatureBank, StyleID, VisualStylePrompting, attach
from qalign.pipelines import transfer_loop
from qalign.sampling.denoising import denoise_step
from qalign.sampling.guidance import early_scales, guidance_by_step
from tests.pipelines.test_inversion import make_scheduler
from tests.pipelines.transfers import pictures, trajectory, transfer, watch
from tests.processors.models import PROMPTS, SIZE, make_pipe

LATENTS = (
    torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    * torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1, 1)
    + 0.3
)


def literal_adain(x, y, eps=0.0):
    """Channel by channel of one picture."""
    result = torch.empty_like(x)
    for channel in range(len(x)):
        mean, deviation = x[channel].mean(), (x[channel].var() + eps).sqrt()
        result[channel] = (x[channel] - mean) / deviation * (y[channel].var() + eps).sqrt() + y[
            channel
        ].mean()
    return result


def test_style_id_starts_in_the_styles_statistics() -> None:
    started = StyleID().start(LATENTS[:2], LATENTS[2:])
    expected = torch.stack([literal_adain(row, LATENTS[2]) for row in LATENTS[:2].double()])
    assert (started - expected).norm() < 2e-6 * expected.norm()
    torch.testing.assert_close(started.std((2, 3)), LATENTS[2:].std((2, 3)).expand(2, -1))
    assert torch.equal(StyleID(initial_adain=False).start(LATENTS[:2], LATENTS[2:]), LATENTS[:2])
    torch.testing.assert_close(StyleID().start(LATENTS[:1], LATENTS[:1]), LATENTS[:1])


def test_a_transfer_starts_there(small, pair, monkeypatch) -> None:
    """Rows: output, output without edit, appearance, structure. The others start as they were inverted."""
    samples = watch(small, monkeypatch)
    appearance, structure = pair.latents[2]
    for method, start in (
        (StyleID(), literal_adain(structure, appearance)),
        (FeatureBank("appearance").serve(StyleID()), literal_adain(structure, appearance)),
        (StyleID(initial_adain=False), structure),
        (VisualStylePrompting(), structure),
    ):
        samples.clear()
        if isinstance(method, StyleID | VisualStylePrompting):
            transfer(small, inversion=pair, method=method, adain=None)
        else:  # its bank is empty, which the first edited layer says
            with pytest.raises(RuntimeError, match="bank: expected features"):
                transfer(small, inversion=pair, method=method, adain=None)
        torch.testing.assert_close(
            samples[0], torch.stack([start, start, appearance, structure]), rtol=0, atol=2e-6
        )
    assert torch.equal(pair.latents[2, 1], structure)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_with_another_clean_estimate_keeps_epsilon(kind, eta) -> None:
    """x_{t-1} moves by √ᾱ_{t-1} times what x̂_0 moves by."""
    scheduler = make_scheduler(kind)
    scheduler.set_timesteps(10)
    output, sample, noise = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    seen = []

    def change(clean):
        seen.append(clean)
        return 0.5 * clean + 1

    options = {"noise": noise, "eta": eta}
    for step, timestep in enumerate(scheduler.timesteps[:-1]):
        plain, changed = (
            denoise_step(scheduler, output, timestep, sample, change=each, **options)
            for each in (None, change)
        )
        before = scheduler.alphas_cumprod[scheduler.timesteps[step + 1]]
        expected = plain + before.sqrt() * (1 - 0.5 * seen[-1])
        torch.testing.assert_close(changed, expected, rtol=2e-5, atol=2e-5)
        if kind == "sample":
            torch.testing.assert_close(seen[-1], output)
    assert torch.equal(
        denoise_step(scheduler, output, timestep, sample, change=lambda clean: clean, **options), plain
    )


def test_calibration_recolours_the_clean_estimate_like_the_appearance() -> None:
    method, (one, two) = VisualStylePrompting(), (LATENTS[:2], LATENTS[2:])
    expected = torch.stack([literal_adain(row, LATENTS[2], 1e-8) for row in one.double()])
    for timestep in (101, 149):
        assert (method.change_clean(one, two, timestep) - expected).norm() < 2e-6 * expected.norm()
    for timestep in (100, 150, 999, 1):
        assert torch.equal(method.change_clean(one, two, timestep), one)
    assert torch.equal(VisualStylePrompting(calibration=None).change_clean(one, two, 120), one)


def test_a_transfer_is_calibrated_at_its_timesteps_alone(small, pair, monkeypatch) -> None:
    """At timestep 167 of 831, 665, 499, 333, 167, 1; the first two are skipped."""
    steps = []

    def record(scheduler, output, timestep, sample, **options):
        steps.append((output, int(timestep), sample))
        return denoise_step(scheduler, output, timestep, sample, **options)

    monkeypatch.setattr(transfer_loop, "denoise_step", record)
    options = {"inversion": pair, "adain": None, "structures": pictures(1, seed=1)}
    without = trajectory(small, method=VisualStylePrompting(calibration=None), **options)
    steps.clear()
    within = trajectory(small, method=VisualStylePrompting(calibration=(150, 200)), **options)
    assert torch.equal(within[:2], without[:2]) and torch.equal(within[:, 1:], without[:, 1:])
    output, timestep, sample = steps[2]
    alphas = small.scheduler.alphas_cumprod
    assert timestep == 167
    clean = (sample - (1 - alphas[167]).sqrt() * output) / alphas[167].sqrt()
    moved = alphas[1].sqrt() * (literal_adain(clean[0], clean[1], 1e-8) - clean[0])
    torch.testing.assert_close(within[2, 0], without[2, 0] + moved, rtol=0, atol=2e-5)
    assert moved.abs().max() > 0.01


def test_early_scales() -> None:
    assert early_scales(6).tolist() == [20, 20, 20, 7, 7, 7]
    assert early_scales(3, 5.0, early=9.0, count=1).tolist() == [9, 5, 5] and early_scales(0).tolist() == []
    with pytest.raises(ValueError, match="^steps: expected"):
        early_scales(-1)


@pytest.mark.parametrize("family", ["small", "sdxl"])
def test_stock_pipeline_takes_one_scale_per_step(family) -> None:
    """Each step is the DDIM step of ε(∅) + w (ε(c) - ε(∅)) with its own w, also with a method attached."""
    pipe, predicted, latents = make_pipe(family), [], []
    pipe.unet.register_forward_hook(lambda module, args, output: predicted.append(output[0]))
    noise = torch.randn(2, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    scales = early_scales(4, 3.0, early=20.0, count=2)
    callback = guidance_by_step(scales)

    def step_end(pipe, step, timestep, given):
        latents.append(given["latents"])
        return callback(pipe, step, timestep, given)

    options = {
        "latents": noise,
        "num_inference_steps": 4,
        "output_type": "latent",
        "callback_on_step_end": step_end,
    }
    with attach(pipe, VisualStylePrompting(), layout=BatchLayout("output", "appearance")):
        pipe(PROMPTS[:2], guidance_scale=20.0, **options)
        before = noise
        for step, (timestep, after) in enumerate(zip(pipe.scheduler.timesteps, latents)):
            empty, text = predicted[step].chunk(2)
            expected = pipe.scheduler.step(
                empty + scales[step] * (text - empty), timestep, before
            ).prev_sample
            torch.testing.assert_close(after, expected, rtol=0, atol=2e-5)
            before = after
        with pytest.raises(ValueError, match="guidance_scale: expected 20, the first of the scales, got 7.5"):
            pipe(PROMPTS[:2], guidance_scale=7.5, **options)


@pytest.mark.parametrize("scales", [[], [7.0, 1.0], torch.tensor([0.5])])
def test_scales_of_one_or_less_are_refused(scales) -> None:
    with pytest.raises(ValueError, match="scales: expected one or more above 1, got"):
        guidance_by_step(scales)
