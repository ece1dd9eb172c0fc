"""Noise levels are those of the pipeline's own scheduler, for every scheduler that diffusers ships."""

import inspect
import itertools
import warnings

import diffusers
import pytest
import torch
from diffusers import ConfigMixin, DDIMInverseScheduler, DDIMScheduler, SchedulerMixin
from torch import Tensor

from qalign.sampling.denoising import ddim_scheduler, denoise_step, set_steps

warnings.filterwarnings("ignore", module="diffusers")
TRAINED = 50
OPTIONS = {
    "defaults": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "exp": {"beta_schedule": "exp"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "laplace": {"beta_schedule": "laplace"},
    "trained_betas": {"trained_betas": torch.linspace(0.01, 0.2, TRAINED).tolist()},
    "zero_snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "snr_shift": {"snr_shift_scale": 2.0},
    "karras": {"use_karras_sigmas": True},
    "flow": {"use_flow_sigmas": True},
    "flow_prediction": {"prediction_type": "flow_prediction"},
}
NEEDS = {"AmusedScheduler": {"mask_token_id": 5}, "VQDiffusionScheduler": {"num_vec_classes": 8}}
NO_NOISING = ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler", "RePaintScheduler")
OTHER_SIGMAS = ("karras",)  # their sigmas lie between those of whole timesteps


def scheduler_classes() -> dict[str, type]:
    found = {}
    for name in dir(diffusers.schedulers):
        kind = getattr(diffusers.schedulers, name)
        if inspect.isclass(kind) and issubclass(kind, ConfigMixin) and issubclass(kind, SchedulerMixin):
            found[name] = kind
    return found


def make(name: str, options: dict):
    """A scheduler, or None where diffusers has no such combination or lacks a library for it."""
    kind = scheduler_classes()[name]
    takes = inspect.signature(kind.__init__).parameters
    options = options | NEEDS.get(name, {})
    if set(options) - set(takes):
        return None
    if "num_train_timesteps" in takes:
        options = {"num_train_timesteps": TRAINED} | options
    try:
        return kind(**options)
    except (ImportError, NotImplementedError, ValueError, TypeError, AttributeError):
        return None


def stock_inputs(scheduler, clean: Tensor, noise: Tensor) -> dict[int, Tensor]:
    """What stock gives the UNet for clean latents that it noised itself, at some whole timesteps."""
    found = {}
    for place in range(0, TRAINED, TRAINED // 4):
        if type(scheduler).__name__ not in ("LCMScheduler", "TCDScheduler"):  # these noise without timesteps
            scheduler.set_timesteps(TRAINED)
        timestep = scheduler.timesteps[place]
        if timestep == timestep.long():
            noised = scheduler.add_noise(clean, noise, timestep[None])
            scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
            found[int(timestep)] = scale(noised, timestep)
    return found


@pytest.mark.parametrize("name", sorted(scheduler_classes()))
def test_levels_are_stocks_or_refused(name: str) -> None:
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for option, settings in OPTIONS.items():
        scheduler = make(name, settings)
        if scheduler is None:
            continue
        flow = "flow" in option or "flow" in str(scheduler.config.get("prediction_type"))
        if flow or not hasattr(scheduler, "alphas_cumprod"):
            with pytest.raises(TypeError, match=rf"^scheduler: expected .*, got {name} with"):
                ddim_scheduler(scheduler)
            continue
        ours = ddim_scheduler(scheduler)
        assert torch.equal(ours.alphas_cumprod, scheduler.alphas_cumprod), option
        assert ours.config.num_train_timesteps == TRAINED
        assert ours.config.prediction_type == scheduler.config.get("prediction_type", "epsilon"), option
        if name in NO_NOISING or option in OTHER_SIGMAS:
            continue
        inputs = stock_inputs(scheduler, clean, noise)
        assert len(inputs) >= 2, option
        for timestep, expected in inputs.items():
            noised = ours.add_noise(clean, noise, torch.tensor([timestep]))
            torch.testing.assert_close(noised, expected, rtol=0, atol=2e-6, msg=f"{option} at {timestep}")


def test_ddim_scheduler_stays_as_it_is() -> None:
    for settings in (
        {"set_alpha_to_one": False, "steps_offset": 1},
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"timestep_spacing": "linspace", "beta_schedule": "squaredcos_cap_v2"},
    ):
        stock = DDIMScheduler(**settings)
        ours = ddim_scheduler(stock)
        for each in (stock, ours):
            each.set_timesteps(7)
        assert torch.equal(ours.timesteps, stock.timesteps)
        assert torch.equal(ours.alphas_cumprod, stock.alphas_cumprod)
        assert torch.equal(ours.final_alpha_cumprod, stock.final_alpha_cumprod)


def test_inverse_has_the_same_levels() -> None:
    for stock in (diffusers.LCMScheduler(set_alpha_to_one=False), diffusers.KDPM2DiscreteScheduler()):
        ours, inverse = ddim_scheduler(stock), ddim_scheduler(stock, kind=DDIMInverseScheduler)
        assert type(inverse) is DDIMInverseScheduler
        assert torch.equal(inverse.alphas_cumprod, stock.alphas_cumprod)
        assert torch.equal(inverse.initial_alpha_cumprod, ours.final_alpha_cumprod)


def test_levels_that_were_set_are_kept() -> None:
    stock = DDIMScheduler()
    stock.alphas_cumprod = torch.linspace(0.9, 0.1, 1000)
    assert torch.equal(ddim_scheduler(stock).alphas_cumprod, stock.alphas_cumprod)


def test_zero_snr_needs_another_prediction() -> None:
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match="^scheduler: expected prediction_type v_prediction or sample"):
        set_steps(ddim_scheduler(DDIMScheduler(**zero)), 4)
    set_steps(ddim_scheduler(DDIMScheduler(**zero, prediction_type="v_prediction")), 4)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_steps_are_stocks_under_every_option(spacing: str, prediction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, zero_snr, to_one, offset in itertools.product(
        ("LCMScheduler", "DDIMScheduler"), (False, True), (False, True), (0, 1)
    ):
        zero_snr = zero_snr and prediction != "epsilon"
        stock = getattr(diffusers, name)(
            rescale_betas_zero_snr=zero_snr,
            set_alpha_to_one=to_one,
            steps_offset=offset,
            prediction_type=prediction,
            timestep_spacing=spacing,
        )
        ours = ddim_scheduler(stock)
        reference = DDIMScheduler.from_config(
            {key: value for key, value in stock.config.items() if not key.startswith("_")}, clip_sample=False
        )
        for each in (ours, reference):
            each.set_timesteps(5)
        assert torch.equal(ours.timesteps, reference.timesteps)
        for timestep in ours.timesteps:
            sample, output = torch.randn(2, 1, 4, 4, 4, generator=generator)
            expected = reference.step(output, timestep, sample).prev_sample
            torch.testing.assert_close(
                denoise_step(ours, output, timestep, sample), expected, rtol=1e-4, atol=1e-5
            )
