"""The queries and keys of noised pictures in the self-attention of a denoiser."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..context.layer_call import Site
from ..context.layers import decoder_layers
from ..context.layout import BatchLayout
from ..methods import Method
from ..processors.attach import attach
from ..sampling.denoising import ddim_scheduler


class Features(NamedTuple):
    """Queries and keys [B, H, N, D] of one layer, and the layer call that they belong to."""

    q: Tensor
    k: Tensor
    site: Site


class _Kept(Method):
    """Attention without edits that keeps the queries and keys of each layer."""

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
    """Read queries and keys of noised pictures in one call of the UNet without edits.

    Args:
        pipe: an `AppearanceTransferPipeline`.
        pictures: [B, 3, S, S] in [0, 1].
        timesteps: int64 [B], the noise level of each row.
        prompt: of all rows.
        seeds: B numbers, the seed of the noise of each row.
        layers: as in `attach`; None is every layer of the decoder.

    Returns:
        By name of the self-attention layer.

    >>> from qalign import AppearanceTransferPipeline
    >>> tool = AppearanceTransferPipeline.from_pipe(pipe)
    >>> kept = noised_features(tool, structure[None], torch.tensor([300]), prompt, seeds=[0])
    >>> {features.q.shape[0] for features in kept.values()}
    {1}
    """
    latents = pipe.encode(pictures)
    noise = torch.stack(
        [torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    noised = ddim_scheduler(pipe.scheduler).add_noise(
        latents, noise.to(latents), timesteps.to(latents.device)
    )
    kept = _Kept()
    with attach(pipe.unet, kept, layout=BatchLayout(*["output"] * len(latents)), layers=layers):
        pipe.predict(noised, timesteps, pipe.conditions(prompt, *pictures.shape[-2:])[0])
    return kept.layers
