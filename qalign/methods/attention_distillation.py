"""Attention distillation: losses between the self-attention of moving latents and that of a style."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qalign_kernels import distillation_loss

from ..context.regions import CORNER, Regions
from ._editing import last_six


class LayerFeatures(NamedTuple):
    """The features of one self-attention layer in one pass of the UNet.

    Attributes:
        query, key, value: [B, H, N, D].
        output: [B, H, N, D], the attention output before the output projection.
        scale: the factor of the dot product. None is 1/sqrt(D).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scale: float | None


Features = Mapping[str, LayerFeatures]  # name of the layer -> features


class Losses(NamedTuple):
    """The float32 scalars of total = distillation + content_weight · content."""

    total: Tensor
    distillation: Tensor
    content: Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionDistillation:
    """Compute the losses of attention distillation, which move latents towards a style.

    distillation = Σ_layers mean |O - sg(softmax(a s Q K_styleᵀ) V_style)|
    content = Σ_layers mean |Q - sg(Q_content)|
    total = distillation + content_weight · content

    O and Q are those of the moving latents. sg stops the gradient, so the first term has a gradient only
    through O. Several styles are attended as their concatenation. With `regions`, a query sees only the
    style's tokens of its own label. Label maps are resized to each layer by torch's "nearest", as published.

    This is a method on latents, and not on an attention layer: `attach` does not take it, and
    `AttentionDistillationPipeline` does.

    >>> import torch
    >>> from qalign import AttentionDistillation
    >>> from qalign.methods.attention_distillation import LayerFeatures
    >>> layer = LayerFeatures(*torch.randn(4, 1, 2, 16, 8), scale=None)
    >>> losses = AttentionDistillation().loss({"up": layer}, {"up": layer}, {"up": layer})
    >>> losses.total.shape, losses.content.item()
    (torch.Size([]), 0.0)

    Args:
        content_weight: the weight of the content. Published are 0.2 for appearance, 0.25 for style and 0.15
            for masked textures.
        logit_scale: a, the factor of the logits over the style.

    Notes:
        A query whose label the style does not show sees all of the style, as everywhere with `Regions`. The
        published code has no key left there. The loss between attention maps and FLUX are not here. The
        tuning of the VAE's decoder is `qalign.sampling.decoder_tuning`.

    Source: Attention Distillation, arXiv 2502.20235.
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
        """Return the losses of `features`, differentiable in them.

        Args:
            features: of B rows, by layer.
            style: of S rows, one for each style. All rows of `features` share them.
            content: of B rows or of one. None is no content loss.
            regions: labels, with one style only: `appearance` is the style's label map, and `structure` the
                output's. One for all rows, or one for each row with the same style.

        Returns:
            float32 scalars, summed over layers.

        Raises:
            ValueError: the layers differ, or there are regions with several styles.
        """
        if (
            not features
            or features.keys() != style.keys()
            or (content is not None and features.keys() != content.keys())
        ):
            expected = f"the layers {', '.join(features) or '(none)'} in style and content"
            raise ValueError(f"style: expected {expected}, got {', '.join(style)}")
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
            [
                each.query_labels("appearance", layer.query.shape[2], tokens, device, resize=CORNER)
                for each in of_rows
            ]
        )  # [B|1, N]
        keys = of_rows[0].picture_labels("appearance", tokens, device, resize=CORNER)
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
        """Select the layers whose losses are summed by default: the decoder's last six."""
        return last_six(names)
