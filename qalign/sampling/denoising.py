"""One denoising step of DDIM or DDPM, in float32, its scheduler, and the checks that go with it."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .._checks import require_count

PREDICTIONS = ("epsilon", "v_prediction", "sample")
_HALF_ADVICE = (
    "float16 overflowed: load the pipeline in torch.bfloat16, or put its VAE in torch.float32 and "
    "upcast_attention=True on its UNet"
)
_FULL_ADVICE = "the range of the dtype is not the cause: check the weights, the adapters and the pictures"


def denoise_step(
    scheduler: DDIMScheduler,
    output: Tensor,
    timestep: int | Tensor,
    sample: Tensor,
    *,
    noise: Tensor | None = None,
    eta: float = 1.0,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Take one step from x_t towards the clean latents.

    x_{t-1} = μ + η σ_t z
    μ = √ᾱ_{t-1} x̂_0 + √(1 - ᾱ_{t-1} - η σ_t²) ε̂
    σ_t² = (1 - ᾱ_{t-1}) / (1 - ᾱ_t) · (1 - ᾱ_t / ᾱ_{t-1})

    x̂_0 and ε̂ follow from the output. For t-1 below 0, ᾱ_{t-1} is the scheduler's
    `final_alpha_cumprod`. As published, η is not squared under the root.

    Args:
        scheduler: with its timesteps set. Its clipping and thresholding are ignored.
        output: [B, C, h, w], the output of the model, in the scheduler's prediction type: ε, v or x_0.
        timestep: t, an int or a tensor of one element. A tensor on a GPU makes the CPU wait for it.
        sample: [B, C, h, w], x_t.
        noise: [B, C, h, w], z. None is the deterministic step of DDIM (η = 0).
        eta: η in [0, 1]. It has no effect without `noise`.
        change: called with x̂_0, returns its replacement. ε̂ stays as it is. None changes nothing.

    Returns:
        float32 [B, C, h, w], x_{t-1}.

    Raises:
        TypeError: `scheduler` is not a DDIMScheduler.
        ValueError: an argument is invalid; the message names it.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> scheduler = DDIMScheduler()
        >>> scheduler.set_timesteps(50)
        >>> denoise_step(scheduler, torch.zeros(1, 4, 8, 8), 980, torch.randn(1, 4, 8, 8)).shape
        torch.Size([1, 4, 8, 8])

    Notes:
        The scheduler is not changed. The step is deterministic.

    Source: arXiv 2010.02502, 2304.06140.
    """
    require_ddim(scheduler)
    if scheduler.num_inference_steps is None:
        raise ValueError(
            "scheduler: expected set_timesteps to have been called, got a scheduler without timesteps"
        )
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected a number in [0, 1], got {eta!r}")
    timesteps = torch.as_tensor(timestep, device="cpu").reshape(1)
    mean, deviation = posterior(
        scheduler, output.float(), timesteps, sample.float(), eta if noise is not None else 0.0, change
    )
    return mean if noise is None else mean + deviation * noise.to(mean)


