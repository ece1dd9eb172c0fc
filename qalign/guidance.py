"""Swap guidance: away from the prediction without the edit, towards and past the one with it."""

import torch
from torch import Tensor


def swap_scales(steps: int, scale: float = 3.5, *, start: float = 10 / 68) -> Tensor:
    """The guidance scale of every executed step, float32 [steps] on the CPU.

    γ_i = linspace(scale, max(scale / 2, 1), steps)_i from the fraction `start` of the steps on, and 1, no guidance, before.

    Args:
        steps: how many are executed.
        scale: of the first step; 1 or less is no guidance anywhere.
        start: i takes part where i / steps >= start; as published, 10 of 68.

    Source: Cross-Image attention, arXiv 2311.03335.
    """
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps: expected an integer of at least 0, got {steps!r}")
    if scale <= 1:
        return torch.ones(steps)
    ramp = torch.linspace(scale, max(scale / 2, 1), steps)
    ramp[[i for i in range(steps) if i / steps < start]] = 1
    return ramp


def swap_guided(plain: Tensor, swapped: Tensor, scale: float | Tensor) -> Tensor:
    """plain + scale · (swapped - plain): predictions without and with the edit, any shapes that broadcast."""
    return plain + scale * (swapped - plain)
