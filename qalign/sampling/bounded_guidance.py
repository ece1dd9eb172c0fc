"""Guidance of bounded attention: the loss that latents descend, and the masks that follow the subjects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qalign_kernels import label_mass, mean_attention_map

from .._checks import require_count, require_number
from ..context.layers import decoder_layers, token_grid
from ..context.regions import EVERYTHING, Regions, labels_of_tokens
from ..methods.attention_distillation import Features, LayerFeatures
from ..methods.bounded import ONLY_BACKGROUND, BoundedAttention
from .object_masks import segment

_TINY = torch.finfo(torch.float32).tiny
_BOUNDED = BoundedAttention()


@dataclass(frozen=True, kw_only=True)
class BoundedGuidance:
    """Set when, how far and by which loss latents are guided.

    Args:
        rates: the rate of the descent at the first guided step and at the last, linear between. Published
            are (8, 2) for SD 1.5, the default, and (18, 5) for SDXL.
        until: the fraction of the steps that are guided. Default 15 of 50.
        iterations: the most iterations in a guided step.
        enough: the loss below which a step's iterations end.
        cross_weight: of the loss in cross-attention.
        self_weight: of the loss in self-attention.
        refine_every: steps between refinements of the masks, from the end of the guided steps on. 0 keeps
            the boxes.

    Example:
        >>> from qalign import BoundedGuidance
        >>> BoundedGuidance(rates=(18.0, 5.0)).rate(0, 50)
        18.0

    Raises:
        TypeError, ValueError: a setting is no such number; the message names it.

    Source: Bounded Attention, arXiv 2403.16990.
    """

    rates: tuple[float, float] = (8.0, 2.0)
    until: float = 15 / 50
    iterations: int = 5
    enough: float = 0.2
    cross_weight: float = 1.5
    self_weight: float = 0.5
    refine_every: int = 5

    def __post_init__(self) -> None:
        if not isinstance(self.rates, (list, tuple)) or len(self.rates) != 2:
            raise ValueError(f"rates: expected two numbers, first and last, got {self.rates!r}")
        for rate in self.rates:
            require_number("rates", rate)
        require_number("until", self.until, least=0, most=1)
        for name in ("enough", "cross_weight", "self_weight"):
            require_number(name, getattr(self, name))
        for name in ("iterations", "refine_every"):
            require_count(name, getattr(self, name))

    def rate(self, step: int, total: int) -> float | None:
        """Give the rate of the descent at a step.

        Args:
            step: from 0.
            total: the number of steps.

        Returns:
            the rate, or None where the step is not guided.

        Example:
            >>> [BoundedGuidance(until=0.3).rate(step, 10) for step in range(4)]
            [8.0, 5.0, 2.0, None]
        """
        guided = round(self.until * total)
        if not 0 <= step < guided:
            return None
        first, last = self.rates
        return first + (last - first) * step / max(guided - 1, 1)

    def refines(self, step: int, total: int) -> bool:
        """Say whether the masks are refined before a step. It is never the first, for it needs earlier maps.

        Args:
            step: from 0.
            total: the number of steps.

        Returns:
            a bool.

        Example:
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
        """Measure how far the subjects' attention leaves their regions.

        fg_s = Σ_{heads, i in s, j in C_s} P_ij
        bg_s = Σ_{heads, i in background, j in C_s} P_ij
        IoU_s = fg_s / (fg_s + S bg_s)
        loss = Σ_{cross, self} weight / S Σ_s (1 - IoU_s)²

        P is bounded attention. In cross-attention it has the form of the guided steps. fg and bg are means
        over the layers. C_s is the context of subject s: its region, and in cross-attention its words and
        the end of the prompt.

        Args:
            features: of self-attention, of one row, by layer.
            regions: `structure` has the subjects' labels, and `background` is the label of no subject.
            cross: features of cross-attention, by layer. None or {} leaves that part out.
            method: has `subject_tokens` of each subject, for `cross`.

        Returns:
            a float32 scalar, differentiable in queries and keys.

        Raises:
            ValueError: `regions` has no background or no subjects, or `method` lacks tokens of a subject.

        Example:
            >>> from qalign import Regions
            >>> from qalign.methods.attention_distillation import LayerFeatures
            >>> q, k, v = torch.ones(3, 1, 2, 16, 8)
            >>> boxes = Regions.from_boxes([(0.0, 0.0, 0.5, 0.5)], 4, 4)
            >>> layer = LayerFeatures(q, k, v, v, None)
            >>> loss = BoundedGuidance().loss({"one": layer}, boxes)
            >>> round(loss.item(), 4)
            0.2812

        Notes:
            No attention map is held. P sums to the attention mass of the keys by their labels, and the
            masses of the keys that a query sees are divided by their sum.
        """
        subjects = subjects_of(regions)
        missing = [label for label in subjects if cross and label not in method.subject_tokens]
        if missing:
            expected = f"subject_tokens of the labels {subjects} for cross-attention"
            raise ValueError(f"method: expected {expected}, got none of {missing[0]}")
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
        """Choose the layers of the loss where the user names none, as published.

        Args:
            names: of all self-attention layers.

        Returns:
            for SD 1.5 the layers of the mid block and of the decoder's first block with attention, for SDXL
            six early layers of up_blocks.0.

        Example:
            >>> names = ["down_blocks.0.a", "mid_block.a", "up_blocks.1.a", "up_blocks.1.b", "up_blocks.2.a"]
            >>> BoundedGuidance().default_layers(names)
            ['mid_block.a', 'up_blocks.1.a', 'up_blocks.1.b']
        """
        decoder = decoder_layers(names)
        first = [name for name in decoder if name.split(".")[1] == decoder[0].split(".")[1]]
        return (
            first[1:7]
            if len(first) > 6
            else [name for name in names if name.startswith("mid_block.")] + first
        )