def require_finite(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Return `tensor` if all of its values are finite.

    Args:
        tensor: of any shape.
        name: of the tensor, for the message.
        dtype: in which it was computed. The message advises bfloat16 or float32 for float16.

    Returns:
        `tensor` itself.

    Raises:
        FloatingPointError: a value is NaN or infinite. The message says what to change.

    Example:
        >>> require_finite(torch.ones(2), "latents", torch.float32)
        tensor([1., 1.])

    Notes:
        The CPU waits for the device.
    """
    wrong = tensor.numel() - int(tensor.isfinite().sum())
    if wrong:
        advice = _HALF_ADVICE if dtype == torch.float16 else _FULL_ADVICE
        count = f"{wrong} of {tensor.numel()} NaN or infinite"
        raise FloatingPointError(f"{name}: expected finite values, got {count} in {dtype} ({advice})")
    return tensor


def set_steps(scheduler: Any, steps: int) -> None:
    """Set the timesteps of a scheduler.

    Args:
        scheduler: any scheduler of diffusers.
        steps: the number of inference steps.

    Raises:
        ValueError: `steps` is below 1 or above the number of training timesteps. With a `steps_offset` of 1
            that number itself is too large. Or the first timestep has no signal, from which a predicted ε
            gives no clean latents.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> scheduler = DDIMScheduler()
        >>> set_steps(scheduler, 4)
        >>> scheduler.timesteps.tolist()
        [750, 500, 250, 0]
    """
    require_count("steps", steps, 1)
    known = scheduler.config.num_train_timesteps
    if steps <= known:
        scheduler.set_timesteps(steps)
    if steps > known or int(scheduler.timesteps.max()) >= known:
        raise ValueError(
            f"steps: expected fewer inference steps than the {known} of the model's training, got {steps}"
        )
    levels = getattr(scheduler, "alphas_cumprod", None)
    if levels is None or scheduler.config.get("prediction_type") != "epsilon":
        return
    if levels[scheduler.timesteps.max().long()] == 0:
        expected = "prediction_type v_prediction or sample with a terminal signal of zero"
        raise ValueError(f"scheduler: expected {expected} (rescale_betas_zero_snr), got epsilon")


def ddim_scheduler(scheduler: Any, timesteps: Tensor | None = None, *, kind: Any = DDIMScheduler) -> Any:
    """Make a DDIMScheduler with the noise levels of another scheduler.

    The levels are the tensor `alphas_cumprod` of `scheduler`, whatever its configuration says. The number of
    training timesteps and the prediction type are its own too. All else follows stock's
    `DDIMScheduler.from_config`. Nothing is clipped.

    Args:
        scheduler: any scheduler of diffusers for a diffusion model with discrete timesteps.
        timesteps: int64 [T], noisiest first, which the result must have after `set_timesteps(T)`. None sets
            no timesteps.
        kind: the class of the result: DDIMScheduler or DDIMInverseScheduler.

    Returns:
        a new scheduler. `scheduler` is not changed.

    Raises:
        TypeError: `scheduler` has no such levels, as for EDM and flow matching.
        ValueError: `timesteps` are those of another scheduler.

    Example:
        >>> from diffusers import LCMScheduler
        >>> lcm = LCMScheduler()
        >>> torch.equal(ddim_scheduler(lcm).alphas_cumprod, lcm.alphas_cumprod)
        True
    """
    config, name = scheduler.config, type(scheduler).__name__
    levels, known = getattr(scheduler, "alphas_cumprod", None), config.get("num_train_timesteps")
    if not isinstance(levels, Tensor) or len(levels) != known:
        expected = "one with alphas_cumprod, a noise level for each timestep of the training"
        raise TypeError(f"scheduler: expected {expected}, got {name} without it")
    prediction = config.get("prediction_type", PREDICTIONS[0])
    if prediction not in PREDICTIONS or config.get("use_flow_sigmas", False):
        got = "use_flow_sigmas=True" if prediction in PREDICTIONS else f"prediction_type={prediction!r}"
        raise TypeError(
            f"scheduler: expected one that predicts {', '.join(PREDICTIONS)}, got {name} with {got}"
        )
    taken = inspect.signature(kind.__init__).parameters
    made = kind.from_config(
        {key: value for key, value in config.items() if key in taken or key.startswith("_")},
        num_train_timesteps=known,
        prediction_type=prediction,
        trained_betas=scheduler.betas.tolist(),
        rescale_betas_zero_snr=False,  # the betas are what it made of them
        clip_sample=False,
        **({"thresholding": False} if "thresholding" in taken else {}),
    )
    made.alphas_cumprod = levels.clone()
    if not made.config.set_alpha_to_one:  # else it is 1
        made.final_alpha_cumprod = made.initial_alpha_cumprod = made.alphas_cumprod[0]
    if timesteps is not None:
        made.set_timesteps(len(timesteps))
        if not torch.equal(made.timesteps, timesteps):
            expected = f"the {len(timesteps)} timesteps of this pipeline's scheduler"
            raise ValueError(f"inversion: expected {expected}, got those of another")
    return made


def require_ddim(scheduler: DDIMScheduler) -> None:
    if not isinstance(scheduler, DDIMScheduler):
        advice = "DDIMScheduler.from_config(pipe.scheduler.config)"
        raise TypeError(f"scheduler: expected a DDIMScheduler ({advice}), got {type(scheduler).__name__}")


def noise_levels(scheduler: DDIMScheduler, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """ᾱ_t and ᾱ_{t-1} of timesteps [T], float64 on the CPU; t-1 is one step of the schedule."""
    alphas, final = scheduler.alphas_cumprod.cpu().double(), scheduler.final_alpha_cumprod.cpu().double()
    previous = timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return alphas[timesteps], torch.where(previous >= 0, alphas[previous.clamp(min=0)], final)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Values of the leading dimensions of `like`, in its dtype and on its device, ready to broadcast."""
    return values.view(*values.shape, *[1] * (like.ndim - values.ndim)).to(like.dtype).to(like.device)


def posterior(
    scheduler: DDIMScheduler,
    output: Tensor,
    timesteps: Tensor,
    sample: Tensor,
    eta: float,
    change: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """μ [B, C, h, w] and η σ_t [B or 1, 1, 1, 1] of `denoise_step` for timesteps [B or 1] on the CPU."""
    if output.shape != sample.shape:
        raise ValueError(f"output: expected {list(sample.shape)} as the sample, got {list(output.shape)}")
    alpha, before = noise_levels(scheduler, timesteps)
    variance = (1 - before) / (1 - alpha) * (1 - alpha / before)
    direction = (1 - before - eta * variance).clamp(min=0).sqrt()
    signal, noise, signal_before, direction, deviation = (
        spread(x, sample)
        for x in (alpha.sqrt(), (1 - alpha).sqrt(), before.sqrt(), direction, eta * variance.sqrt())
    )
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        clean, epsilon = (sample - noise * output) / signal, output
    elif kind == "v_prediction":
        clean, epsilon = signal * sample - noise * output, signal * output + noise * sample
    elif kind == "sample":
        clean, epsilon = output, (sample - signal * output) / noise
    else:
        raise ValueError(f"scheduler: expected prediction_type epsilon, v_prediction or sample, got {kind!r}")
    if change is not None:
        clean = change(clean)
    return signal_before * clean + direction * epsilon, deviation
