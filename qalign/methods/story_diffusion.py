"""StoryDiffusion: the pictures of a batch attend random tokens of each other to keep their characters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qalign_kernels import Segment, attention

from ..context.layer_call import Site, take
from ..context.layers import decoder_layers
from ..context.outside_graphs import drawn
from ._editing import Card, Editing


@dataclass(frozen=True, kw_only=True)
class StoryDiffusion(Editing):
    """Attend random tokens of the other outputs: every row is an output, `BatchLayout(*["output"] * 4)`.

    output row i: softmax over all of its own keys and over those keys of each other row that the step's
    random mask keeps. All rows, heads and layers of one size share a mask. A layer is left out of a step at
    random. Keys that no mask keeps are not computed.

    >>> import torch
    >>> from qalign import BatchLayout, Site, StoryDiffusion
    >>> q, k, v = torch.randn(3, 4, 2, 16, 8)
    >>> site = Site(BatchLayout(*["output"] * 4))
    >>> StoryDiffusion().attend(q, k, v, site).shape
    torch.Size([4, 2, 16, 8])

    Args:
        rate: the share of another row's tokens that is kept.
        skip: the probabilities that a layer is left out, before and after `settled`.
        settled: the fraction of the steps at which the second probability begins.
        seed: of masks and left-out layers. They depend only on the seed, the step, the layer's name and the
            number of tokens.

    Notes:
        Published are four pictures, the up blocks, rate 0.5, and skip 0.3 in the first 20 of 50 steps and 0.1
        later. Further pictures that read the first four from memory are not here: `FeatureBank` keeps hidden
        states for methods that read one reference.

    Source: StoryDiffusion, arXiv 2405.01434.
    """

    card: ClassVar[Card] = Card(
        "StoryDiffusion",
        "2405.01434",
        "own keys and random tokens of the other outputs",
        "up blocks",
        "all",
        "attention (counts)",
        2.5,
    )

    rate: float = 0.5
    skip: tuple[float, float] = (0.3, 0.1)
    settled: float = 20 / 50
    seed: int = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        left_out, compiled = self._left_out(site), torch.compiler.is_compiling()
        if site.idle or (not compiled and left_out):
            return site.plain(q, k, v)
        output = site.output_rows(q)
        seen = (drawn(k.shape[2], self.seed, site.position, "") < self.rate).to(q.device)
        segments = []
        for rows in site.companion_rows(q):
            counts = (seen | (rows == output)[:, None]).int()[
                :, None
            ]  # [rows, 1, N], all keys of its own row
            segments.append(Segment(k, v, counts=counts, labels=site.own_labels(rows), batch_index=rows))
        edited = attention(take(q, output), segments, scale=site.scale, query_labels=site.query_labels(q))
        if compiled:  # the step is not known there
            edited = torch.where(left_out.to(q.device), site.stock(q, k, v, output), edited)
        return site.merge(q, k, v, edited)

    def default_layers(self, names: Sequence[str]) -> list[str]:
        return decoder_layers(names)

    def _left_out(self, site: Site) -> Tensor:
        """Whether this step leaves the layer out, a bool tensor on the CPU."""
        step, total = site.position.double()
        skip = torch.where(step / total >= self.settled, self.skip[1], self.skip[0])
        return drawn(1, self.seed, site.position, site.layer)[0] < skip
