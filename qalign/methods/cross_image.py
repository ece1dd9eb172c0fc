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
    """Transfer appearance by swapped keys and values.

    output rows: contrasted softmax(s Q_out K_refᵀ) V_ref. The reference is the appearance, or the structure
    at some early steps. Queries of an output row are always its own. All other rows are stock attention.

    >>> import torch
    >>> from qalign import BatchLayout, CrossImage, Site
    >>> q, k, v = torch.randn(3, 3, 2, 16, 8)  # three rows, two heads, 16 tokens, eight channels
    >>> site = Site(BatchLayout("output", "appearance", "structure"))
    >>> CrossImage().attend(q, k, v, site).shape
    torch.Size([3, 2, 16, 8])

    Args:
        contrast: c of clip(c·(p - 1/N) + 1/N, 0, 1) on the probabilities p, without renormalisation. 1.0 is
            plain softmax.
        structure_every: the period, in steps, of the structure steps, which read the structure's keys and
            values. 0 is never. They need a layout with a structure row and a clock: `attach` on a pipeline,
            or `control.track`.
        structure_until: the fraction of the steps after which there are no structure steps. The published
            number is 40 of the 68 steps that run.

    Notes:
        The published code numbers the steps one late and calls the first two steps 0. So does this class.
        Swap guidance and AdaIN of latents are in `AppearanceTransferPipeline`; the range of steps is
        `attach(steps=...)`.

    Source: Cross-Image attention, arXiv 2311.03335.
    """

    card: ClassVar[Card] = Card(
        "Cross-Image",
        "2311.03335",
        "keys and values of the appearance; contrast",
        "last two decoder blocks",
        "12 to 68 of 68",
        "attention (contrast)",
        1.5,
    )
    reads_labels: ClassVar[tuple[str, ...]] = ("appearance", "structure")

    contrast: float = 1.67
    structure_every: int = 5
    structure_until: float = 40 / 68

    def default_layers(self, names: Sequence[str]) -> list[str]:
        """Select the self-attention of the last two decoder blocks that have any.

        They have 32² and 64² tokens in SD 1.5 at 512 pixels and in SDXL at 1024 pixels.
        """
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
