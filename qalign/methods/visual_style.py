"""Visual style prompting: the output's queries attend the reference's keys and values, late in the decoder."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qalign_kernels import attention

from ..site import Site, take
from ._editing import Card, Editing


@dataclass(frozen=True, kw_only=True)
class VisualStylePrompting(Editing):
    """Style transfer by swapped self-attention.

    output rows: softmax(s Q_out K_refᵀ) V_ref, at every step, in the last six self-attention layers: up_blocks.1 of SDXL, where it was published.

    Source: Visual Style Prompting, arXiv 2402.12974.
    Not here: guidance of 20 at the first three steps, a real reference noised anew at every step, and the colour calibration of its latents.
    """

    card: ClassVar[Card] = Card("Visual style prompting", "2402.12974", "K, V <- appearance", "last six of the decoder", "all", "attention", 1.0)

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        return attention(take(q, output), site.reference(k, v, reference), scale=site.scale, query_labels=site.query_labels(q))
