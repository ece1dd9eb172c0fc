"""Compare methods of appearance transfer on one pair: the picture, its time and memory, and its leakage."""

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

# Their output attends itself, so no attention map shows what it takes from the appearance.
UNREAD = (CtrlX, EyeForAnEye)


@dataclass(frozen=True, eq=False)
class Compared:
    """The result of one method on a pair.

    Attributes:
        picture: [3, S, S] in [0, 1].
        time_s: seconds of the transfer, without the inversion.
        peak_mib: peak memory in MiB, above the level before the transfer.
        own_part_mass, object_background_leakage: as in `leakage`, averaged over layers and steps; NaN if
            unknown.
        colour_ratio: the part colour error, divided by that of the untouched structure; NaN without labels.
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
    callback: Callable[[str], None] = lambda name: None,
) -> dict[str, Compared]:
    """Transfer the appearance by every method, from one inversion.

    Time and memory belong to a run that measures nothing else. Leakage is measured in a second run.

    Args:
        pipe: an `AppearanceTransferPipeline`.
        appearance, structure: [3, S, S] in [0, 1].
        prompt: what both pictures show.
        labels: int64 [S, S] of appearance and structure, indices into `qalign.embedded.scenes.PARTS`. None
            measures no leakage.
        methods: by name; None is every method of transfer with its defaults.
        num_inference_steps: of the schedule.
        seed: of the noise.
        callback: called with the name of each method before its run.

    Raises:
        FloatingPointError: a method's picture is not finite.
    """
    methods = {name: kind() for name, kind in METHODS.items()} if methods is None else methods
    generator = torch.Generator().manual_seed(seed)
    inversion = pipe.invert(
        appearance, structure, prompt, num_inference_steps=num_inference_steps, generator=generator
    )
    options: dict[str, Any] = {"inversion": inversion, "adain": None, "output_type": "pt"}
    result = {}
    for name, method in methods.items():
        callback(name)
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
    """The mean part colour error of the picture, divided by that of the untouched structure."""
    of_appearance, of_structure = labels
    after, before = (
        colour_error(each, of_structure, appearance, of_appearance)[OBJECT].nanmean()
        for each in (picture, structure)
    )
    return (after / before).item()


def attention_figures(
    pipe: Any, method: Any, labels: tuple[Tensor, Tensor], prompt: str, options: Mapping[str, Any]
) -> tuple[float, float]:
    """(own_part_mass, object_background_leakage) of a transfer, averaged over measured layers and steps.

    Both are NaN if no measured step was edited.
    """
    of_appearance, of_structure = labels
    rows = {
        "output": of_structure,
        "plain": of_structure,
        "structure": of_structure,
        "appearance": of_appearance,
    }
    measured = Measured(method, rows, every=3)
    pipe(None, None, prompt, method=measured, **options)
    if not measured.tallies:  # there are so few steps that no measured step is edited
        return math.nan, math.nan
    found = figures(torch.stack(list(measured.tallies.values())))
    return found["own_part_mass"].nanmean().item(), found["object_background_leakage"].nanmean().item()
