"""The arguments of an appearance transfer: checks, methods by name, counted steps, pictures of one size."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .._checks import require_count, require_number
from ..context.clock import Clock
from ..methods import TRANSFERS, Method, find_method, require_method
from ..sampling.denoising import set_steps
from ..sampling.inversion import KINDS, Inversion
from .arguments import check_generator, check_noun, check_switches
from .pictures import choose_size, cover, to_tensors

_log = logging.getLogger("qalign")

METHODS = TRANSFERS
PUBLISHED_STEPS = (11 / 68, 1.0)
ADAIN = ("masked", "whole", None)

Generators = torch.Generator | Sequence[torch.Generator] | None


def check_options(
    method: Method | None, adain: Any, edit_steps: Any, regions: Any, noun: Any, freeu: Any
) -> None:
    check_noun(noun)
    check_switches(freeu=freeu)
    if adain not in ADAIN or isinstance(adain, bool):
        raise ValueError(f"adain: expected 'masked', 'whole' or None, got {adain!r}")
    if edit_steps is not None and not _are_fractions(edit_steps):
        expected = "None or fractions (start, stop) with 0 <= start < stop <= 1"
        raise ValueError(f"edit_steps: expected {expected}, got {edit_steps!r}")
    if regions is not None and method is None:
        raise ValueError(f"regions: expected None without a method, got {type(regions).__name__}")


def _are_fractions(steps: Any) -> bool:
    try:
        start, stop = map(float, steps)
    except (TypeError, ValueError):
        return False
    return 0 <= start < stop <= 1


def check_inversion(inversion: Any, steps: Any, scale: Any, freeu: Any, scheduler: DDIMScheduler) -> None:
    """Check the arguments of an inversion, and set the scheduler to its steps."""
    if not isinstance(inversion, str) or inversion not in KINDS:
        raise ValueError(f"inversion: expected an Inversion or one of {', '.join(KINDS)}, got {inversion!r}")
    if inversion == "ddim" and scheduler.config.timestep_spacing == "linspace":
        expected = "a scheduler with timestep_spacing leading or trailing for 'ddim'"
        raise ValueError(f"inversion: expected {expected}, got linspace")
    require_number("inversion_guidance_scale", scale)
    check_switches(freeu=freeu)
    require_count("num_inference_steps", steps, 1)
    set_steps(scheduler, steps)


def make_method(method: Method | str | None) -> Method | None:
    """The method itself, or a new one of that name with its default settings."""
    if isinstance(method, str):
        return find_method(method, METHODS)()
    if method is not None:
        require_method(method)
    return method


def active_steps(method: Method, edit_steps: tuple[float, float] | None) -> tuple[float, float]:
    """(start, stop) of the edit, as fractions of the steps that run."""
    return edit_steps or method.default_steps or PUBLISHED_STEPS


def edited_steps(method: Method, num_inference_steps: int, *, skip: float = 0.32) -> list[int]:
    """List the steps of a transfer at which a method edits and reads the appearance.

    Args:
        method: any method, with its own default steps.
        num_inference_steps: of the inversion.
        skip: the fraction of these that is left out.

    Returns:
        the steps, counted from the first one that runs.

    Raises:
        ValueError: `skip` leaves no step.

    Example:
        >>> from qalign import CrossImage
        >>> edited_steps(CrossImage(), 9)
        [2, 3, 4, 5]
    """
    total = num_inference_steps - count_skipped(skip, num_inference_steps)
    clock = Clock(active_steps(method, None), method.takes_structure)
    found = []
    for step in range(total):
        clock.set(step, total)
        if not clock.idle and not clock.from_structure:
            found.append(step)
    return found


def expect_start(name: str, start: float, total: int) -> None:
    """Warn if what begins at the fraction `start` begins in none of `total` steps."""
    if (total - 1) / total < start:
        _log.warning(
            "%s: it has no effect, as none of %d steps reaches %s_start=%.3g", name, total, name, start
        )


def count_structures(inversion: Inversion, channels: int) -> int:
    """How many structures an inversion has, of latents with so many channels."""
    rows, found = inversion.latents.shape[1:3]
    if found != channels:
        raise ValueError(f"inversion: expected latents of {channels} channels, got {found}")
    if rows < 2:
        raise ValueError(f"inversion: expected rows for [appearance, structures...], got {rows}")
    return rows - 1


def count_skipped(skip: float, steps: int) -> int:
    """How many of `steps` the fraction `skip` leaves out."""
    require_count("num_inference_steps", steps, 1)
    if not isinstance(skip, (int, float)) or not 0 <= skip < 1 or round(skip * steps) >= steps:
        raise ValueError(f"skip: expected a fraction that leaves at least one of {steps} steps, got {skip!r}")
    return round(skip * steps)


def stack_pictures(appearance: Any, structure: Any, height: int | None, width: int | None) -> Tensor:
    """float32 [1 + n, 3, H, W] in [0, 1], on the CPU: the appearance, then the structures."""
    appearances, structures = to_tensors(appearance, "appearance"), to_tensors(structure, "structure")
    if len(appearances) != 1:
        raise ValueError(f"appearance: expected one picture, got {len(appearances)}")
    size = choose_size(structures[0], height, width, "structure")
    return torch.stack([cover(picture, size).cpu() for picture in appearances + structures])


def make_generators(generator: Generators, pictures: int) -> list[torch.Generator]:
    """One generator for each picture. A single one seeds two: the appearance's and the structures'."""
    if generator is None or isinstance(generator, torch.Generator):
        seeds = torch.randint(
            2**62, (2,), generator=generator, device=generator.device if generator else "cpu"
        ).tolist()
        return [torch.Generator().manual_seed(seed) for seed in [seeds[0]] + [seeds[1]] * (pictures - 1)]
    check_generator(generator, several=True)
    if len(generator) != pictures:
        raise ValueError(
            f"generator: expected one, or one for each of {pictures} pictures, got {len(generator)}"
        )
    return list(generator)
