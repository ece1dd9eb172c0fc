"""The FreeU of Cross-Image attention. The official one is a feature of diffusers: `pipe.enable_freeu`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.utils.torch_utils import fourier_filter
from torch import Tensor

from ..processors.attach import find_unet


@contextlib.contextmanager
def cross_image_freeu(
    pipe_or_unet: Any, *, b1: float = 1.2, b2: float = 1.4, s1: float = 0.9, s2: float = 0.2
) -> Iterator[None]:
    """Scale the features that enter a UNet's up blocks, inside a `with` block.

    Where they are as wide as the UNet's widest block (1280 channels in SD 1.5): the first half of the channels times b1, then the lowest
    frequencies of all times s1. Where they are as wide as the next narrower (640): b2 and s2. Elsewhere nothing.
    The lowest frequencies are the ±1 around the centre of the shifted spectrum.

    Unlike the official FreeU this filters the backbone and not the skip connections, once for a block. The skips stay as they are.

    Args:
        pipe_or_unet: a pipeline with a UNet, or the UNet. Enter before it is compiled.

    Source: Cross-Image attention, arXiv 2311.03335; FreeU, arXiv 2309.11497.
    """
    unet: Any = find_unet(pipe_or_unet)
    widest, *narrower = sorted(set(unet.config.block_out_channels), reverse=True)
    factors = dict(zip((widest, *narrower), ((b1, s1), (b2, s2))))

    def boost(block: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        features = kwargs["hidden_states"]
        if features.shape[1] not in factors:
            return args, kwargs
        return args, {**kwargs, "hidden_states": _boost(features, *factors[features.shape[1]])}

    with contextlib.ExitStack() as hooks:
        for block in unet.up_blocks:
            hooks.callback(block.register_forward_pre_hook(boost, with_kwargs=True).remove)
        yield


def _boost(features: Tensor, backbone: float, low: float) -> Tensor:
    """[B, C, h, w]: the first half of the channels scaled, then the low frequencies of all; the filter works in float32."""
    first, second = features.float().tensor_split([features.shape[1] // 2], dim=1)
    return fourier_filter(torch.cat([first * backbone, second], dim=1), threshold=1, scale=low).to(
        features.dtype
    )
