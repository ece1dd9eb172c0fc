"""Vary the parts of the alignment: the signal that matches tokens, and how attention uses the matches.

Matches and attention are measured on the decoder's queries and keys of two noised scenes in one pass without
edits, so all variants see the same features. The figures are those of `qalign.evaluation.leakage`. The effect
of a variant on the picture is measured by transfers.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qalign_kernels import match_counts, similarity_argmax

from ..context.layer_call import Site, take
from ..context.layers import picture_size, token_grid
from ..embedded.scenes import PARTS, ScenePair, held_out_pairs, render, token_labels
from ..methods import CrossImage, QAlign, QAlignWarp
from .attention_tally import Tallies, by_layer_and_step, figures, layers_of, measure, stacked, tally
from .bootstrap import estimate, resample
from .leakage import PairResult, Settings, check_steps, compared_methods, measure_pair, noise_seed, summarise
from .noised_features import noised_features
from .processes import Progress, gathered
from .resuming import KeptResults, keeping

NOISE = (0.2, 0.4, 0.6)  # noise levels, as fractions of the training timesteps
SIGNALS = {
    f"query_{compared} {similarity} {heads}": (compared, similarity, heads)
    for compared, similarity, heads in itertools.product(
        ("query", "key"), ("cosine", "dot"), ("joint", "per_head")
    )
}
ATTENTION = ("own_part_mass", "object_background_leakage", "cross_region_mass")


def refinements() -> dict[str, CrossImage]:
    """The compared methods, then Q-Align with other alignments, refinements and strengths.

    A variant of another refinement aligns both queries, as `QAlignWarp` does.
    """
    variants = compared_methods()
    for aligned in ("structure", "both"):
        variants[f"rearranged, {aligned} aligned"] = QAlign(aligned=aligned)
    for aligned in ("output", "structure"):
        variants[f"warped_output, {aligned} aligned"] = QAlignWarp(aligned=aligned)
    settings: dict[str, dict[str, Any]] = {name: {"refinement": name} for name in ("warped_values", "none")}
    settings |= {f"topk {k}": {"refinement": "topk", "topk": k} for k in (1, 4, 8, 16)}
    for strength in (5.0, 10.0, 20.0, 40.0):
        settings[f"guided {strength:g}"] = {"refinement": "guided", "strength": strength}
    settings["soft 20"] = {"refinement": "soft", "strength": 20.0}
    for name, setting in settings.items():
        variants[f"{name}, both aligned"] = QAlign(aligned="both", **setting)
    return variants


@dataclass(frozen=True, eq=False)
class Probe:
    """The measurements of one pair without transfers.

    Attributes:
        tallies: of every decoder layer and timestep, by variant, by signal ("query_query cosine joint"), and
            of "self_attention".
        matched: U/N, the fraction of the reference tokens that some query matches, by signal.
    """

    tallies: dict[str, Tallies]
    matched: dict[str, dict[tuple[str, int], float]]


@torch.inference_mode()
def probe(pipe: Any, pair: ScenePair, variants: Mapping[str, CrossImage], settings: Settings) -> Probe:
    """Let one scene's queries match and attend the other's keys, in every decoder layer and noise level."""
    scenes = render([pair.structure, pair.appearance], picture_size(pipe))
    levels = [int(level * pipe.scheduler.config.num_train_timesteps) for level in NOISE]
    count = len(levels)
    pictures = scenes.image.repeat_interleave(count, 0)
    seed, prompt = noise_seed(pair, settings), f"a photo of a {scenes.plans[0]}"
    kept = noised_features(
        pipe, pictures, torch.tensor(levels * 2), prompt, seeds=range(seed, seed + 2 * count)
    )
    result = Probe(
        {name: {} for name in ("self_attention", *SIGNALS, *variants)}, {name: {} for name in SIGNALS}
    )
    for layer, (q, k, site) in kept.items():
        grid = token_grid(scenes.labels.shape[1:], q.shape[2])
        labels = token_labels(scenes.labels, grid).long().to(q.device).repeat_interleave(count, 0)
        keys = [(layer, level) for level in levels]
        for name, tallies in _layer_tallies(q, k, labels, variants, site).items():
            result.tallies[name].update(zip(keys, tallies.cpu()))
        for name, (tallies, matched) in _layer_signals(q, k, labels).items():
            result.tallies[name].update(zip(keys, tallies.cpu()))
            result.matched[name].update(zip(keys, matched))
    return result


def _layer_tallies(
    q: Tensor, k: Tensor, labels: Tensor, variants: Mapping[str, CrossImage], site: Site
) -> dict[str, Tensor]:
    """Tallies of the first half of the rows: over themselves, then over the second half by every variant."""
    output, reference = _halves(q)
    result = {"self_attention": measure(CrossImage(), q, k, labels, output, output, site)}
    for name, method in variants.items():
        result[name] = measure(method, q, k, labels, output, reference, site)
    return result


def _layer_signals(q: Tensor, k: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, list[float]]]:
    """The matches of every signal as tallies without mass, and the fraction of the keys that are matched."""
    output, reference = _halves(q)
    count, tokens = len(output), k.shape[2]
    nowhere = q.new_zeros(1, 1, 1, len(PARTS)).expand(count, 1, tokens, -1)
    result = {}
    for name, (features_of, similarity, heads) in SIGNALS.items():
        compared = q if features_of == "query" else k
        index = similarity_argmax(
            take(q, output), compared, similarity=similarity, heads=heads, batch_index=reference
        ).index
        matched = (match_counts(index, tokens) > 0).double().mean((1, 2)).tolist()
        result[name] = tally(index, nowhere, labels[:count], labels[count:]), matched
    return result


def _halves(q: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers int32 of the first and of the second half of a batch."""
    first, second = torch.arange(len(q), dtype=torch.int32, device=q.device).chunk(2)
    return first, second


