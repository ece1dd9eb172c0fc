"""Bounded attention's guidance: the loss that latents descend until each subject's attention stays in its region, and the masks that follow it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qalign_kernels import label_mass, mean_attention_map

from ..context.layers import decoder_layers, token_grid
from ..context.regions import EVERYTHING, Regions, labels_of_tokens
from ..methods.attention_distillation import Features, LayerFeatures
from ..methods.bounded import ONLY_BACKGROUND, BoundedAttention
from .object_masks import segment

_TINY = torch.finfo(torch.float32).tiny
_BOUNDED = BoundedAttention()


@dataclass(frozen=True, kw_only=True)
class BoundedGuidance:
    """When and how far latents are guided, by which loss.

    Args:
        rates: of the descent at the first guided step and at the last, linear between; published are (8, 2) for SD 1.5 and (18, 5) for SDXL.
        until: the fraction of the steps that are guided, 15 of 50.
        iterations: at most so many in each of them.
        enough: the loss below which there are no more.
        cross_weight, self_weight: of the loss's two parts.
        refine_every: steps from one refinement of the masks to the next, the first being after the guided steps; 0: the boxes stay.

    Source: Bounded Attention, arXiv 2403.16990.
    """

    rates: tuple[float, float] = (8.0, 2.0)
    until: float = 15 / 50
    iterations: int = 5
    enough: float = 0.2
    cross_weight: float = 1.5
    self_weight: float = 0.5
    refine_every: int = 5

    def rate(self, step: int, total: int) -> float | None:
        """Of a step; None where it is not guided.

        >>> [BoundedGuidance(until=0.3).rate(step, 10) for step in range(4)]
        [8.0, 5.0, 2.0, None]
        """
        guided = round(self.until * total)
        if not 0 <= step < guided:
            return None
        first, last = self.rates
        return first + (last - first) * step / max(guided - 1, 1)

    def refines(self, step: int, total: int) -> bool:
        """Whether the masks are refined before a step, which needs the maps of earlier ones.

        >>> [step for step in range(50) if BoundedGuidance().refines(step, 50)]
        [15, 20, 25, 30, 35, 40, 45]
        """
        after = step - round(self.until * total)
        return self.refine_every > 0 and step > 0 and after >= 0 and after % self.refine_every == 0

    def loss(
        self,
        features: Features,
        regions: Regions,
        cross: Features | None = None,
        method: BoundedAttention = _BOUNDED,
    ) -> Tensor:
        """How far the subjects' attention is from their regions, 0 to 2: a float32 scalar, differentiable in queries and keys.

        fg_s = Σ_{heads, i in s, j in C_s} P_ij,  bg_s = Σ_{heads, i in background, j in C_s} P_ij,  means over layers;
        IoU_s = fg_s / (fg_s + S bg_s),  loss = Σ_{cross, self} weight / S Σ_s (1 - IoU_s)²

        P is bounded attention, of cross-attention the form that holds while latents are guided, and C_s the subject's context: its region, and in
        cross-attention its words and the end of the prompt. No map is held: P sums to masses m of keys that the same queries see, and of plain masses
        those that a query sees are divided by their sum.

        Args:
            features: of self-attention, of one row, by layer.
            regions: `structure`, the subjects' labels, and `background`, the label that is no subject's.
            cross: of cross-attention, likewise; None or {} leaves that part out.
            method: with `subject_tokens` of each subject, for `cross`.

        Raises:
            ValueError: regions without background, or without subjects; `cross` without their tokens.
        """
        subjects = subjects_of(regions)
        missing = [label for label in subjects if cross and label not in method.subject_tokens]
        if missing:
            raise ValueError(
                f"method: expected subject_tokens of the labels {subjects} for cross-attention, got none of {missing[0]}"
            )
        found = self.self_weight * _distance(
            [_reach(layer, regions, subjects) for layer in features.values()]
        )
        if not cross:
            return found
        tokens = [method.token_labels(layer.key.shape[2], layer.key.device) for layer in cross.values()]
        return found + self.cross_weight * _distance(
            [_reach(layer, regions, subjects, keys) for layer, keys in zip(cross.values(), tokens)]
        )

    def default_layers(self, names: Sequence[str]) -> list[str]:
        """Published: of SD 1.5 the mid block and the decoder's first with attention, of SDXL six early ones in up_blocks.0."""
        decoder = decoder_layers(names)
        first = [name for name in decoder if name.split(".")[1] == decoder[0].split(".")[1]]
        return (
            first[1:7]
            if len(first) > 6
            else [name for name in names if name.startswith("mid_block.")] + first
        )


