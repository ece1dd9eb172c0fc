"""Measure attention leakage: does the attention of a method stay in the part of the scene where it belongs?

The appearance of one scene is transferred to another, and the parts of both scenes are known.
`attention_tally` counts where matches and attention go in every edited layer and step. A pair of scenes leaks
when its `cross_region_mass`, averaged over layers and steps, is above a threshold. The finished picture is
measured too: the colours of its parts, and its layout.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..context.layers import picture_size
from ..embedded.scenes import ScenePair, held_out_pairs, render
from ..methods import CrossImage, QAlign, QAlignWarp
from .attention_tally import Measured, Tallies, by_layer_and_step, by_part, figures, stacked
from .bootstrap import estimate, resample
from .picture_metrics import colour_error, read_layouts
from .processes import Progress, gathered
from .resuming import KeptResults, keeping

# A bound on the cross-region mass. On 30 pairs of seed 1, Cross-Image leaks in the paper's share of pairs, 94
# of 180.
LEAK_THRESHOLD = 0.79
FIGURES = (
    "part_agreement",
    "token_agreement",
    "own_part_mass",
    "object_background_leakage",
    "cross_region_mass",
    "layout_iou",
    "colour_error",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the transfers run. Everything else has the pipeline's defaults.

    Attributes:
        steps: inference steps of the schedule.
        layers: the edited and measured layers; None is the method's own choice.
        adain: AdaIN of the latents: "masked", "whole" or None.
        every: measure steps that are a multiple of this.
        seed: chooses the pairs and all noise.
        threshold: a pair leaks above this cross-region mass.
    """

    steps: int = 20
    layers: str | Sequence[str] | None = None
    adain: str | None = None
    every: int = 3
    seed: int = 0
    threshold: float = LEAK_THRESHOLD


@dataclass(frozen=True, eq=False)
class PairResult:
    """The measurements of one pair, by method.

    Attributes:
        tallies: of every measured layer and step.
        colour: float64 [PARTS], the distance of part colours from the appearance's. "untouched" is the
            structure picture before the transfer.
        layout: the mean part IoU with the structure's layout. "untouched" is the structure picture before the
            transfer, "appearance" the appearance picture.
    """

    tallies: dict[str, Tallies]
    colour: dict[str, Tensor]
    layout: dict[str, float]


def compared_methods() -> dict[str, CrossImage]:
    """The methods that leakage compares by default, by name: Cross-Image, Q-Align and QAlignWarp."""
    return {"cross_image": CrossImage(), "qalign": QAlign(), "qalign_warp": QAlignWarp()}


@torch.inference_mode()
def measure_pair(
    pipe: Any, pair: ScenePair, methods: Mapping[str, CrossImage], settings: Settings
) -> PairResult:
    """Transfer the appearance of one scene to the other by every method, and measure.

    The result depends on the pair, the methods and the settings alone.
    """
    scenes = render([pair.appearance, pair.structure], picture_size(pipe))
    (appearance, structure), (appearance_labels, structure_labels) = scenes.image, scenes.labels
    prompt = f"a photo of a {scenes.plans[1]}"
    labels = dict.fromkeys(("output", "plain", "structure"), structure_labels)
    labels["appearance"] = appearance_labels
    seed = noise_seed(pair, settings)
    generator = torch.Generator().manual_seed(seed)
    inversion = pipe.invert(
        appearance, structure, prompt, num_inference_steps=settings.steps, generator=generator
    )
    options: dict[str, Any] = {
        "inversion": inversion,
        "layers": settings.layers,
        "adain": settings.adain,
        "noun": scenes.plans[1],
    }
    tallies: dict[str, Tallies] = {}
    pictures = {"untouched": structure}
    for name, method in methods.items():
        measured = Measured(method, labels, every=settings.every)
        output = pipe(None, None, prompt, method=measured, output_type="pt", **options)
        pictures[name], tallies[name] = output.images[0].float().cpu(), measured.tallies
    layout = read_layouts(pipe, pictures | {"appearance": appearance}, scenes, prompt, seed=seed)
    colour = {
        name: colour_error(picture, structure_labels, appearance, appearance_labels)
        for name, picture in pictures.items()
    }
    return PairResult(tallies, colour, layout)


def check_steps(methods: Mapping[str, CrossImage], settings: Settings) -> None:
    """Check, before any pair is measured, that every method has a step that is measured.

    Raises:
        ValueError: a method has none.
    """
    from ..pipelines.transfer_inputs import edited_steps

    for name, method in methods.items():
        if not any(step % settings.every == 0 for step in edited_steps(method, settings.steps)):
            wanted = f"an edited step of {name} among the multiples of {settings.every}"
            raise ValueError(f"every: expected {wanted}, got none in {settings.steps} inference steps")


def noise_seed(pair: ScenePair, settings: Settings) -> int:
    return ((settings.seed * 1_000_003 + pair.appearance) * 1_000_003 + pair.structure) % 2**63


