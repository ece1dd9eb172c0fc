"""Inversion: the noise from which a diffusion model reproduces given latents, and the step that does it. Arithmetic in float32."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qalign_kernels._files import replacing

from .._checks import require_count

Predict = Callable[
    [Tensor, Tensor], Tensor
]  # (latents [B, C, h, w], timesteps int64 [B]) -> the guided output, in the scheduler's prediction_type

KINDS = ("ddpm", "ddim")
_FORMAT = "qalign.inversion.1"
_HALF_ADVICE = "float16 overflowed: load the pipeline in torch.bfloat16, or put its VAE in torch.float32 and upcast_attention=True on its UNet"
_FULL_ADVICE = "its range is not the cause: look at the weights, the adapters and the pictures"


@dataclass(frozen=True, eq=False)
class Inversion:
    """What an inversion found, noisiest first.

    Attributes:
        kind: "ddpm" or "ddim".
        latents: float32 [T + 1, B, C, h, w], before each of T steps; the last are the clean ones.
        noises: float32 [T, B, C, h, w], z of each step, the last one zero; None of a deterministic inversion.
        timesteps: int64 [T], on the CPU.
        eta: the weight of the noises in `denoise_step`.
    """

    kind: str
    latents: Tensor
    noises: Tensor | None
    timesteps: Tensor
    eta: float

    def __post_init__(self) -> None:
        shape, steps = list(self.latents.shape), len(self.timesteps)
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if len(shape) != 5 or shape[0] != steps + 1:
            raise ValueError(f"latents: expected [T + 1 = {steps + 1}, B, C, h, w], got {shape}")
        if (self.noises is None) != (self.kind == "ddim"):
            raise ValueError(
                f"noises: expected {'None' if self.kind == 'ddim' else 'a tensor'} of {self.kind}, got {type(self.noises).__name__}"
            )
        if self.noises is not None and list(self.noises.shape) != [steps, *shape[1:]]:
            raise ValueError(f"noises: expected {[steps, *shape[1:]]}, got {list(self.noises.shape)}")

    def to(self, device: torch.device | str) -> Self:
        """The same with latents and noises on `device`."""
        return replace(
            self,
            latents=self.latents.to(device),
            noises=None if self.noises is None else self.noises.to(device),
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, and the folder it is in; whoever reads `path` meanwhile finds the old file or the whole new one."""
        tensors = {
            name: getattr(self, name).contiguous()
            for name in ("latents", "noises", "timesteps")
            if getattr(self, name) is not None
        }
        with replacing(Path(path)) as unfinished:
            save_file(
                tensors, unfinished, metadata={"format": _FORMAT, "kind": self.kind, "eta": repr(self.eta)}
            )

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: torch.device | str = "cpu") -> Self:
        """Read what `save` wrote; FileNotFoundError where nothing is, ValueError where it is anything else."""
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"path: expected a file written by Inversion.save, got {os.fspath(path)!r}, which is not there"
            )
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"format {metadata.get('format')!r} in place of {_FORMAT!r}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            found = cls(
                metadata["kind"],
                tensors["latents"],
                tensors.get("noises"),
                tensors["timesteps"],
                float(metadata["eta"]),
            )
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"path: expected a file written by Inversion.save, got {os.fspath(path)!r} ({error})"
            ) from error
        return found.to(device)


