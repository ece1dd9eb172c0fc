"""Bounded attention: subjects in one picture that do not see each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qalign_kernels import attention

from ..site import Site, take
from ._editing import Card, Editing


@dataclass(frozen=True, kw_only=True)
class BoundedAttention(Editing):
    """Self-attention without leakage between the subjects of a picture.

    output rows: softmax over own keys j with label(j) = label(i), or either of both background. The labels are those of
    `attach(..., regions=Regions(structure=..., background=0))`: one for each subject's box or mask. Every self-attention layer, every step.

    Source: Bounded Attention, arXiv 2403.16990.
    Not here: masks of the cross-attention, guidance by its loss, refinement of boxes to masks; a token in several subjects (give the overlap a
    label of its own, which then sees itself and the background).
    """

    card: ClassVar[Card] = Card("Bounded attention", "2403.16990", "subjects do not see each other", "all", "all", "attention (labels)", 1.0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.idle:
            return site.plain(q, k, v)
        if site.regions is None:
            raise ValueError("regions: expected Regions(structure=...) for BoundedAttention, got None")
        output = site.output_rows(q)
        labels = site.regions.keys("structure", q.shape[2], q.device)
        segment = site.own(k, v, output, regions=labels)
        return site.merge(q, k, v, attention(take(q, output), segment, scale=site.scale, query_labels=labels))

    def default_layers(self, names: Sequence[str]) -> list[str]:
        return list(names)
