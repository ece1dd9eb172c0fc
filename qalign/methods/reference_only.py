"""Reference-only control: self-attention attends the reference's keys beside its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qalign_kernels import attention

from ..context.layer_call import Site, take
from ._editing import Card, Editing


@dataclass(frozen=True, kw_only=True)
class ReferenceOnly(Editing):
    """Control by a reference, without training.

    A = softmax(s Q_out [K_out; K_ref]ᵀ) [V_out; V_ref] in the output rows. With classifier-free guidance the
    unconditional half becomes f A_own + (1 - f) A, where A_own is plain self-attention. By default in every
    self-attention layer, at every step.

    >>> import torch
    >>> from qalign import BatchLayout, ReferenceOnly, Site
    >>> q, k, v = torch.randn(3, 3, 2, 16, 8)  # three rows, two heads, 16 tokens, eight channels
    >>> site = Site(BatchLayout("output", "appearance", "structure"))
    >>> ReferenceOnly().attend(q, k, v, site).shape
    torch.Size([3, 2, 16, 8])

    Args:
        style_fidelity: f. The larger f is, the less the unconditional half sees of the reference, and the
            more guidance moves towards the reference.

    Raises:
        ValueError: `style_fidelity` is no fraction.

    Notes:
        This is the form of diffusers' community pipeline `stable_diffusion_reference`. Its read pass keeps
        the hidden states of the reference, with noise of the present step. A row of the batch, or
        `FeatureBank`, gives the same. Its attention weight of 1.0 leaves out no layer. Its `reference_adain`
        of convolutional features is not here.

    Source: reference-only of ControlNet.
    """

    card: ClassVar[Card] = Card(
        "Reference-only",
        "ControlNet #1236",
        "own and appearance keys in one softmax",
        "all",
        "all",
        "attention (segments)",
        2.0,
    )
    reads_labels: ClassVar[tuple[str, ...]] = ("appearance", "structure")

    style_fidelity: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.style_fidelity <= 1:
            raise ValueError(f"style_fidelity: expected a fraction of 0 to 1, got {self.style_fidelity!r}")

    def default_layers(self, names: Sequence[str]) -> list[str]:
        return list(names)

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        segments = [site.own(k, v, output), site.reference(k, v, reference)]
        both = attention(take(q, output), segments, scale=site.scale, query_labels=site.query_labels(q))
        if site.layout.parts(q.shape[0]) == 1 or self.style_fidelity == 0:
            return both
        unconditional, conditional = both.chunk(2)
        own = site.stock(q, k, v, output[: len(unconditional)])
        return torch.cat([unconditional.lerp(own, self.style_fidelity), conditional])