@torch.no_grad()
def invert_ddpm(
    predict: Predict,
    scheduler: DDIMScheduler,
    clean: Tensor,
    *,
    steps: int,
    eta: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    batch_size: int = 8,
    progress: Callable[[int], Any] | None = None,
) -> Inversion:
    """Edit-friendly DDPM inversion: independently noised latents, and the noises that lead from each to the next.

    x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε_t,  z_t = (x_{t-1} - μ_t(x_t)) / (η σ_t),  then x_{t-1} ← μ_t + η σ_t z_t; μ and σ as in `denoise_step`.

    Every ε_t is its own draw, so no x_t depends on a prediction, and predictions of several timesteps share a batch. The last z is zero:
    there the model's own estimate is taken, and only there do the noises lead anywhere but to the stored latents.

    Args:
        predict: the model, guidance applied. Its rows are whole timesteps, each with all images in their order.
        scheduler: a DDIMScheduler, which is left set to `steps` timesteps. It is not asked to clip: latents have no bounds.
        clean: [B, C, h, w].
        steps: T.
        eta: in (0, 1].
        generator: one for all images, drawn from image by image, so that an image's noise does not depend on those after it; or one each.
        batch_size: rows of one call of `predict`, rounded down to whole timesteps, but one timestep at least.
        progress: called with the number of timesteps done since the last call, as `tqdm.update`.

    Raises:
        TypeError, ValueError: a bad argument, named. FloatingPointError: a prediction with NaN or infinity.
    Source: arXiv 2304.06140.
    """
    if not 0 < eta <= 1:
        raise ValueError(
            f"eta: expected a number in (0, 1], got {eta!r} (deterministic inversion is invert_ddim)"
        )
    clean, timesteps = _begin(scheduler, clean, steps)
    images = len(clean)
    alpha = _rows(_levels(scheduler, timesteps)[0].unsqueeze(1), clean.unsqueeze(0))
    latents = torch.cat(
        [alpha.sqrt() * clean + (1 - alpha).sqrt() * _draws(generator, steps, clean), clean.unsqueeze(0)]
    )
    noises = torch.empty_like(latents[:-1])
    together = max(1, batch_size // images)
    for start in reversed(
        range(0, steps, together)
    ):  # least noisy first: a corrected x_{t-1} has already been predicted from
        some = slice(start, min(start + together, steps))
        sample, timestep = latents[some].flatten(0, 1), timesteps[some].repeat_interleave(images)
        mean, deviation = _posterior(scheduler, _predict(predict, sample, timestep), timestep, sample, eta)
        mean, deviation = mean.unflatten(0, (-1, images)), deviation.unflatten(0, (-1, images))
        noises[some] = (latents[1:][some] - mean) / deviation
        latents[1:][some] = mean + deviation * noises[some]
        if progress is not None:
            progress(len(mean))
    latents[-1], noises[-1] = clean, 0
    return Inversion("ddpm", latents, noises, timesteps, float(eta))


@torch.no_grad()
def invert_ddim(
    predict: Predict,
    scheduler: DDIMScheduler,
    clean: Tensor,
    *,
    steps: int,
    progress: Callable[[int], Any] | None = None,
) -> Inversion:
    """Deterministic inversion: DDIM's equation run from clean to noise by diffusers' DDIMInverseScheduler. Arguments as `invert_ddpm`.

    Each step takes the prediction at its own start for that at its end, so that going back is near, and nearer with more steps.

    Source: arXiv 2010.02502.
    """
    clean, timesteps = _begin(scheduler, clean, steps)
    inverse = DDIMInverseScheduler.from_config({**scheduler.config, "clip_sample": False})
    inverse.set_timesteps(steps)
    latents = [clean]
    for timestep in inverse.timesteps:
        output = _predict(predict, latents[-1], timestep.expand(len(clean)))
        latents.append(inverse.step(output, timestep, latents[-1]).prev_sample)
        if progress is not None:
            progress(1)
    return Inversion("ddim", torch.stack(latents[::-1]), None, timesteps, 0.0)


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
    """One step towards the clean latents, float32.

    x_{t-1} = μ + η σ_t z,  μ = √ᾱ_{t-1} x̂_0 + √(1 - ᾱ_{t-1} - η σ_t²) ε̂,  σ_t² = (1 - ᾱ_{t-1}) / (1 - ᾱ_t) · (1 - ᾱ_t / ᾱ_{t-1});
    ᾱ_{t-1} below timestep 0 is the scheduler's `final_alpha_cumprod`. Between 0 and 1, η is not squared under the root, as published.

    Args:
        scheduler: a DDIMScheduler with its timesteps set. It is not asked to clip, and nothing in it is changed.
        output: [B, C, h, w], the model's, in the scheduler's prediction_type: ε, v or x_0.
        timestep: an int, or a tensor of one on any device (from a GPU it has to wait for it).
        sample: [B, C, h, w], x_t.
        noise: z [B, C, h, w]; None is the deterministic step of DDIM, η = 0.
        change: what is made of x̂_0 before the step; ε̂ stays as it was.

    Raises:
        TypeError, ValueError: a bad argument, named.
    Source: arXiv 2010.02502, 2304.06140.
    """
    _check_scheduler(scheduler)
    if scheduler.num_inference_steps is None:
        raise ValueError("scheduler: expected set_timesteps to have been called, got none set")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected a number in [0, 1], got {eta!r}")
    timesteps = torch.as_tensor(timestep, device="cpu").reshape(1)
    mean, deviation = _posterior(
        scheduler, output.float(), timesteps, sample.float(), eta if noise is not None else 0.0, change
    )
    return mean if noise is None else mean + deviation * noise.to(mean)


def require_finite(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """`tensor`, if nothing in it is NaN or infinite; else a FloatingPointError that says what to change. Waits for the device.

    Args:
        name: of the tensor, for the message.
        dtype: in which it was computed.
    """
    wrong = tensor.numel() - int(tensor.isfinite().sum())
    if wrong:
        advice = _HALF_ADVICE if dtype == torch.float16 else _FULL_ADVICE
        raise FloatingPointError(
            f"{name}: expected finite values, got {wrong} of {tensor.numel()} NaN or infinite in {dtype} ({advice})"
        )
    return tensor


def set_steps(scheduler: Any, steps: int) -> None:
    """Set a scheduler to `steps` inference steps.

    Raises:
        ValueError: no steps, or more than the scheduler has timesteps (one fewer where they begin at 1).
    """
    require_count("steps", steps, 1)
    known = scheduler.config.num_train_timesteps
    if steps <= known:
        scheduler.set_timesteps(steps)
    if steps > known or int(scheduler.timesteps.max()) >= known:
        raise ValueError(
            f"steps: expected fewer inference steps than the {known} of the model's training, got {steps}"
        )


def _begin(scheduler: DDIMScheduler, clean: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The clean latents in float32, and the timesteps on the CPU, noisiest first."""
    if clean.ndim != 4 or not clean.is_floating_point() or not len(clean):
        raise ValueError(
            f"clean: expected floating-point latents [B, C, h, w], got {clean.dtype} {list(clean.shape)}"
        )
    _check_scheduler(scheduler)
    set_steps(scheduler, steps)
    return require_finite(clean, "clean latents", clean.dtype).float(), scheduler.timesteps.cpu().long()


def _check_scheduler(scheduler: DDIMScheduler) -> None:
    if not isinstance(scheduler, DDIMScheduler):
        advice = "DDIMScheduler.from_config(pipe.scheduler.config)"
        raise TypeError(f"scheduler: expected a DDIMScheduler ({advice}), got {type(scheduler).__name__}")


def _draws(
    generator: torch.Generator | Sequence[torch.Generator] | None, steps: int, clean: Tensor
) -> Tensor:
    """Independent normal noise [steps, B, C, h, w], image after image."""
    images = len(clean)
    generators = (
        [generator] * images
        if generator is None or isinstance(generator, torch.Generator)
        else list(generator)
    )
    if len(generators) != images:
        raise ValueError(
            f"generator: expected one, or one for each of {images} images, got {len(generators)}"
        )
    shape = (steps, *clean.shape[1:])
    return torch.stack(
        [
            randn_tensor(shape, generator=each, device=clean.device, dtype=torch.float32)
            for each in generators
        ],
        dim=1,
    )


def _predict(predict: Predict, sample: Tensor, timesteps: Tensor) -> Tensor:
    output = predict(sample, timesteps.to(sample.device))
    return require_finite(output, "model output", output.dtype).float()


def _levels(scheduler: DDIMScheduler, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """ᾱ_t and ᾱ_{t-1} of timesteps [T], float64 on the CPU, where t-1 is one step of the schedule."""
    alphas, final = scheduler.alphas_cumprod.cpu().double(), scheduler.final_alpha_cumprod.cpu().double()
    previous = timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return alphas[timesteps], torch.where(previous >= 0, alphas[previous.clamp(min=0)], final)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """Values of the leading dimensions, with dimensions for the others of `like`, in its dtype and on its device."""
    return values.view(*values.shape, *[1] * (like.ndim - values.ndim)).to(like.dtype).to(like.device)


def _posterior(
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
    alpha, before = _levels(scheduler, timesteps)
    variance = (1 - before) / (1 - alpha) * (1 - alpha / before)
    direction = (1 - before - eta * variance).clamp(min=0).sqrt()
    signal, noise, signal_before, direction, deviation = (
        _rows(x, sample)
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
