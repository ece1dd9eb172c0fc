"""What the alignment is made of, varied: the signal that matches tokens, and how attention reads the matches.

Match and attention are measured on the decoder's queries and keys of two noised scenes in one stock pass, so that all variants see the same
features; the definitions are those of `qalign.evaluation.leakage`. What a variant does to the picture is measured by transfers.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qalign_kernels import match_counts, similarity_argmax

from ..context.layer_call import take
from ..context.layers import picture_size, short_name, token_grid
from ..embedded.scenes import PARTS, ScenePair, held_out_pairs, render, token_labels
from ..methods import CrossImage, QAlign, QAlignWarp
from .leakage import (
    PairResult,
    Settings,
    Tallies,
    by_layer_and_step,
    cell,
    check_steps,
    estimate,
    figures,
    layers_of,
    measure,
    measure_pair,
    noise_seed,
    resample,
    row,
    stacked,
    summarise,
    tally,
)
from .noised_features import noised_features
from .processes import Progress, gathered
from .resuming import KeptResults, keeping

NOISE = (0.2, 0.4, 0.6)  # of the training timesteps
SIGNALS = {
    f"query_{compared} {similarity} {heads}": (compared, similarity, heads)
    for compared, similarity, heads in itertools.product(
        ("query", "key"), ("cosine", "dot"), ("joint", "per_head")
    )
}
ATTENTION = ("own_part_mass", "object_background_leakage", "cross_region_mass")


def refinements() -> dict[str, CrossImage]:
    """Cross-Image, then every reading of the alignment with its strengths."""
    variants: dict[str, CrossImage] = {"cross_image": CrossImage()}
    for name in ("warped_output", "rearranged", "warped_values", "none"):
        variants[name] = _aligned(name, "both")
    for aligned in ("output", "structure"):
        for name in ("warped_output", "rearranged"):
            variants[f"{name}, {aligned} aligned"] = _aligned(name, aligned)
    for k in (1, 4, 8, 16):
        variants[f"topk {k}"] = QAlign(refinement="topk", topk=k, aligned="both")
    for strength in (5.0, 10.0, 20.0, 40.0):
        variants[f"guided {strength:.0f}"] = QAlign(refinement="guided", strength=strength, aligned="both")
    return variants | {"soft 20": QAlign(refinement="soft", strength=20.0, aligned="both")}


def _aligned(refinement: str, aligned: str) -> QAlign:
    """`QAlignWarp` is what reads the appearance's own attention."""
    if refinement == "warped_output":
        return QAlignWarp(aligned=aligned)
    return QAlign(refinement=refinement, aligned=aligned)


@dataclass(frozen=True, eq=False)
class Probe:
    """What one pair gave.

    Attributes:
        tallies: by variant, by signal ("query_query cosine joint"), and of "self_attention"; of every decoder layer and timestep.
        matched: U/N, the share of the reference tokens that are anybody's match, by signal.
    """

    tallies: dict[str, Tallies]
    matched: dict[str, dict[tuple[str, int], float]]


@torch.inference_mode()
def probe(pipe: Any, pair: ScenePair, variants: Mapping[str, CrossImage], settings: Settings) -> Probe:
    """Match and attend one scene's queries to the other's keys in every decoder layer, at every level of `NOISE`."""
    scenes = render([pair.structure, pair.appearance], picture_size(pipe))
    levels = [int(level * pipe.scheduler.config.num_train_timesteps) for level in NOISE]
    count = len(levels)
    pictures = scenes.image.repeat_interleave(count, 0)
    seed, prompt = noise_seed(pair, settings), f"a photo of a {scenes.plans[0]}"
    kept = noised_features(
        pipe, pictures, torch.tensor(levels * 2), prompt, seeds=range(seed, seed + 2 * count)
    )
    output, reference = torch.arange(2 * count, dtype=torch.int32, device=pipe.unet.device).chunk(2)
    found = Probe(
        {name: {} for name in ("self_attention", *SIGNALS, *variants)}, {name: {} for name in SIGNALS}
    )
    for layer, (q, k, site) in kept.items():
        labels = (
            token_labels(scenes.labels, token_grid(scenes.labels.shape[1:], q.shape[2]))
            .long()
            .to(q.device)
            .repeat_interleave(count, 0)
        )
        keys = [(layer, level) for level in levels]

        def keep(name: str, tallies: Tensor, keys: Sequence[tuple[str, int]] = keys) -> None:
            found.tallies[name].update(zip(keys, tallies.cpu()))

        keep("self_attention", measure(CrossImage(), q, k, labels, output, output, site))
        for name, method in variants.items():
            keep(name, measure(method, q, k, labels, output, reference, site))
        for name, (features_of, similarity, heads) in SIGNALS.items():
            compared = q if features_of == "query" else k
            index = similarity_argmax(
                take(q, output), compared, similarity=similarity, heads=heads, batch_index=reference
            ).index
            nowhere = q.new_zeros(1, 1, 1, len(PARTS)).expand(count, 1, q.shape[2], -1)
            keep(name, tally(index, nowhere, labels[:count], labels[count:]))
            found.matched[name].update(
                zip(keys, (match_counts(index, k.shape[2]) > 0).double().mean((1, 2)).tolist())
            )
    return found


