"""Reference-only control: self-attention sees the reference's keys beside its own."""

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
    """Reference control without training.

    A = softmax(s Q_out [K_out; K_ref]ᵀ) [V_out; V_ref] in the output rows; with classifier-free guidance its unconditional half becomes
    f A_own + (1 - f) A, A_own being plain self-attention. Every self-attention layer, every step.

    Args:
        style_fidelity: f, how little of the reference reaches the unconditional half: it makes guidance push towards the reference.

    Source: reference-only of ControlNet, as in diffusers' community pipeline `stable_diffusion_reference`, whose read pass keeps the hidden states of
    the reference, noised to the step; a row of the batch, or `FeatureBank`, holds the same. Attention weight 1.0, so no layer is left out.
    Not here: its `reference_adain` of convolutional features.
    """

    card: ClassVar[Card] = Card(
        "Reference-only", "ControlNet #1236", "K, V + appearance", "all", "all", "attention (segments)", 2.0
    )

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
