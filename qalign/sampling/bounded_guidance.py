"""Guidance of bounded attention: the loss that latents descend."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qalign_kernels import label_mass

from .._checks import require_count, require_number
from ..context.layers import decoder_layers
from ..context.regions import EVERYTHING, Regions
from ..methods.attention_distillation import Features, LayerFeatures
from ..methods.bounded import BoundedAttention
from .bounded_masks import subject_masks, subjects_of

_TINY = torch.finfo(torch.float32).tiny
_BOUNDED = BoundedAttention()


@dataclass(frozen=True, kw_only=True)
class BoundedGuidance:
    """Set when, how far and by which loss latents are guided.

    Args:
        rates: the rate of the descent at the first guided step, and the one that it moves to linearly and
            would have at the first step that is not guided. Published are (8, 2) for SD 1.5, the default, and
            (18, 5) for SDXL.
        until: the fraction of the steps that are guided. Default 15 of 50.
        iterations: the most iterations in a guided step.
        enough: the loss per subject below which an iteration is the last of its step.
        cross_weight: of the loss in cross-attention.
        self_weight: of the loss in self-attention.
        refine_every: the masks are refined before the first step that is not guided, and before later steps
            that are multiples of this. 0 keeps the boxes.

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

        rate = first + (last - first) step / guided steps

        Args:
            step: from 0.
            total: the number of steps.

        Returns:
            the rate, or None where the step is not guided.

        Example:
            >>> [BoundedGuidance(until=0.3).rate(step, 10) for step in range(4)]
            [8.0, 6.0, 4.0, None]
        """
        guided = round(self.until * total)
        if not 0 <= step < guided:
            return None
        first, last = self.rates
        return first + (last - first) * step / guided

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
        first = round(self.until * total)
        if self.refine_every <= 0 or step <= 0 or step < first:
            return False
        return step == first or step % self.refine_every == 0

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
        loss = Σ_{cross, self} weight Σ_s (1 - IoU_s)²

        P is bounded attention. In cross-attention it has the form of the guided steps. fg and bg are means
        over the layers. C_s is the context of subject s: its region, and in cross-attention its words and
        the end of the prompt.

        Args:
            features: of self-attention, of one row, by layer.
            regions: `structure` has the subjects' labels, and `background` is the label of no subject.
            cross: features of cross-attention, by layer. None or {} leaves that part out.
            method: has `subject_tokens` of each subject, for `cross`.

        Returns:
            a float32 scalar, differentiable in queries and keys: the sum over the S subjects.

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
            masses of the keys that a query sees are divided by their sum. A token in several boxes counts for
            each of them. A subject whose box rounds to no cell in every layer has IoU 0 and no gradient:
            `unseen` lists those.
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

    def unseen(self, features: Features, regions: Regions) -> list[int]:
        """List the subjects that the loss cannot move: their boxes have no cell on the grid of any layer.

        Args:
            features, regions: as in `loss`.

        Returns:
            labels of subjects.

        Example:
            >>> from qalign import Regions
            >>> from qalign.methods.attention_distillation import LayerFeatures
            >>> q, k, v = torch.ones(3, 1, 2, 4, 8)
            >>> boxes = Regions.from_boxes([(0.0, 0.0, 0.5, 0.5), (0.8, 0.8, 1.0, 1.0)], 16, 16)
            >>> BoundedGuidance().unseen({"two by two": LayerFeatures(q, k, v, v, None)}, boxes)
            [2]
        """
        subjects = subjects_of(regions)
        seen = [
            subject_masks(regions, subjects, layer.query.shape[2], layer.query.device).any(1)
            for layer in features.values()
        ]
        found = torch.stack(seen).any(0).tolist()
        return [label for label, is_seen in zip(subjects, found) if not is_seen]

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
    outside = queries == EVERYTHING
    inside = ((queries & own) != 0) & ~outside  # [N, S]
    return torch.stack([(reached * inside).sum((0, 1, 2)), (reached * outside).sum((0, 1, 2))])


def _distance(reach: Sequence[Tensor]) -> Tensor:
    """The sum of (1 - IoU)² over the subjects, from each layer's `_reach`."""
    foreground, background = torch.stack(list(reach)).mean(0)
    whole = foreground + len(foreground) * background
    return (1 - foreground / torch.where(whole > 0, whole, 1)).square().sum()
