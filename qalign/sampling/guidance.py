"""Guidance: swap guidance, away from the prediction without the edit and past the one with it; Delta-Bridge; scales that change with the step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import require_count


def swap_scales(steps: int, scale: float = 3.5, *, start: float = 10 / 68) -> Tensor:
    """The guidance scale of every executed step, float32 [steps] on the CPU.

    γ_i = linspace(scale, max(scale / 2, 1), steps)_i from the fraction `start` of the steps on, and 1, no guidance, before.

    Args:
        steps: how many are executed.
        scale: of the first step; 1 or less is no guidance anywhere.
        start: i takes part where i / steps >= start; as published, 10 of 68.

    Source: Cross-Image attention, arXiv 2311.03335.
    """
    require_count("steps", steps)
    if scale <= 1:
        return torch.ones(steps)
    ramp = torch.linspace(scale, max(scale / 2, 1), steps)
    ramp[[i for i in range(steps) if i / steps < start]] = 1
    return ramp


def swap_guided(plain: Tensor, swapped: Tensor, scale: float | Tensor) -> Tensor:
    """plain + scale · (swapped - plain): predictions without and with the edit, any shapes that broadcast."""
    return plain + scale * (swapped - plain)


def early_scales(steps: int, scale: float = 7.0, *, early: float = 20.0, count: int = 3) -> Tensor:
    """Scales of classifier-free guidance, float32 [steps] on the CPU: `early` at the first `count` steps, then `scale`.

    Source: Visual Style Prompting, arXiv 2402.12974, "advanced sampling".
    """
    require_count("steps", steps)
    return torch.where(torch.arange(steps) < count, early, scale)


def guidance_by_step(scales: Sequence[float] | Tensor) -> Callable[[Any, int, Any, dict], dict]:
    """A `callback_on_step_end` that gives each step of a stock pipeline its own scale of classifier-free guidance.

    >>> scales = early_scales(50)
    >>> pipe(prompts, num_inference_steps=50, guidance_scale=float(scales[0]), callback_on_step_end=guidance_by_step(scales))

    Args:
        scales: of every step, each above 1, for the batch has both guidance parts throughout. The first is the call's `guidance_scale`.

    Raises:
        ValueError: a scale of 1 or less; and in the call, whose `guidance_scale` is not the first.
    """
    values = [float(scale) for scale in scales]
    if not values or min(values) <= 1:
        raise ValueError(f"scales: expected one or more above 1, got {min(values, default=None)!r}")

    def callback(pipe: Any, step: int, timestep: Any, given: dict) -> dict:
        if step == 0 and abs(pipe.guidance_scale - values[0]) > 1e-6 * values[0]:
            raise ValueError(
                f"guidance_scale: expected {values[0]:g}, the first of the scales, got {pipe.guidance_scale!r}"
            )
        pipe._guidance_scale = values[min(step + 1, len(values) - 1)]
        return given

    return callback


def delta_bridge(
    unconditional: Tensor,
    generated: Tensor,
    appearance: Tensor,
    scale: float | Tensor,
    strength: float | Tensor,
    *,
    kernel: int = 3,
    count: int = 2,
) -> Tensor:
    """Classifier-free guidance by the output's prompt, and a smoothed difference to that by the appearance's.

    ε̂ = ε(z, ∅) + w g_gen + λ Δ_f,  g = ε(z, c) - ε(z, ∅),  Δ_f = `low_pass`(g_gen - g_app); λ = 0 is classifier-free guidance.

    Args:
        unconditional, generated, appearance: ε(z, ∅), ε(z, c_gen) and ε(z, c_app) [B, C, h, w]: three predictions for the same latents.
        scale: w.
        strength: λ of this step, as `delta_bridge_strengths` gives it.
        kernel, count: as `low_pass`.

    Source: SeAl (CVPR 2026), from its project page. Not published there, and inferred here: kernel, count, w and the schedule of λ.
    """
    towards = generated - unconditional
    return (
        unconditional
        + scale * towards
        + strength * low_pass(towards - (appearance - unconditional), kernel=kernel, count=count)
    )


def delta_bridge_strengths(
    steps: int, strength: float = 1.0, *, hold: float = 0.4, end: float = 0.8
) -> Tensor:
    """λ of every step, float32 [steps] on the CPU: `strength` up to the progress `hold`, from there linearly to 0 at `end`, and 0 after.

    λ(γ) = strength · clip((end - γ) / (end - hold), 0, 1),  γ = i / (steps - 1)

    Source: SeAl (CVPR 2026) says that λ acts early to midway and decays to 0; this shape and its defaults are inferred.
    """
    require_count("steps", steps)
    if not 0 <= hold < end <= 1:
        raise ValueError(f"hold, end: expected 0 <= hold < end <= 1, got {hold!r}, {end!r}")
    progress = torch.arange(steps) / max(steps - 1, 1)
    return strength * ((end - progress) / (end - hold)).clamp(0, 1)


def low_pass(x: Tensor, *, kernel: int = 3, count: int = 2) -> Tensor:
    """The mean over kernel x kernel neighbours, `count` times over; at the borders over those that are there. [B, C, h, w] to the same."""
    if not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel: expected an odd integer of at least 1, got {kernel!r}")
    require_count("count", count)
    for _ in range(count):
        x = F.avg_pool2d(x, kernel, stride=1, padding=kernel // 2, count_include_pad=False)
    return x