def subjects_of(regions: Regions) -> list[int]:
    """List the labels of the structure that are not the background's.

    Args:
        regions: with `structure` and `background`.

    Returns:
        the labels in ascending order.

    Raises:
        ValueError: there is no background, or there are no subjects.

    Example:
        >>> subjects_of(Regions.from_boxes([(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)], 4, 4))
        [1, 2]
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
    """float32 [2, S]: the attention to each subject's context, from its own tokens and from the background.

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
    """Refine the subjects' boxes to masks by the attention of the run.

    It works on the grid of the mask layers. k-means clusters the rows of the mean self-attention map, each
    column divided by its largest value. A subject's map m is the mean cross-attention to its noun, inside
    its present mask. It is scaled to 0 to 1, passed through sigmoid(10 (m - 0.2)), and scaled again. A
    cluster c goes to the subject with the largest Σ_c m / min(Σ m, |c|), or to none if that is below
    `least`. A subject without a cluster gets its whole box again, and other subjects lose it.

    Args:
        boxes: the regions that the masks begin with.
        nouns: by label, the place of the subject's main noun in the prompt.
        clusters: the number of clusters for each subject.
        least: the least share of a cluster that makes it a subject's.
        seed: of the first k-means, which has 100 starts. Later ones start where the last one ended.

    Raises:
        ValueError: `boxes` has no background or no subjects.

    Example:
        >>> from qalign import Regions
        >>> from qalign.methods.attention_distillation import LayerFeatures
        >>> from qalign.methods import BoundedAttention
        >>> q, k, v = torch.randn(3, 1, 2, 16, 8)
        >>> boxes = Regions.from_boxes([(0.0, 0.0, 0.5, 0.5)], 4, 4)
        >>> method = BoundedAttention(subject_tokens={1: (2,)}, eos_token=4)
        >>> refiner = MaskRefiner(boxes, {1: 2})
        >>> own, words = LayerFeatures(q, k, v, v, None), LayerFeatures(q, k[:, :, :6], v[:, :, :6], v, None)
        >>> refiner.add({"own": own}, boxes, {"words": words}, method)
        >>> refiner.refine(boxes).structure.shape
        torch.Size([4, 4])

    Notes:
        Memory is fp32 [N, N] and [N, T] for the N tokens of the mask layers, twice while averaging. The
        masks are deterministic. k-means needs scikit-learn.

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
        """Add the maps of the last row, which is the prompt's guidance half, to the means.

        Args:
            features: of self-attention, by layer.
            regions: the present masks.
            cross: features of the cross-attention of the same blocks, by layer.
            method: has `subject_tokens` and `eos_token`.

        Raises:
            ValueError: the layers have different grids.
        """
        sizes = {layer.query.shape[2] for layer in (*features.values(), *cross.values())} | (
            {len(self.self_map)} if self.count else set()
        )
        if len(sizes) != 1:
            got = ", ".join(map(str, sorted(sizes)))
            raise ValueError(f"mask_layers: expected layers of one number of tokens, got {got}")
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
        """Compute the next masks.

        Args:
            regions: the present masks.

        Returns:
            masks of the size of the boxes, with their background. The class shows an example.
        """
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
    """Average the bounded attention of the last row over its heads.

    Each kind of query is mapped on the keys that it sees, so no map of one head is held.

    Args:
        layer: features of a layer.
        queries: bit sets int32 [N].
        keys: bit sets int32 [T]. A query sees the keys whose set meets its own.

    Returns:
        fp32 [N, T].

    Example:
        >>> from qalign.methods.attention_distillation import LayerFeatures
        >>> q, k, v = torch.ones(3, 1, 2, 4, 8)
        >>> labels = torch.tensor([1, 1, 2, 2])
        >>> bounded_map(LayerFeatures(q, k, v, v, None), labels, labels)
        tensor([[0.5000, 0.5000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.5000, 0.5000],
                [0.0000, 0.0000, 0.5000, 0.5000]])
    """
    found = torch.zeros(len(queries), len(keys), device=queries.device)
    for kind in queries.unique():
        rows, columns = (queries == kind).nonzero(), ((keys & kind) != 0).nonzero()[:, 0]
        if len(columns):
            query, key = layer.query[-1:, :, rows[:, 0]], layer.key[-1:, :, columns]
            found[rows, columns] = mean_attention_map(query, key, scale=layer.scale)[0]
    return found


def word_map(attention: Tensor) -> Tensor:
    """Scale attention [N] to m in 0 to 1, take σ(10 (m - 0.2)), and scale again.

    Example:
        >>> word_map(torch.tensor([0.0, 1.0, 2.0]))
        tensor([0.0000, 0.9465, 1.0000])
    """
    return _unit(torch.sigmoid(10 * (_unit(attention) - 0.2)))


def _unit(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min()).clamp(min=_TINY)