def subjects_of(regions: Regions) -> list[int]:
    """The labels of the structure that are not the background's.

    Raises:
        ValueError: there is no background, or there are no subjects.
    """
    if regions.structure is None or regions.background is None:
        raise ValueError("regions: expected Regions(structure=..., background=...), got one of them None")
    subjects = [label for label in regions.structure.unique().tolist() if label != regions.background]
    if not subjects:
        raise ValueError(f"regions: expected a subject beside the background {regions.background}, got none")
    return subjects


def _reach(
    layer: LayerFeatures, regions: Regions, subjects: Sequence[int], keys: Tensor | None = None
) -> Tensor:
    """float32 [2, S]: how much of bounded attention goes from a subject's tokens to its context, and from the background's.

    `keys` are bit sets int32 [1, T]; None are those of the picture's own tokens.
    """
    queries = regions.picture_labels("structure", layer.query.shape[2], layer.query.device)[
        0, :, None
    ]  # [N, 1]
    kinds, ids = torch.unique(queries if keys is None else keys, return_inverse=True)
    mass = label_mass(
        layer.query, layer.key, ids.view(1, -1).int(), len(kinds), scale=layer.scale
    )  # [1, H, N, kinds]
    seen = mass * ((queries & kinds) != 0)
    seen = seen / seen.sum(-1, keepdim=True).clamp(min=_TINY)
    own = torch.tensor([1 << label for label in subjects], dtype=torch.int32, device=queries.device)  # [S]
    context = ((kinds[:, None] & own) != 0) & (kinds[:, None] != EVERYTHING)  # [kinds, S]
    reached = seen @ context.to(seen)  # [1, H, N, S]
    return torch.stack(
        [(reached * (queries == own)).sum((0, 1, 2)), (reached * (queries == EVERYTHING)).sum((0, 1, 2))]
    )


def _distance(reach: Sequence[Tensor]) -> Tensor:
    """The mean of (1 - IoU)² over the subjects, from each layer's `_reach`."""
    foreground, background = torch.stack(list(reach)).mean(0)
    return (1 - foreground / (foreground + len(foreground) * background).clamp(min=_TINY)).square().mean()


