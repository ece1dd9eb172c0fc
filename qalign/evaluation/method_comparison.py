"""Every method of appearance transfer on one pair of pictures: the picture, its time and memory, and where its attention went."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..methods import CtrlX, EyeForAnEye, Method
from ..pipelines import METHODS
from .attention_tally import Measured, figures
from .peak_memory import PeakMemory
from .picture_metrics import OBJECT, colour_error

UNREAD = (
    CtrlX,
    EyeForAnEye,
)  # their output attends itself: what it took of the appearance stands in no attention map


@dataclass(frozen=True, eq=False)
class Compared:
    """What one method made of a pair.

    Attributes:
        picture: [3, S, S] in [0, 1].
        time_s: of the transfer, inversion apart, in seconds. peak_mib: peak memory above the level before it, in MiB.
        own_part_mass, object_background_leakage: as `leakage`, mean over layers and steps; NaN where that is not known.
        colour_ratio: part colour error over that of the untouched structure; NaN without labels.
    """

    picture: Tensor
    time_s: float
    peak_mib: float
    own_part_mass: float
    object_background_leakage: float
    colour_ratio: float


@torch.inference_mode()
def compare_methods(
    pipe: Any,
    appearance: Tensor,
    structure: Tensor,
    prompt: str,
    *,
    labels: tuple[Tensor, Tensor] | None = None,
    methods: Mapping[str, Method] | None = None,
    num_inference_steps: int = 20,
    seed: int = 0,
    told: Callable[[str], None] = lambda name: None,
) -> dict[str, Compared]:
    """Transfer the appearance by every method, from one inversion.

    Args:
        pipe: an `AppearanceTransferPipeline`.
        appearance, structure: [3, S, S] in [0, 1].
        prompt: what both show.
        labels: int64 [S, S] of appearance and structure, by `qalign.embedded.scenes.PARTS`; None measures no leakage.
        methods: by name; None is all that transfer, by their defaults.
        told: called with each name before its turn.

    Time and memory are of a run that measures nothing else; leakage is read in a second one. Raises FloatingPointError where a method's picture
    is not finite.
    """
    methods = {name: kind() for name, kind in METHODS.items()} if methods is None else methods
    generator = torch.Generator().manual_seed(seed)
    inversion = pipe.invert(
        appearance, structure, prompt, num_inference_steps=num_inference_steps, generator=generator
    )
    options: dict[str, Any] = {"inversion": inversion, "adain": None, "output_type": "pt"}
    result = {}
    for name, method in methods.items():
        told(name)
        begun = time.perf_counter()
        with PeakMemory(pipe.device) as memory:
            picture = pipe(None, None, prompt, method=method, **options).images[0].float().cpu()
        took = time.perf_counter() - begun
        own, background, colour = math.nan, math.nan, math.nan
        if labels is not None:
            colour = colour_ratio(picture, appearance, structure, labels)
            if not isinstance(method, UNREAD):
                own, background = attention_figures(pipe, method, labels, prompt, options)
        result[name] = Compared(picture, took, memory.peak_mib, own, background, colour)
    return result


def colour_ratio(
    picture: Tensor, appearance: Tensor, structure: Tensor, labels: tuple[Tensor, Tensor]
) -> float:
    """Mean part colour error of the picture, over that of the structure as it was."""
    of_appearance, of_structure = labels
    after, before = (
        colour_error(each, of_structure, appearance, of_appearance)[OBJECT].nanmean()
        for each in (picture, structure)
    )
    return (after / before).item()


def attention_figures(
    pipe: Any, method: Any, labels: tuple[Tensor, Tensor], prompt: str, options: Mapping[str, Any]
) -> tuple[float, float]:
    """(own_part_mass, object_background_leakage) of a transfer, mean over the measured layers and steps; NaN where none was edited."""
    of_appearance, of_structure = labels
    rows = {
        "output": of_structure,
        "plain": of_structure,
        "structure": of_structure,
        "appearance": of_appearance,
    }
    measured = Measured(method, rows, every=3)
    pipe(None, None, prompt, method=measured, **options)
    if not measured.tallies:  # so few steps that no measured one is edited
        return math.nan, math.nan
    found = figures(torch.stack(list(measured.tallies.values())))
    return found["own_part_mass"].nanmean().item(), found["object_background_leakage"].nanmean().item()