def run(
    pipe: Any,
    *,
    pairs: int = 180,
    methods: Mapping[str, CrossImage] | None = None,
    settings: Settings = Settings(),
    progress: Progress = iter,
    kept: KeptResults | None = None,
) -> dict[str, Any]:
    """Measure methods on held-out pairs and summarise the results.

    The processes of `accelerate launch` or `torchrun` share the pairs. Each of them returns the whole report.

    Args:
        pipe: an `AppearanceTransferPipeline`.
        pairs: number of pairs; `settings.seed` chooses them.
        methods: by name. The others are compared with the first. None is `compared_methods()`.
        settings: how the transfers run.
        progress: wraps the iterable of this process's pairs, as tqdm does.
        kept: keeps the result of each pair, and returns the results that it has already. None keeps nothing.

    Returns:
        The report of `summarise`.
    """
    chosen = compared_methods() if methods is None else methods
    check_steps(chosen, settings)
    work = keeping(kept, "pair", lambda pair: measure_pair(pipe, pair, chosen, settings), PairResult)
    results = gathered(work, held_out_pairs(pairs, settings.seed), progress)
    return summarise(results, settings, {name: repr(method) for name, method in chosen.items()})


def summarise(
    results: Sequence[PairResult], settings: Settings, described: Mapping[str, str]
) -> dict[str, Any]:
    """Summarise the results of pairs in plain numbers and lists, ready for JSON.

    Args:
        results: one for each pair.
        settings: the settings of the measurement.
        described: a description of each method, by name. The others are compared with the first.

    Returns:
        The number of "pairs"; the figures of each of the "methods", with intervals, by part, by layer and
        step; their "differences" from the first method; the figures of the "untouched" structure picture and
        of the "appearance"; and the "settings".
    """
    baseline, *others = described
    tallies = {name: stacked(result.tallies[name] for result in results) for name in described}
    columns = _columns(results, tallies) | _verdicts(results, tallies, settings.threshold)
    means = resample(columns)
    methods: dict[str, Any] = {}
    for name, description in described.items():
        summary = _summary(name, means)
        if name in others:
            summary["leaking_pairs_improved_fraction"] = estimate(means[f"{name}/improved"])
        methods[name] = {figure: entry["value"] for figure, entry in summary.items()}
        methods[name]["leaking_pairs"] = round(methods[name]["leaking_pairs"])
        if name in others:
            methods[name]["leaking_pairs_improved"] = int(columns[f"{name}/improved"].nansum())
        methods[name] |= {
            "intervals": {figure: entry["interval"] for figure, entry in summary.items()},
            "by_part": by_part(tallies[name]),
            "by_layer_and_step": by_layer_and_step(results[0].tallies[name], tallies[name]),
            "method": description,
        }
    return {
        "pairs": len(results),
        "methods": methods,
        "differences": {name: _differences(name, baseline, means) for name in others},
        "untouched": {
            figure: estimate(means[f"untouched/{figure}"]) for figure in ("colour_error", "layout_iou")
        },
        "appearance": {"layout_iou": estimate(means["appearance/layout_iou"])},
        "settings": dataclasses.asdict(settings),
    }


def _columns(results: Sequence[PairResult], tallies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each figure of each pair, averaged over layers and steps, by "method/figure": float64 [pairs]."""
    columns = {
        f"{name}/{figure}": value.flatten(1).nanmean(1)
        for name in tallies
        for figure, value in figures(tallies[name]).items()
    }
    for name in results[0].colour:
        errors = [result.colour[name].nanmean() for result in results]
        columns[f"{name}/colour_error"] = torch.stack(errors)
    for name in results[0].layout:
        columns[f"{name}/layout_iou"] = torch.tensor([result.layout[name] for result in results])
    return columns


def _verdicts(
    results: Sequence[PairResult], tallies: Mapping[str, Tensor], threshold: float
) -> dict[str, Tensor]:
    """Which pairs leak, and which leaking pairs of the first method improve: float64 [pairs]."""
    mass = {
        name: figures(table)["cross_region_mass"].flatten(1).nanmean(1) for name, table in tallies.items()
    }
    baseline, *others = mass
    leaks = {name: value > threshold for name, value in mass.items()}
    columns = {
        f"{name}/leaking_pairs": len(results) * leaks[name].double() for name in mass
    }  # mean: the count
    for name in others:
        better = (mass[name] < mass[baseline]).double()
        columns[f"{name}/improved"] = better.where(leaks[baseline], torch.nan)
    return columns


def _summary(name: str, means: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The value and the interval of each figure of a method."""
    summary = {figure: estimate(means[f"{name}/{figure}"]) for figure in (*FIGURES, "leaking_pairs")}
    summary["colour_ratio"] = estimate(means[f"{name}/colour_error"] / means["untouched/colour_error"])
    return summary


def _differences(name: str, baseline: str, means: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {
        figure: estimate(means[f"{name}/{figure}"] - means[f"{baseline}/{figure}"])
        for figure in (*FIGURES, "leaking_pairs")
    }