class MaskRefiner:
    """Masks of the subjects out of the run's own attention, in place of their boxes.

    Per token of the mask layers' grid: clusters of the tokens by k-means on the rows of the mean self-attention map, each column divided by its
    largest value; a subject's map is m = mean cross-attention to its noun, twice scaled to 0 to 1, once before sigmoid(10 (m - 0.2)) and once after,
    times its present mask; a cluster c goes to the subject of the largest Σ_c m / min(Σ m, |c|), or to none if that is below `least`. A subject
    without a cluster has its box again, which is then nobody else's.

    Args:
        boxes: regions that masks begin as and fall back to.
        nouns: by label, the place of the subject's leading noun in the prompt.
        clusters: k-means has this times the number of subjects.
        least: the share of a cluster that makes it a subject's.
        seed: of the first k-means, the best of 100 starts; later ones start where the last ended.

    Memory: fp32 [N, N] and [N, T] of the mask layers' N tokens, twice while averaging.
    Source: Bounded Attention, arXiv 2403.16990.
    """

    def __init__(
        self,
        boxes: Regions,
        nouns: Mapping[int, int],
        *,
        clusters: int = 3,
        least: float = 0.2,
        seed: int = 0,
    ) -> None:
        self.boxes, self.nouns, self.subjects = boxes, nouns, subjects_of(boxes)
        self.clusters, self.least, self.seed = clusters, least, seed
        self.count = 0  # of the maps in the means
        self.self_map = self.cross_map = torch.zeros(())
        self.centres: Tensor | None = None

    @torch.no_grad()
    def add(self, features: Features, regions: Regions, cross: Features, method: BoundedAttention) -> None:
        """Take the maps of the last row, the conditional one, of each layer and of its cross-attention into the means.

        Raises:
            ValueError: layers of different grids.
        """
        sizes = {layer.query.shape[2] for layer in (*features.values(), *cross.values())} | (
            {len(self.self_map)} if self.count else set()
        )
        if len(sizes) != 1:
            raise ValueError(
                f"mask_layers: expected layers of one number of tokens, got {', '.join(map(str, sorted(sizes)))}"
            )
        for own, words in zip(features.values(), cross.values()):
            queries = regions.picture_labels("structure", own.query.shape[2], own.query.device)[0]
            tokens = method.token_labels(words.key.shape[2], own.query.device)[0]
            self.count += 1
            self.self_map = torch.lerp(
                self.self_map.to(own.query.device), bounded_map(own, queries, queries), 1 / self.count
            )
            shown = torch.where(queries == EVERYTHING, ONLY_BACKGROUND, queries).int()
            self.cross_map = torch.lerp(
                self.cross_map.to(own.query.device), bounded_map(words, shown, tokens), 1 / self.count
            )

    def refine(self, regions: Regions) -> Regions:
        """The masks that follow `regions`, of the same size."""
        grid = token_grid(self.boxes.structure.shape, len(self.self_map))
        rows = self.self_map / self.self_map.amax(0).clamp(min=_TINY)
        clusters = min(self.clusters * len(self.subjects), len(rows))
        labels = segment(rows, clusters=clusters, seed=self.seed, starts=100, centres=self.centres)
        members = F.one_hot(labels, clusters).to(rows)  # [N, clusters]
        self.centres = members.T @ rows / members.sum(0)[:, None].clamp(min=1)
        present = labels_of_tokens(regions.structure, len(rows))[0].to(rows.device)
        maps = torch.stack(
            [word_map(self.cross_map[:, self.nouns[label]]) * (present == label) for label in self.subjects]
        )  # [S, N]
        area = torch.minimum(maps.sum(1, keepdim=True), members.sum(0))
        score, owner = (maps @ members / area.clamp(min=_TINY)).max(0)
        owners = torch.tensor(self.subjects, device=rows.device)[owner]
        found = owners.masked_fill(score < self.least, int(self.boxes.background or 0))[labels]
        masks = (
            F.interpolate(found.view(1, 1, *grid).float(), self.boxes.structure.shape, mode="nearest-exact")[
                0, 0
            ]
            .long()
            .cpu()
        )
        for label in self.subjects:
            if not (masks == label).any():
                masks = torch.where(self.boxes.structure == label, label, masks)
        return Regions(structure=masks, background=self.boxes.background)


def bounded_map(layer: LayerFeatures, queries: Tensor, keys: Tensor) -> Tensor:
    """The head-averaged map of the last row's attention in which a query sees the keys whose bit set meets its own: fp32 [N, T].

    Each kind of query is mapped on the keys that it sees alone, so that no map of a head is held.
    """
    found = torch.zeros(len(queries), len(keys), device=queries.device)
    for kind in queries.unique():
        rows, columns = (queries == kind).nonzero(), ((keys & kind) != 0).nonzero()[:, 0]
        if len(columns):
            query, key = layer.query[-1:, :, rows[:, 0]], layer.key[-1:, :, columns]
            found[rows, columns] = mean_attention_map(query, key, scale=layer.scale)[0]
    return found


def word_map(attention: Tensor) -> Tensor:
    """σ(10 (m - 0.2)) of attention [N] scaled to m of 0 to 1, and scaled so again."""
    return _unit(torch.sigmoid(10 * (_unit(attention) - 0.2)))


def _unit(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min()).clamp(min=_TINY)