def run(
    pipe: Any,
    *,
    pairs: int,
    transfers: int,
    settings: Settings,
    progress: Progress = iter,
    kept: KeptResults | None = None,
) -> dict[str, Any]:
    """Matches, attention and pictures of every variant: plain numbers, ready for JSON; shared out over processes as in `leakage.run`.

    Figures are averaged over noise levels and over the layers that Cross-Image edits; `best_layer` is of all decoder layers.

    Args:
        pairs, transfers: how many held-out pairs are probed, and how many of these are transferred with every refinement.
        kept: as `leakage.run`.
    """
    chosen, variants = held_out_pairs(pairs, settings.seed), refinements()
    check_steps(variants, settings)
    probes = gathered(
        keeping(kept, "probe", lambda pair: probe(pipe, pair, variants, settings), Probe), chosen, progress
    )
    transfer = keeping(
        kept, "transfer", lambda pair: measure_pair(pipe, pair, variants, settings), PairResult
    )
    pictures = gathered(transfer, chosen[:transfers], progress)
    transferred = summarise(pictures, settings, {name: repr(method) for name, method in variants.items()})
    return {
        "pairs": pairs,
        "self_attention": _masses(probes, "self_attention"),
        "matches": {name: _match_figures(probes, name) for name in SIGNALS},
        "refinements": {
            name: _masses(probes, name) | {"picture": _picture(transferred, name)} for name in variants
        },
        "transfers": {key: transferred[key] for key in ("pairs", "untouched", "appearance", "settings")},
    }


def _match_figures(probes: Sequence[Probe], name: str) -> dict[str, Any]:
    table = stacked([found.tallies[name] for found in probes])
    layers = layers_of(probes[0].tallies[name])
    by_layer = figures(table)["part_agreement"].nanmean((0, 2))
    edited = _edited(layers)
    matched = torch.tensor(
        [[share for (layer, _), share in found.matched[name].items() if layer in edited] for found in probes]
    )
    agreement = (
        figures(table[:, [layers.index(layer) for layer in edited]])["part_agreement"].flatten(1).nanmean(1)
    )
    return {
        "part_agreement": estimate(resample({"": agreement})[""]),
        "matched_fraction": matched.mean().item(),
        "best_layer": layers[int(by_layer.argmax())],
        "best_layer_agreement": by_layer.max().item(),
        "by_layer": dict(zip(layers, by_layer.tolist())),
        "by_layer_and_noise": by_layer_and_step(probes[0].tallies[name], table)["part_agreement"],
    }


def _masses(probes: Sequence[Probe], name: str) -> dict[str, Any]:
    table = stacked([found.tallies[name] for found in probes])
    layers = layers_of(probes[0].tallies[name])
    edited = figures(table[:, [layers.index(layer) for layer in _edited(layers)]])
    means = resample({figure: edited[figure].flatten(1).nanmean(1) for figure in ATTENTION})
    return {figure: estimate(mean) for figure, mean in means.items()} | {
        "by_layer_and_step": by_layer_and_step(probes[0].tallies[name], table)
    }


def _edited(layers: list[str]) -> list[str]:
    return CrossImage().default_layers(layers)


def _picture(transferred: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What `leakage.summarise` says of a method, but its long tables."""
    return {
        figure: value
        for figure, value in transferred["methods"][name].items()
        if not figure.startswith("by_")
    }


def render_report(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    probed = f"{report['pairs']} pairs, one stock pass at noise levels {', '.join(f'{level:g}' for level in NOISE)}"
    lines = [f"matches, {probed}", row("", ["part agreement", "U/N", "in the best layer", "best layer"])]
    for name, found in report["matches"].items():
        best = [f"{found['best_layer_agreement']:.3f}", short_name(found["best_layer"])]
        lines.append(row(name, [cell(**found["part_agreement"]), f"{found['matched_fraction']:.2f}", *best]))
    lines += ["", f"object attention, {probed}", row("", ["own part", "on background", "across regions"])]
    for name, found in {"self_attention": report["self_attention"], **report["refinements"]}.items():
        lines.append(row(name, [cell(**found[figure]) for figure in ATTENTION]))
    transfers = report["transfers"]
    lines += [
        "",
        f"pictures, {transfers['pairs']} pairs",
        row("", ["colour error / untouched", "part IoU", "across regions", "leaking, improved"]),
    ]
    for name, found in report["refinements"].items():
        picture, intervals = found["picture"], found["picture"]["intervals"]
        cells = [
            cell(picture[figure], intervals[figure])
            for figure in ("colour_ratio", "layout_iou", "cross_region_mass")
        ]
        lines.append(
            row(name, [*cells, f"{picture['leaking_pairs']}, {picture.get('leaking_pairs_improved', '-')}"])
        )
    return "\n".join(lines)
