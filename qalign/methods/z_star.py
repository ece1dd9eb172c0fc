"""Z-STAR: the output attends the style's keys beside its own keys."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qalign_kernels import attention

from ..context.layer_call import Site, take
from ._editing import Card, Editing


@dataclass(frozen=True, kw_only=True)
class ZStar(Editing):
    """Transfer style by one softmax over both pictures.

    output rows: softmax([λ s Q_out K_styleᵀ, s Q_out K_outᵀ]) [V_style; V_out], from the sixth of 30 steps
    on, in the last six self-attention layers.

    >>> import torch
    >>> from qalign import BatchLayout, Site, ZStar
    >>> q, k, v = torch.randn(3, 3, 2, 16, 8)  # three rows, two heads, 16 tokens, eight channels
    >>> site = Site(BatchLayout("output", "appearance", "structure"))
    >>> ZStar().attend(q, k, v, site).shape
    torch.Size([3, 2, 16, 8])

    Args:
        style_scale: λ, the factor of the style's logits. The authors' code has 1.2 for the content's row,
            which is the output's row here.

    Notes:
        The style's own row, which attends the content with a factor of 1.5, is not here: no output reads it.
        The optional spatial bias is not here.

    Source: Z-STAR, arXiv 2311.16491.
    """

    card: ClassVar[Card] = Card(
        "Z-STAR",
        "2311.16491",
        "own and appearance keys in one softmax; appearance logits times 1.2",
        "last six of the decoder",
        "6 to 30 of 30",
        "attention (segments)",
        2.0,
    )
    reads_labels: ClassVar[tuple[str, ...]] = ("appearance", "structure")
    default_steps: ClassVar[tuple[float, float] | None] = (5 / 30, 1.0)

    style_scale: float = 1.2

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        segments = [site.reference(k, v, reference, logit_scale=self.style_scale), site.own(k, v, output)]
        return attention(take(q, output), segments, scale=site.scale, query_labels=site.query_labels(q))
