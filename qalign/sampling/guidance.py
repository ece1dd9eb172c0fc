"""Guidance: swap guidance of Cross-Image attention, Delta-Bridge of SeAl, scales by step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import require_count


def swap_scales(steps: int, scale: float = 3.5, *, start: float = 10 / 68) -> Tensor:
    """List the scales of swap guidance for all steps that run.

    γ_i = linspace(scale, max(scale / 2, 1), steps)_i where i / steps >= start, and 1 before: no guidance.

    Args:
        steps: the number of steps that run.
        scale: the first value of the ramp. At 1 or below, all scales are 1.
        start: the fraction of the steps at which guidance begins. Default 10 / 68, as published.

    Returns:
        float32 [steps], on the CPU.

    Raises:
        ValueError: `steps` is negative or no integer.

    Example:
        >>> swap_scales(4, 3.0, start=0.25).tolist()
        [1.0, 2.5, 2.0, 1.5]

    Source: Cross-Image attention, arXiv 2311.03335.
    """
    require_count("steps", steps)
    if scale <= 1:
        return torch.ones(steps)
    ramp = torch.linspace(scale, max(scale / 2, 1), steps)
    ramp[[i for i in range(steps) if i / steps < start]] = 1
    return ramp


def swap_guided(plain: Tensor, swapped: Tensor, scale: float | Tensor) -> Tensor:
    """Guide a prediction away from the one without the edit.

    plain + scale · (swapped - plain)

    Args:
        plain: the prediction without the edit.
        swapped: the prediction with the edit, of a shape that broadcasts.
        scale: γ, a number or a tensor. 1 is no guidance.

    Returns:
        the guided prediction.

    Example:
        >>> swap_guided(torch.zeros(2), torch.ones(2), 3.5)
        tensor([3.5000, 3.5000])

    Source: Cross-Image attention, arXiv 2311.03335.
    """
    return plain + scale * (swapped - plain)


def early_scales(steps: int, scale: float = 7.0, *, early: float = 20.0, count: int = 3) -> Tensor:
    """List scales of classifier-free guidance that are larger in the first steps.

    Args:
        steps: the number of steps.
        scale: of the later steps.
        early: of the first steps.
        count: the number of first steps.

    Returns:
        float32 [steps], on the CPU.

    Raises:
        ValueError: `steps` is negative or no integer.

    Example:
        >>> early_scales(5).tolist()
        [20.0, 20.0, 20.0, 7.0, 7.0]

    Source: Visual Style Prompting, arXiv 2402.12974, "advanced sampling".
    """
    require_count("steps", steps)
    return torch.where(torch.arange(steps) < count, early, scale)


def guidance_by_step(scales: Sequence[float] | Tensor) -> Callable[[Any, int, Any, dict], dict]:
    """Make a `callback_on_step_end` that sets the scale of classifier-free guidance of each step.

    Args:
        scales: of all steps, each above 1, so that the batch always has both guidance halves. The first one
            is also the `guidance_scale` of the call.

    Returns:
        the callback for a stock pipeline of diffusers.

    Raises:
        ValueError: a scale is 1 or less. The callback raises it too if the `guidance_scale` of the call is
            not the first scale.

    Example:
        >>> scales = early_scales(2, count=1)
        >>> options = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": float(scales[0])}
        >>> pipe(prompt, callback_on_step_end=guidance_by_step(scales), **options).images.shape
        torch.Size([1, 3, 32, 32])

    Source: Visual Style Prompting, arXiv 2402.12974.
    """
    values = [float(scale) for scale in scales]
    if not values or min(values) <= 1:
        raise ValueError(f"scales: expected one or more above 1, got {min(values, default=None)!r}")

    def callback(pipe: Any, step: int, timestep: Any, given: dict) -> dict:
        if step == 0 and abs(pipe.guidance_scale - values[0]) > 1e-6 * values[0]:
            expected = f"{values[0]:g}, the first of the scales"
            raise ValueError(f"guidance_scale: expected {expected}, got {pipe.guidance_scale!r}")
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
    """Combine three predictions by Delta-Bridge: guidance plus a smoothed difference of two prompts.

    ε̂ = ε(z, ∅) + w g_gen + λ low_pass(g_gen - g_app),  g = ε(z, c) - ε(z, ∅)

    Args:
        unconditional: ε(z, ∅) [B, C, h, w].
        generated: ε(z, c_gen), of the output's prompt and the same latents.
        appearance: ε(z, c_app), of the appearance's prompt and the same latents.
        scale: w.
        strength: λ of this step, as in `delta_bridge_strengths`. 0 is classifier-free guidance.
        kernel: as `low_pass`.
        count: as `low_pass`.

    Returns:
        ε̂ [B, C, h, w].

    Raises:
        ValueError: `kernel` or `count` is invalid.

    Example:
        >>> delta_bridge(latents, latents + 1, latents, 2.0, 0.5).sub(latents).mean().item()
        2.5

    Source: SeAl (CVPR 2026), from its project page. Kernel, count, w and the schedule of λ are not
    published there; they are inferred.
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
    """List the strength λ of Delta-Bridge for all steps.

    λ(γ) = strength · clip((end - γ) / (end - hold), 0, 1),  γ = i / (steps - 1)

    Args:
        steps: the number of steps.
        strength: λ up to the progress `hold`.
        hold: the progress γ at which λ begins to fall.
        end: the progress γ at which λ reaches 0.

    Returns:
        float32 [steps], on the CPU.

    Raises:
        ValueError: `steps` is negative or no integer, or not 0 <= hold < end <= 1.

    Example:
        >>> delta_bridge_strengths(5, hold=0.25, end=0.75).tolist()
        [1.0, 1.0, 0.5, 0.0, 0.0]

    Source: SeAl (CVPR 2026) says that λ acts from early to midway and decays to 0. The shape and its
    defaults are inferred.
    """
    require_count("steps", steps)
    if not 0 <= hold < end <= 1:
        raise ValueError(f"hold, end: expected 0 <= hold < end <= 1, got {hold!r}, {end!r}")
    progress = torch.arange(steps) / max(steps - 1, 1)
    return strength * ((end - progress) / (end - hold)).clamp(0, 1)


def low_pass(x: Tensor, *, kernel: int = 3, count: int = 2) -> Tensor:
    """Smooth a map by repeated means over kernel x kernel neighbours.

    Args:
        x: [B, C, h, w].
        kernel: an odd number of pixels.
        count: how often the mean is taken.

    Returns:
        [B, C, h, w]. At a border the mean is over the neighbours inside.

    Raises:
        ValueError: `kernel` is even or below 1, or `count` is negative.

    Example:
        >>> low_pass(torch.tensor([[[[0.0, 3.0, 0.0]]]]), count=1).flatten().tolist()
        [1.5, 1.0, 1.5]
    """
    if not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel: expected an odd integer of at least 1, got {kernel!r}")
    require_count("count", count)
    for _ in range(count):
        x = F.avg_pool2d(x, kernel, stride=1, padding=kernel // 2, count_include_pad=False)
    return x
