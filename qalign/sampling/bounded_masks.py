"""Masks of bounded attention that follow the subjects, by the attention of the run."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qalign_kernels import mean_attention_map

from ..context.layers import token_grid
from ..context.regions import CENTRE, EVERYTHING, Regions
from ..methods.attention_distillation import Features, LayerFeatures
from ..methods.bounded import ONLY_BACKGROUND, BoundedAttention
from .object_masks import segment

_TINY = torch.finfo(torch.float32).tiny
EPSILON = 1e-5  # is added to the published divisors of maps


def subjects_of(regions: Regions) -> list[int]:
    """List the labels of the boxes, or those of the structure that are not the background's.

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
    if regions.boxes:
        return list(range(1, len(regions.boxes) + 1))
    subjects = [label for label in regions.structure.unique().tolist() if label != regions.background]
    if not subjects:
        raise ValueError(f"regions: expected a subject beside the background {regions.background}, got none")
    return subjects


def subject_masks(regions: Regions, subjects: Sequence[int], tokens: int, device: torch.device) -> Tensor:
    """Return the tokens of each subject.

    Args:
        regions: with `structure` and `background`.
        subjects: their labels.
        tokens: N, of a layer.
        device: of the result.

    Returns:
        bool [S, N].

    Example:
        >>> boxes = Regions.from_boxes([(0.0, 0.0, 0.5, 1.0), (0.0, 0.5, 1.0, 1.0)], 4, 4)
        >>> subject_masks(boxes, [1, 2], 4, torch.device("cpu")).tolist()
        [[True, False, True, False], [False, False, True, True]]
    """
    bits = regions.picture_labels("structure", tokens, device)
    own = torch.tensor([[1 << label] for label in subjects], dtype=torch.int32, device=device)
    return ((bits & own) != 0) & (bits != EVERYTHING)


class MaskRefiner:
    """Refine the subjects' boxes to masks by the attention of the run.

    It works on the grid of the mask layers. k-means clusters the rows of the mean self-attention map, each
    column divided by its largest value. A subject's map m is the mean cross-attention to its noun, scaled
    by `word_map`, inside its present mask. A cluster c goes to the subject with the largest
    Σ_c m / min(Σ m, |c|), or to none if that is below `least`. A subject without a cluster gets its whole
    box again, and other subjects lose it.

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
        masks are deterministic. k-means is scikit-learn's; the published code takes another one with the same
        aim, so its clusters may differ.

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
            masks of the size of the boxes, with their background. They are resized by torch's
            "nearest-exact", as published. The class shows an example.
        """
        grid = token_grid(self.boxes.structure.shape, len(self.self_map))
        rows = self.self_map / (self.self_map.amax(0) + EPSILON)
        clusters = min(self.clusters * len(self.subjects), len(rows))
        labels = segment(rows, clusters=clusters, seed=self.seed, starts=100, centres=self.centres)
        members = F.one_hot(labels, clusters).to(rows)  # [N, clusters]
        self.centres = members.T @ rows / members.sum(0)[:, None].clamp(min=1)
        present, boxes = (
            subject_masks(each, self.subjects, len(rows), rows.device) for each in (regions, self.boxes)
        )  # [S, N]
        words = [word_map(self.cross_map[:, self.nouns[label]]) for label in self.subjects]
        maps = torch.stack(words) * present  # [S, N]
        area = torch.minimum(maps.sum(1, keepdim=True), members.sum(0))
        score, owner = (maps @ members / area.clamp(min=_TINY)).max(0)
        owners = torch.tensor(self.subjects, device=rows.device)[owner]
        found = owners.masked_fill(score < self.least, int(self.boxes.background or 0))[labels]
        for label, box in zip(self.subjects, boxes):
            if not (found == label).any():
                found = torch.where(box, label, found)
        masks = F.interpolate(found.view(1, 1, *grid).float(), self.boxes.structure.shape, mode=CENTRE)
        return Regions(structure=masks[0, 0].long().cpu(), background=self.boxes.background)


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
    """Divide attention [N] by its maximum, take s = σ(10 (m - 0.2)), and scale s to 0 to 1.

    The divisors are max m + 1e-5 and max s - min s + 1e-5, as published.

    Example:
        >>> word_map(torch.tensor([0.0, 1.0, 2.0]))
        tensor([0.0000, 0.9465, 1.0000])
    """
    scaled = torch.sigmoid(10 * (attention / (attention.max() + EPSILON) - 0.2))
    return (scaled - scaled.min()) / (scaled.max() - scaled.min() + EPSILON)
