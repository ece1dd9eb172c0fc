"""Cross-Image attention: the output's queries attend another image's keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qalign_kernels import attention

from ..context.layer_call import Site, take
from ..context.layers import decoder_layers
from ._editing import Card, Editing


@dataclass(frozen=True, kw_only=True)
class CrossImage(Editing):
    """Appearance transfer by swapped keys and values.

    output rows: contrasted softmax(s Q_out K_refᵀ) V_ref, the reference being the appearance, or the structure at some early steps.
    All other rows are stock attention, and an output row's queries are always its own.

    Args:
        contrast: c of clip(c·(p - 1/N) + 1/N, 0, 1) on the probabilities, which are not renormalised; 1.0 is plain softmax.
        structure_every: period, in steps, of those at which the structure's keys and values are read; 0 is never. Needs a layout with a
            structure row and a clock: `attach` on a pipeline, or `control.track`.
        structure_until: the fraction of the steps after which the structure is not read any more. As published: 40 of the 68 that run.

    Source: Cross-Image attention, arXiv 2311.03335. Its code numbers the steps one late and calls the first two 0; so does this.
    Not here: its swap guidance, latent AdaIN, FreeU and step range (`attach(steps=...)`).
    """

    card: ClassVar[Card] = Card(
        "Cross-Image",
        "2311.03335",
        "K, V <- appearance, contrast",
        "last two decoder blocks",
        "12 to 68 of 68",
        "attention (contrast)",
        1.5,
    )

    contrast: float = 1.67
    structure_every: int = 5
    structure_until: float = 40 / 68

    def default_layers(self, names: Sequence[str]) -> list[str]:
        """Self-attention in the last two decoder blocks that have any: 32² and 64² tokens in SD 1.5 at 512 and SDXL at 1024 pixels."""
        decoder = decoder_layers(names)
        blocks = list(dict.fromkeys(name.split(".")[1] for name in decoder))[-2:]
        return [name for name in decoder if name.split(".")[1] in blocks]

    def takes_structure(self, step: int, total: int) -> bool:
        late = max(step - 1, 0)
        return (
            self.structure_every > 0
            and late % self.structure_every == 0
            and late / total < self.structure_until
        )

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        segment = site.reference(k, v, reference)
        return attention(
            take(q, output),
            segment,
            scale=site.scale,
            contrast=self.contrast,
            query_labels=site.query_labels(q),
        )
