"""StyleID: queries that keep the content's, keys and values of the style, sharper softmax."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qalign_kernels import attention

from ..context.adain import adain
from ..context.layer_call import Site, take
from ._editing import Card, Editing


@dataclass(frozen=True, kw_only=True)
class StyleID(Editing):
    """Style transfer from inverted pictures.

    output rows: softmax(T s (γ Q_content + (1 - γ) Q_out) K_styleᵀ) V_style, content being the structure row and style the appearance row,
    in the last six self-attention layers.

    `start`, in `AppearanceTransferPipeline`: the output's first latents are AdaIN(z_content → z_style), per channel over the picture, no eps.

    Args:
        query_preservation: γ, how much of the content's queries is kept.
        temperature: T on the logits; above 1 it sharpens.
        initial_adain: whether `start` does that.

    Source: StyleID, arXiv 2312.09008. Its features come from the inversions of both pictures, cached by timestep; here both rows run along, and
    in `AppearanceTransferPipeline` they are the inversions. As published there: `inversion="ddim"`, 50 steps, the first left out (skip=0.02),
    no swap guidance. The published AdaIN takes the statistics of a batch of pictures, this one those of each. In a loop of your own, with
    `attach`, `start` is yours to call.
    """

    card: ClassVar[Card] = Card(
        "StyleID",
        "2312.09008",
        "Q blended with structure; K, V <- appearance, T = 1.5",
        "last six of the decoder",
        "all",
        "attention (scale)",
        1.0,
    )

    query_preservation: float = 0.75
    temperature: float = 1.5
    initial_adain: bool = True

    def start(self, latents: Tensor, appearance: Tensor) -> Tensor:
        """The first latents [outputs, C, h, w] in the statistics of the appearance's [1, C, h, w]."""
        return adain(latents, appearance, eps=0.0) if self.initial_adain else latents

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        query = take(q, output).lerp(take(q, site.structure_rows(q)), self.query_preservation)
        segment = site.reference(k, v, reference, logit_scale=self.temperature)
        return attention(query, segment, scale=site.scale, query_labels=site.query_labels(q))
