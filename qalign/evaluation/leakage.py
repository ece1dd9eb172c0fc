"""Attention leakage, measured: where a method's matches and attention go between two scenes whose parts are known.

A token has the label that most pixels of its cell have. For the queries of the output row, labelled as the structure scene, and the keys of
the appearance scene, every measured layer and step gives, heads averaged:

- right: whether the query's match has the query's label. The match is the argmax of the method's own signal: query-query similarity for
  Q-Align, query-key dot product over all heads for Cross-Image;
- own: the attention mass on keys of the query's label;
- background: the attention mass on keys that show background.

Mass is that of the probabilities before the contrast, which do sum to one. It is read off by handing the method one-hot labels as values:
every refinement is linear in them. Steps that read the structure's keys have nothing to leak and are not measured.

Figures of a pair, over its object queries: `part_agreement` is the mean of right per part, averaged over the parts, so that small parts count
as much as the body; `token_agreement`, `own_part_mass`, and `cross_region_mass` = 1 - own_part_mass, are means over queries; these four take the
queries whose part is also in view in the appearance, at this grid. `object_background_leakage` is the mean of background over all object queries.
A pair leaks when its cross-region mass, averaged over layers and steps, passes a threshold.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qalign_kernels import similarity_argmax

from ..context.layer_call import Site, take
from ..context.layers import picture_size, short_name, token_grid
from ..context.layout import BatchLayout
from ..embedded.scenes import BACKGROUNDS, PARTS, ScenePair, held_out_pairs, render, token_labels
from ..methods import CrossImage, QAlign
from ..methods._editing import Editing
from .picture_metrics import OBJECT, colour_error, read_layouts
from .processes import Progress, gathered
from .resuming import KeptResults, keeping

LEAK_THRESHOLD = 0.79  # of the cross-region mass: on 30 pairs of seed 1 Cross-Image leaks in the paper's share of pairs, 94 of 180
RESAMPLES = 10_000
TALLIED = ("tokens", "counterparts", "right", "own", "background")
TITLES = {
    "part_agreement": "part agreement of the match",
    "token_agreement": "  all object tokens alike",
    "own_part_mass": "object attention in its own part",
    "object_background_leakage": "object attention on background",
    "cross_region_mass": "object attention across regions",
    "layout_iou": "part IoU with the structure's layout",
    "colour_error": "part colour error of the picture",
}
FIGURES = tuple(TITLES)
NOTED = (("untouched", "colour_error"), ("untouched", "layout_iou"), ("appearance", "layout_iou"))

Tallies = dict[tuple[str, int], Tensor]  # by layer and step: float64 [PARTS, TALLIED]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the transfers are run; what is not here is the pipeline's default.

    Attributes:
        steps: inference steps of the schedule.
        layers: edited and measured; None is the method's own choice.
        adain: of the latents: "masked", "whole" or None.
        every: measure the steps that are multiples of this.
        seed: of the choice of pairs and of all noise.
        threshold: of the verdict.
    """

    steps: int = 20
    layers: str | Sequence[str] | None = None
    adain: str | None = None
    every: int = 3
    seed: int = 0
    threshold: float = LEAK_THRESHOLD


@dataclass(frozen=True, eq=False)
class PairResult:
    """What one pair gave, by method.

    Attributes:
        tallies: of every measured layer and step.
        colour: float64 [PARTS], the distance of part colours from the appearance's; "untouched" is the structure picture's.
        layout: mean part IoU with the structure's layout; "untouched" is the structure picture's and "appearance" the appearance picture's.
    """

    tallies: dict[str, Tallies]
    colour: dict[str, Tensor]
    layout: dict[str, float]


class Measured:
    """A method that tallies where its matches and its attention go; what it computes is unchanged.

    Args:
        method: such as `QAlign()`.
        labels: int64 [S, S] of the scene that a row of each role shows.
        every: measure the steps that are multiples of this, save those that read the structure.
    """

    def __init__(self, method: Editing, labels: Mapping[str, Tensor], *, every: int = 1) -> None:
        self.method, self.labels, self.every = method, labels, every
        self.tallies: Tallies = {}
        self._tokens: dict[int, dict[str, Tensor]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        from_structure = site.clock is not None and bool(site.clock.from_structure)
        if not site.idle and not from_structure and site.step % self.every == 0:
            labels = self._row_labels(q, site.layout)
            counts = measure(self.method, q, k, labels, site.output_rows(q), site.reference_rows(q), site)
            self.tallies[site.layer, site.step] = counts.sum(0).cpu()
        return self.method.attend(q, k, v, site)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)  # layers, steps and whatever else the method is asked

    def _row_labels(self, q: Tensor, layout: BatchLayout) -> Tensor:
        """int64 [B, N]."""
        tokens = q.shape[2]
        if tokens not in self._tokens:
            self._tokens[tokens] = {
                role: token_labels(labels[None], token_grid(labels.shape, tokens))[0].long().to(q.device)
                for role, labels in self.labels.items()
            }
        return torch.stack([self._tokens[tokens][role] for role in layout.roles]).repeat(
            q.shape[0] // len(layout.roles), 1
        )


