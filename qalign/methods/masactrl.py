"""MasaCtrl: mutual self-attention, which keeps what a picture shows while its layout changes."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qalign_kernels import attention

from ..site import Site, take
from ._editing import Card, Editing


@dataclass(frozen=True, kw_only=True)
class MasaCtrl(Editing):
    """Consistent editing: the output (target) takes keys and values of the appearance row (source).

    output rows: softmax(s Q_out K_srcᵀ) V_src, or with `union` softmax(s Q_out [K_src; K_out]ᵀ) [V_src; V_out], from the fifth of 50 steps on in
    the last six self-attention layers (SD 1.4: 10 to 15; for SDXL the authors begin at layer 44, 54 or 64 of 70).

    The method's mask form attends the source's foreground and background apart and puts both together by the target's mask. For binary masks
    that is a label on each token: `attach(..., regions=Regions(appearance=source_mask, structure=target_mask))`.

    Args:
        union: attend the output's own keys too. The authors' class for it cannot run; this is the formula that it states.

    Source: MasaCtrl, arXiv 2304.08465. Its code adds 1 to the logits of unmasked keys, which changes nothing, and where the source has no
    foreground it attends uniformly; here such a query attends all of the source.
    Not here: masks from the cross-attention of the run.
    """

    card: ClassVar[Card] = Card(
        "MasaCtrl", "2304.08465", "K, V <- appearance (or both)", "last six of the decoder", "5 to 50 of 50", "attention (segments)", 1.0
    )
    default_steps: ClassVar[tuple[float, float] | None] = (4 / 50, 1.0)

    union: bool = False

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        segments = [site.reference(k, v, reference)]
        if self.union:
            segments.append(site.own(k, v, output))
        return attention(take(q, output), segments, scale=site.scale, query_labels=site.query_labels(q))
