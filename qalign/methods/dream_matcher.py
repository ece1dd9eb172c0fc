"""DreamMatcher: values of matching appearance tokens, where the match returns to its origin."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qalign_kernels import Segment, attention, similarity_argmax
from qalign_kernels.rearrange import take_rows

from ..context.layer_call import Site, take
from ..context.layout import BatchLayout
from ..context.outside_graphs import token_places
from ..context.regions import Regions
from ._editing import Card, Editing, check_labels


@dataclass(frozen=True, kw_only=True)
class DreamMatcher(Editing):
    """Keep the output's queries and keys, and so its layout, and take matching values of the appearance.

    π(i) = argmax_j cos(f_out,i, f_app,j),  ρ(j) = argmax_i cos(f_app,j, f_out,i),
    c_i = [|i - ρ(π(i))| < τ H r],
    output rows: softmax(s Q_out K_outᵀ) (m c V_app[π] + (1 - m c) V_out).

    |·| is the distance in tokens on the layer's grid of H rows. m is the output's foreground, and r the share
    of the tokens that it covers. By default from the fifth of 50 steps on, in the last six self-attention
    layers.

    The foreground is the labels other than 0 of `attach(..., regions=Regions(structure=mask))`. Without
    regions it is everything. With labels of the appearance too, tokens are matched within their label.

    >>> import torch
    >>> from qalign import BatchLayout, DreamMatcher, Site
    >>> q, k, v = torch.randn(3, 3, 2, 16, 8)  # three rows, two heads, 16 tokens, eight channels
    >>> site = Site(BatchLayout("output", "appearance", "structure"))
    >>> DreamMatcher(size=(4, 4)).attend(q, k, v, site).shape
    torch.Size([3, 2, 16, 8])

    Args:
        consistency: τ.
        size: (height, width) of the latents or of the picture, where neither `attach` nor regions tell it.

    Notes:
        The published form matches features of two decoder blocks, reduced together by PCA, from a separate
        pass. Here f are the layer's own queries of all heads: every layer matches for itself, and there is
        no further pass. The published foreground is a soft map of the cross-attention; here it is a
        mask. The guidance of matched patches is not here, nor is the first call, in which an output without a
        mask attends the appearance.

    Source: DreamMatcher, arXiv 2402.09812.
    """

    card: ClassVar[Card] = Card(
        "DreamMatcher",
        "2402.09812",
        "values of the appearance where matches agree in both directions",
        "last six of the decoder",
        "5 to 50 of 50",
        "similarity_argmax, attention",
        2.0,
    )
    default_steps: ClassVar[tuple[float, float] | None] = (4 / 50, 1.0)

    reads_labels: ClassVar[tuple[str, ...]] = ("structure",)
    reads_size: ClassVar[bool] = True

    consistency: float = 0.4
    size: tuple[int, int] | None = None

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        labelled = site.regions is None or site.regions.appearance is not None
        labels = site.key_labels(k, reference) if labelled else site.own_labels(reference)
        query_labels = None if labels is None else site.query_labels(q) if labelled else site.open_labels(q)
        query = take(q, output)
        there = similarity_argmax(
            query, q, query_labels=query_labels, reference_labels=labels, batch_index=reference
        ).index
        back = similarity_argmax(
            take(q, reference), q, query_labels=labels, reference_labels=query_labels, batch_index=output
        ).index
        kept = self._kept(there, back, site).unsqueeze(-1)
        value = torch.where(kept, take_rows(take(v, reference), there), take(v, output))
        segment = Segment(take(k, output), value, labels=site.own_labels(output))
        return attention(query, segment, scale=site.scale, query_labels=query_labels)

    def _kept(self, there: Tensor, back: Tensor, site: Site) -> Tensor:
        """bool [rows, 1, N]: the foreground tokens whose match leads back near them.

        A token without a match is not among them.
        """
        tokens = there.shape[-1]
        foreground = (
            None
            if site.regions is None
            else site.regions.subject_labels("structure", 0, 1, tokens, there.device) != 0
        )
        places, height = token_places(self._size(tokens, site), tokens, there.device)
        end = places[:, back.gather(-1, there.clamp(min=0).long())]  # [2, rows, 1, N]
        square = (end - places[:, None, None]).square().sum(0)
        share = 1.0 if foreground is None else foreground.float().mean()
        kept = (square < (self.consistency * height * share) ** 2) & (there >= 0)
        return kept if foreground is None else kept & foreground

    def _size(self, tokens: int, site: Site) -> tuple[int, int]:
        if site.forward is not None:
            return site.forward.size
        size = self.size if site.regions is None else site.regions.structure.shape
        if size is None:
            expected = "(height, width) of the latents outside of attach"
            raise ValueError(f"size: expected {expected}, got None for {tokens} tokens")
        return size

    def check(
        self,
        size: tuple[int, int],
        grids: Sequence[tuple[int, int]],
        layout: BatchLayout,
        regions: Regions | None,
    ) -> None:
        """Check the labels as other methods do, those of the appearance too if there are any."""
        super().check(size, grids, layout, regions)
        if regions is not None and isinstance(regions.appearance, Tensor):
            for grid in grids:
                check_labels(regions.appearance, "appearance", size, grid)
