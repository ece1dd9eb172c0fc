"""StoryDiffusion: pictures of a batch that see random tokens of each other, and so keep their characters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qalign_kernels import Segment, attention

from ..context.layer_call import Site, take
from ..context.layers import decoder_layers
from ._editing import Card, Editing, uniform


@dataclass(frozen=True, kw_only=True)
class StoryDiffusion(Editing):
    """Consistent self-attention over the outputs of a batch: every row is an output, `BatchLayout(*["output"] * 4)`.

    output row i: softmax over all of its own keys and, of each other row, the keys that a mask drawn at this step keeps; the masks are shared by all
    rows, heads and layers of one size. A layer is left out of a step at random. Keys that no mask keeps are not computed.

    Args:
        rate: the share of another row's tokens that is seen.
        skip: how often a layer is left out, before and from `settled` (a fraction of the steps) on.
        seed: of masks and omissions, which are a function of it, the step, the layer's name and the number of tokens.

    Source: StoryDiffusion, arXiv 2405.01434: four pictures, up blocks, rate 0.5, skip 0.3 in the first 20 of 50 steps and 0.1 after.
    Not here: later pictures that read the first four from memory (`FeatureBank` keeps hidden states for methods that read one reference).
    """

    card: ClassVar[Card] = Card(
        "StoryDiffusion",
        "2405.01434",
        "K, V + random tokens of others",
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
        step, total = (
            (0, 1)
            if site.clock is None or site.clock.step is None
            else (site.clock.step, site.clock.total or 1)
        )
        if site.idle or self._draw(1, step, site.layer).item() < self.skip[step / total >= self.settled]:
            return site.plain(q, k, v)
        output, tokens = site.output_rows(q), k.shape[2]
        seen = (self._draw(tokens, step, "") < self.rate).to(q.device)
        segments = []
        for rows in site.companion_rows(q):
            counts = (seen | (rows == output)[:, None]).int()[:, None]  # all of its own row, [rows, 1, N]
            segments.append(Segment(k, v, counts=counts, labels=site.own_labels(rows), batch_index=rows))
        return site.merge(
            q, k, v, attention(take(q, output), segments, scale=site.scale, query_labels=site.query_labels(q))
        )

    def default_layers(self, names: Sequence[str]) -> list[str]:
        return decoder_layers(names)

    def _draw(self, count: int, step: int, name: str) -> Tensor:
        return uniform(count, self.seed, step, name)