def measure(
    method: Editing, q: Tensor, k: Tensor, labels: Tensor, output: Tensor, reference: Tensor, site: Site
) -> Tensor:
    """Where the matches and the attention of the rows `output` go in the rows `reference`: float64 [rows, PARTS, TALLIED].

    Args:
        q, k: [B, H, N, D].
        labels: int64 [B, N], the label of every token of every row.
        output, reference: int32 [rows].
    """
    index = match(method, q, k, output, reference, site)
    mass = attention_mass(method, q, k, labels, output, reference, site)
    return tally(index, mass, labels[output.long()], labels[reference.long()])


def match(method: Editing, q: Tensor, k: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
    """The reference token that each query goes to by the method's own signal: int32 [rows, 1 or H, N]."""
    if isinstance(method, QAlign):
        return method.match(q, output, reference, site).index
    return similarity_argmax(take(q, output), k, similarity="dot", heads="joint", batch_index=reference).index


def attention_mass(
    method: Editing, q: Tensor, k: Tensor, labels: Tensor, output: Tensor, reference: Tensor, site: Site
) -> Tensor:
    """The attention of the rows `output`, before contrast, on each label of the rows `reference`: float32 [rows, H, N, PARTS]."""
    indicator = F.one_hot(labels, len(PARTS)).float().unsqueeze(1).expand(-1, q.shape[1], -1, -1)
    if isinstance(method, CrossImage):
        method = dataclasses.replace(method, contrast=1.0)
    return method.edit(q.float(), k.float(), indicator, output, reference, site)


def tally(index: Tensor, mass: Tensor, query_labels: Tensor, key_labels: Tensor) -> Tensor:
    """Sums over the queries of each part: float64 [B, PARTS, TALLIED].

    Args:
        index: int32 [B, 1 or H, N_q], the match of each query.
        mass: [B, H, N_q, PARTS], the attention of each query on each label.
        query_labels, key_labels: int64 [B, N_q] and [B, N_k].
    """
    found = key_labels.unsqueeze(1).expand(-1, index.shape[1], -1).gather(2, index.long())
    right = (found == query_labels.unsqueeze(1)).double().mean(1)
    mass = mass.double().mean(1)
    own = mass.gather(2, query_labels.unsqueeze(2)).squeeze(2)
    present = F.one_hot(key_labels, len(PARTS)).amax(1).double().gather(1, query_labels)
    columns = torch.stack(
        [torch.ones_like(own), present, right, own, mass[..., : len(BACKGROUNDS)].sum(-1)], -1
    )
    return F.one_hot(query_labels, len(PARTS)).double().mT @ columns


def figures(tallies: Tensor) -> dict[str, Tensor]:
    """The attention figures of tallies [..., PARTS, TALLIED], as the head of this module defines them: [...], NaN where nothing was counted."""
    tokens, counterparts, right, own, background = tallies[..., OBJECT, :].unbind(-1)
    kept = own.sum(-1) / counterparts.sum(-1)
    return {
        "part_agreement": (right / counterparts).nanmean(-1),
        "token_agreement": right.sum(-1) / counterparts.sum(-1),
        "own_part_mass": kept,
        "object_background_leakage": background.sum(-1) / tokens.sum(-1),
        "cross_region_mass": 1 - kept,
    }


@torch.inference_mode()
def measure_pair(
    pipe: Any, pair: ScenePair, methods: Mapping[str, CrossImage], settings: Settings
) -> PairResult:
    """Transfer the appearance of one scene to the other by every method, and measure. Depends on the pair and the settings alone."""
    scenes = render([pair.appearance, pair.structure], picture_size(pipe))
    (appearance, structure), (appearance_labels, structure_labels) = scenes.image, scenes.labels
    prompt = f"a photo of a {scenes.plans[1]}"
    labels = {
        "output": structure_labels,
        "plain": structure_labels,
        "structure": structure_labels,
        "appearance": appearance_labels,
    }
    seed = noise_seed(pair, settings)
    tallies: dict[str, Tallies] = {}
    pictures = {"untouched": structure}
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
    for name, method in methods.items():
        measured = Measured(method, labels, every=settings.every)
        pictures[name] = (
            pipe(None, None, prompt, method=measured, output_type="pt", **options).images[0].float().cpu()
        )
        tallies[name] = measured.tallies
    layout = read_layouts(pipe, pictures | {"appearance": appearance}, scenes, prompt, seed=seed)
    colour = {
        name: colour_error(picture, structure_labels, appearance, appearance_labels)
        for name, picture in pictures.items()
    }
    return PairResult(tallies, colour, layout)


def check_steps(methods: Mapping[str, CrossImage], settings: Settings) -> None:
    """Every method has a step that is measured, known before any pair is.

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
    """Measure `methods` on held-out pairs and summarise. The processes of `accelerate launch` or `torchrun` share the pairs and all get the report.

    Args:
        pipe: an `AppearanceTransferPipeline`.
        pairs: how many; `settings.seed` chooses them.
        methods: by name, the first being what the others are compared with; None: Cross-Image and Q-Align, by their defaults.
        progress: wraps the iterable of this process's pairs, as tqdm does.
        kept: where what a pair gave is kept, and taken from where it is there already; None is nowhere.
    """
    chosen = {"cross_image": CrossImage(), "qalign": QAlign()} if methods is None else methods
    check_steps(chosen, settings)
    work = keeping(kept, "pair", lambda pair: measure_pair(pipe, pair, chosen, settings), PairResult)
    results = gathered(work, held_out_pairs(pairs, settings.seed), progress)
    return summarise(results, settings, {name: repr(method) for name, method in chosen.items()})


def resample(
    columns: Mapping[str, Tensor], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Tensor]:
    """Means of columns [pairs] over all pairs (first) and over resamples of the pairs: [1 + resamples] each; NaN is left out.

    The resamples are shared by all columns, so what is computed of several means is paired. A column with figures of fewer than two pairs
    has NaN for them, because one pair has no spread.
    """
    table = torch.stack(list(columns.values()), 1).double()
    pairs = len(table)
    drawn = torch.randint(pairs, (resamples, pairs), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(resamples, pairs, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
    )
    weights = torch.cat([torch.ones(1, pairs, dtype=torch.float64), weights])
    means = (weights @ table.nan_to_num()) / (weights @ (~table.isnan()).double())
    means[1:, (~table.isnan()).sum(0) < 2] = torch.nan
    return dict(zip(columns, means.unbind(1)))


def estimate(means: Tensor) -> dict[str, Any]:
    """The value and the central 95 % interval of something computed from `resample`'s means [1 + resamples]; None where there is none."""
    interval = torch.nanquantile(means[1:], torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return {
        "value": _finite(means[0].item()),
        "interval": interval if all(map(math.isfinite, interval)) else None,
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def summarise(
    results: Sequence[PairResult], settings: Settings, described: Mapping[str, str]
) -> dict[str, Any]:
    """The report of `run`: plain numbers and lists, ready for JSON. `described` names the methods, the one to compare with first."""
    baseline, *others = described
    tallies = {
        name: stacked(result.tallies[name] for result in results) for name in described
    }  # [pairs, layers, steps, PARTS, TALLIED]
    columns = _columns(results, tallies)
    for name in described:
        leaks = columns[f"{name}/cross_region_mass"] > settings.threshold
        columns[f"{name}/leaking_pairs"] = len(results) * leaks.double()  # the mean is the count
    for name in others:
        better = columns[f"{name}/cross_region_mass"] < columns[f"{baseline}/cross_region_mass"]
        columns[f"{name}/improved"] = better.double().where(
            columns[f"{baseline}/leaking_pairs"] > 0, torch.nan
        )
    means = resample(columns)
    untouched = means["untouched/colour_error"]

    methods: dict[str, Any] = {}
    for name in described:
        found = {figure: estimate(means[f"{name}/{figure}"]) for figure in (*FIGURES, "leaking_pairs")}
        found["colour_ratio"] = estimate(means[f"{name}/colour_error"] / untouched)
        if name in others:
            found["leaking_pairs_improved_fraction"] = estimate(means[f"{name}/improved"])
        methods[name] = {figure: value["value"] for figure, value in found.items()}
        methods[name]["leaking_pairs"] = round(methods[name]["leaking_pairs"])
        if name in others:
            methods[name]["leaking_pairs_improved"] = int(columns[f"{name}/improved"].nansum())
        methods[name] |= {
            "intervals": {figure: value["interval"] for figure, value in found.items()},
            "by_part": _by_part(tallies[name]),
            "by_layer_and_step": by_layer_and_step(results[0].tallies[name], tallies[name]),
            "method": described[name],
        }
    return {
        "pairs": len(results),
        "methods": methods,
        "differences": {
            name: {
                figure: estimate(means[f"{name}/{figure}"] - means[f"{baseline}/{figure}"])
                for figure in (*FIGURES, "leaking_pairs")
            }
            for name in others
        },
        "untouched": {
            figure: estimate(means[f"untouched/{figure}"]) for figure in ("colour_error", "layout_iou")
        },
        "appearance": {"layout_iou": estimate(means["appearance/layout_iou"])},
        "settings": dataclasses.asdict(settings),
    }


def _columns(results: Sequence[PairResult], tallies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One figure of each pair, averaged over layers, steps and parts, by "method/figure": float64 [pairs]."""
    columns = {
        f"{name}/{figure}": value.flatten(1).nanmean(1)
        for name in tallies
        for figure, value in figures(tallies[name]).items()
    }
    columns |= {
        f"{name}/colour_error": torch.stack([result.colour[name].nanmean() for result in results])
        for name in results[0].colour
    }
    return columns | {
        f"{name}/layout_iou": torch.tensor([result.layout[name] for result in results])
        for name in results[0].layout
    }


def stacked(tallies: Iterable[Tallies]) -> Tensor:
    """[pairs, layers, steps, PARTS, TALLIED] from the tallies of each pair."""
    return torch.stack(
        [
            torch.stack(list(tally.values())).unflatten(0, (-1, len(layers_of(tally)))).transpose(0, 1)
            for tally in tallies
        ]
    )


def layers_of(tallies: Tallies) -> list[str]:
    return list(dict.fromkeys(layer for layer, _ in tallies))


def by_layer_and_step(keys: Tallies, tallies: Tensor) -> dict[str, Any]:
    """Each attention figure as [layers][steps], averaged over pairs."""
    table = {
        figure: [[_finite(x) for x in row] for row in value.nanmean(0).tolist()]
        for figure, value in figures(tallies).items()
    }
    return {"layers": layers_of(keys), "steps": list(dict.fromkeys(step for _, step in keys))} | table


def _by_part(tallies: Tensor) -> dict[str, dict[str, float | None]]:
    """Over all queries of each part, backgrounds too, in every pair, layer and step."""
    tokens, counterparts, right, own, background = tallies.flatten(0, 2).sum(0).unbind(-1)
    table = {
        "part_agreement": right / counterparts,
        "own_part_mass": own / counterparts,
        "background_mass": background / tokens,
    }
    return {
        part: {figure: _finite(value[number].item()) for figure, value in table.items()}
        for number, part in enumerate(PARTS)
    }


def render_report(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    methods, differences, settings = report["methods"], report["differences"], report["settings"]
    baseline = next(iter(methods))
    mean = "mean [95 % interval, pairs resampled]" if report["pairs"] > 1 else "one pair has no interval"
    lines = [
        f"{report['pairs']} held-out pairs, {settings['steps']} steps, seed {settings['seed']}; {mean}",
        "",
    ]
    lines.append(row("", [*methods, *(f"{name} - {baseline}" for name in differences)]))
    for figure, title in TITLES.items():
        cells = [cell(method[figure], method["intervals"][figure]) for method in methods.values()]
        lines.append(
            row(
                title,
                cells
                + [
                    cell(other[figure]["value"], other[figure]["interval"], sign="+")
                    for other in differences.values()
                ],
            )
        )
    lines.append(
        row(
            "  relative to the untouched structure",
            [cell(m["colour_ratio"], m["intervals"]["colour_ratio"]) for m in methods.values()],
        )
    )
    lines.append(
        row(
            f"leaking pairs (across > {settings['threshold']:g})",
            [_pairs(m["leaking_pairs"], report["pairs"]) for m in methods.values()],
        )
    )
    improved = [
        _pairs(m["leaking_pairs_improved"], methods[baseline]["leaking_pairs"])
        for name, m in methods.items()
        if name != baseline
    ]
    lines.append(row(f"  of those of {baseline}, improved", ["", *improved]))
    best = [_best(method["by_layer_and_step"]) for method in methods.values()]
    lines.append(row("agreement in the best layer", [f"{agreement:.3f}" for _, agreement in best]))
    lines.append(row("  which is", [short_name(layer) for layer, _ in best]))
    error, layout, chance = (report[name][figure]["value"] for name, figure in NOTED)
    lines += [
        "",
        f"untouched structure: colour error {error:.3f}, part IoU {layout:.3f}; the appearance's own layout: part IoU {chance:.3f}",
    ]
    return "\n".join(lines)


def row(title: str, cells: Sequence[str]) -> str:
    return f"{title:<40}" + "".join(f" {cell:>26}" for cell in cells)


def cell(value: float | None, interval: Sequence[float] | None, sign: str = "") -> str:
    if value is None:
        return "-"
    if interval is None:
        return f"{value:{sign}.3f}"
    low, high = interval
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _pairs(count: int, of: int) -> str:
    return f"{count} of {of} ({count / max(of, 1):.1%})"


def _best(table: Mapping[str, Any]) -> tuple[str, float]:
    """The layer whose matches agree most, over its steps, and how far they do."""
    means = {
        layer: sum(x or 0 for x in row) / len(row)
        for layer, row in zip(table["layers"], table["part_agreement"])
    }
    return max(means.items(), key=lambda item: item[1])
