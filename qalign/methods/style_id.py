"""StyleID: mostly the content's queries, keys and values of the style, a sharper softmax."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qalign_kernels import attention

from ..context.adain import adain
from ..context.layer_call import Site, take
from ._editing import Card, Editing


@dataclass(frozen=True, kw_only=True)
class StyleID(Editing):
    """Transfer the style of an inverted picture to an inverted picture.

    output rows: softmax(T s (γ Q_content + (1 - γ) Q_out) K_styleᵀ) V_style, in the last six self-attention
    layers. The content is the structure row, the style is the appearance row.

    In `AppearanceTransferPipeline` the output's first latents are AdaIN(z_content → z_style), per channel
    over the picture, without eps.

    >>> import torch
    >>> from qalign import BatchLayout, Site, StyleID
    >>> q, k, v = torch.randn(3, 3, 2, 16, 8)  # three rows, two heads, 16 tokens, eight channels
    >>> site = Site(BatchLayout("output", "appearance", "structure"))
    >>> StyleID().attend(q, k, v, site).shape
    torch.Size([3, 2, 16, 8])

    Args:
        query_preservation: γ, the share of the content's queries.
        temperature: T on the logits. Above 1 it makes the softmax sharper.
        initial_adain: whether the first latents take the style's statistics.

    Notes:
        The published features come from the inversions of both pictures, stored by timestep. Here both rows
        run along, and in `AppearanceTransferPipeline` they are inversions. Its published settings there are
        `inversion="ddim"`, 50 steps without the first (skip=0.02), and no swap guidance. The published AdaIN
        takes the statistics of a batch of pictures, and this one takes those of each picture. In a loop of
        your own, call `start` yourself.

    Source: StyleID, arXiv 2312.09008.
    """

    card: ClassVar[Card] = Card(
        "StyleID",
        "2312.09008",
        "queries blended with the structure's; appearance keys and values, sharper softmax",
        "last six of the decoder",
        "all",
        "attention (scale)",
        1.0,
    )
    reads_labels: ClassVar[tuple[str, ...]] = ("appearance", "structure")

    query_preservation: float = 0.75
    temperature: float = 1.5
    initial_adain: bool = True

    def start(self, latents: Tensor, appearance: Tensor) -> Tensor:
        """Return the latents [outputs, C, h, w] with the statistics of the appearance's [1, C, h, w]."""
        return adain(latents, appearance, eps=0.0) if self.initial_adain else latents

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        query = take(q, output).lerp(take(q, site.structure_rows(q)), self.query_preservation)
        segment = site.reference(k, v, reference, logit_scale=self.temperature)
        return attention(query, segment, scale=site.scale, query_labels=site.query_labels(q))
