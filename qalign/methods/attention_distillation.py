"""Attention distillation: latents moved until self-attention draws from a style what it would draw with the style's own keys and values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qalign_kernels import distillation_loss

from ..context.regions import Regions
from ._editing import last_six


class LayerFeatures(NamedTuple):
    """One self-attention layer in one pass of the UNet.

    Attributes:
        query, key, value: [B, H, N, D]. output: [B, H, N, D], what attention made of them, before the output projection.
        scale: of the dot product; None is 1/sqrt(D).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scale: float | None


Features = Mapping[str, LayerFeatures]  # by layer


class Losses(NamedTuple):
    """float32 scalars: total = distillation + content_weight · content."""

    total: Tensor
    distillation: Tensor
    content: Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionDistillation:
    """The losses of attention distillation: a method on latents, not on an attention layer, so `attach` does not take it.

    distillation = Σ_layers mean |O - sg(softmax(a s Q K_styleᵀ) V_style)|,  content = Σ_layers mean |Q - sg(Q_content)|

    O and Q are those of the latents that move. sg stops the gradient: in the first term it goes through O only. Several styles are attended as their
    concatenation. With `regions` a query sees the style's tokens of its own label: rows are the output's tokens, columns the style's.

    Args:
        content_weight: λ of the content; published are 0.2 for appearance, 0.25 for style, 0.15 for masked textures.
        logit_scale: a of the ideal output.

    Source: Attention Distillation, arXiv 2502.20235. Deviation: a query whose label the style does not show sees all of it, as everywhere under
    `Regions`; published code has no key left there.
    Not here: the loss between attention maps, FLUX. The tuning of the VAE's decoder is `qalign.sampling.decoder_tuning`.
    """

    content_weight: float = 0.2
    logit_scale: float = 1.0

    def loss(
        self,
        features: Features,
        style: Features,
        content: Features | None = None,
        *,
        regions: Regions | Sequence[Regions] | None = None,
    ) -> Losses:
        """The losses of `features` with B rows, differentiable in them.

        Args:
            style: of S rows, one for each style, which all rows of `features` share.
            content: of B rows or of one; None is no content.
            regions: `appearance` is the style's label map, `structure` the output's; of one style only. One for all rows, or one for each row
                with the same style.

        Raises:
            ValueError: layers that differ, or regions with several styles.
        """
        if (
            not features
            or features.keys() != style.keys()
            or (content is not None and features.keys() != content.keys())
        ):
            raise ValueError(
                f"style: expected the layers {', '.join(features) or '(none)'} in style and content, got {', '.join(style)}"
            )
        zero = next(iter(features.values())).query.new_zeros((), dtype=torch.float32)
        distilled, kept = zero, zero
        for name, layer in features.items():
            distilled = distilled + self._distillation(layer, style[name], regions)
            if content is not None:
                kept = kept + (layer.query.float() - content[name].query.detach().float()).abs().mean()
        return Losses(distilled + self.content_weight * kept, distilled, kept)

    def _distillation(
        self, layer: LayerFeatures, style: LayerFeatures, regions: Regions | Sequence[Regions] | None
    ) -> Tensor:
        tokens, device = style.key.shape[2], style.key.device
        scale = (layer.query.shape[-1] ** -0.5 if layer.scale is None else layer.scale) * self.logit_scale
        if regions is None:
            return distillation_loss(
                layer.output, layer.query, style.key.split(1), style.value.split(1), scale=scale
            )
        if len(style.key) != 1:
            raise ValueError(f"regions: expected one style with them, got {len(style.key)}")
        of_rows = [regions] if isinstance(regions, Regions) else regions
        queries = torch.cat(
            [each.queries("appearance", layer.query.shape[2], tokens, device) for each in of_rows]
        )  # [B|1, N]
        keys = of_rows[0].keys("appearance", tokens, device)
        return distillation_loss(
            layer.output,
            layer.query,
            style.key,
            style.value,
            scale=scale,
            query_labels=queries,
            ref_labels=keys,
        )

    def default_layers(self, names: Sequence[str]) -> list[str]:
        return last_six(names)
