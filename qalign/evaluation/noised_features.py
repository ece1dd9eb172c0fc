"""The queries and keys that a denoiser's self-attention makes of noised pictures."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..context.layer_call import Site
from ..context.layers import decoder_layers
from ..context.layout import BatchLayout
from ..methods import Method
from ..processors.attach import attach


class Features(NamedTuple):
    """Queries and keys [B, H, N, D] of one layer, and the site where they met."""

    q: Tensor
    k: Tensor
    site: Site


class _Kept(Method):
    """Stock attention that keeps what each layer attends."""

    def __init__(self) -> None:
        self.layers: dict[str, Features] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        self.layers[site.layer] = Features(q, k, site)
        return site.plain(q, k, v)

    def default_layers(self, names: Sequence[str]) -> list[str]:
        return decoder_layers(names)


@torch.inference_mode()
def noised_features(
    pipe: Any,
    pictures: Tensor,
    timesteps: Tensor,
    prompt: str,
    *,
    seeds: Sequence[int],
    layers: str | Sequence[str] | None = None,
) -> dict[str, Features]:
    """Queries and keys of noised pictures, by self-attention layer of the decoder, in one stock UNet call.

    Args:
        pipe: an `AppearanceTransferPipeline`.
        pictures: [B, 3, S, S] in [0, 1].
        timesteps: int64 [B]; each row is noised to its own.
        seeds: of the noise of each row.
        layers: as `attach`; None is all of the decoder.
    """
    latents = pipe.encode(pictures)
    noise = torch.stack(
        [torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    noised = pipe.scheduler.add_noise(latents, noise.to(latents), timesteps.to(latents.device))
    kept = _Kept()
    with attach(pipe.unet, kept, layout=BatchLayout(*["output"] * len(latents)), layers=layers):
        pipe.predict(noised, timesteps, pipe.conditions(prompt, *pictures.shape[-2:])[0])
    return kept.layers