def run(
    pipe: Any,
    *,
    pairs: int,
    transfers: int,
    settings: Settings,
    progress: Progress = iter,
    kept: KeptResults | None = None,
) -> dict[str, Any]:
    """Measure matches, attention and pictures of every variant.

    Figures are means over noise levels and over the layers that Cross-Image edits. `best_layer` is the best
    of all decoder layers. Processes share the work as in `leakage.run`.

    Args:
        pipe: an `AppearanceTransferPipeline`.
        pairs: number of held-out pairs that are probed.
        transfers: number of these that are transferred by every variant.
        settings: how the transfers run.
        progress: as in `leakage.run`.
        kept: as in `leakage.run`.

    Returns:
        Plain numbers and lists, ready for JSON.
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
    table = stacked([each.tallies[name] for each in probes])
    layers = layers_of(probes[0].tallies[name])
    by_layer = figures(table)["part_agreement"].nanmean((0, 2))
    edited = _edited(layers)
    matched = torch.tensor(
        [[share for (layer, _), share in each.matched[name].items() if layer in edited] for each in probes]
    )
    of_edited = figures(table[:, [layers.index(layer) for layer in edited]])
    agreement = of_edited["part_agreement"].flatten(1).nanmean(1)
    return {
        "part_agreement": estimate(resample({"": agreement})[""]),
        "matched_fraction": matched.mean().item(),
        "best_layer": layers[int(by_layer.argmax())],
        "best_layer_agreement": by_layer.max().item(),
        "by_layer": dict(zip(layers, by_layer.tolist())),
        "by_layer_and_noise": by_layer_and_step(probes[0].tallies[name], table)["part_agreement"],
    }


def _masses(probes: Sequence[Probe], name: str) -> dict[str, Any]:
    table = stacked([each.tallies[name] for each in probes])
    layers = layers_of(probes[0].tallies[name])
    edited = figures(table[:, [layers.index(layer) for layer in _edited(layers)]])
    means = resample({figure: edited[figure].flatten(1).nanmean(1) for figure in ATTENTION})
    return {figure: estimate(mean) for figure, mean in means.items()} | {
        "by_layer_and_step": by_layer_and_step(probes[0].tallies[name], table)
    }


def _edited(layers: list[str]) -> list[str]:
    return CrossImage().default_layers(layers)


def _picture(transferred: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The summary of a method without its long tables."""
    summary = transferred["methods"][name]
    return {figure: value for figure, value in summary.items() if not figure.startswith("by_")}
