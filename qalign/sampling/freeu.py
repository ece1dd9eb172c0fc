"""The FreeU of Cross-Image attention. The official FreeU is `pipe.enable_freeu` of diffusers."""

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
    """Run the FreeU of Cross-Image attention on a UNet, inside a `with` block.

    At the entry of the up blocks, the features as wide as the widest block (1280 channels in SD 1.5)
    change: the first half of the channels times b1, then the lowest frequencies of all channels times s1.
    Features of the next width (640) change by b2 and s2. Other widths stay. The lowest frequencies are the
    ±1 around the centre of the shifted spectrum.

    The official FreeU filters the skip connections. This one filters the backbone, once for a block.

    Args:
        pipe_or_unet: a pipeline with a UNet, or the UNet. Enter the block before torch.compile.
        b1: the factor of the first half of the channels, at the widest features.
        b2: the same at the next width.
        s1: the factor of the lowest frequencies, at the widest features.
        s2: the same at the next width.

    Raises:
        TypeError: there is no UNet.

    Example:
        >>> inputs = {"timestep": torch.tensor(301), "encoder_hidden_states": torch.zeros(3, 7, 32)}
        >>> with torch.no_grad(), cross_image_freeu(pipe):
        ...     noise = pipe.unet(latents, **inputs).sample
        >>> noise.shape
        torch.Size([3, 4, 16, 16])

    Notes:
        The filter works in float32. The hooks are removed at the end, after exceptions too.

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
    """Features [B, C, h, w] with the first half of the channels scaled, then the low frequencies of all."""
    first, second = features.float().tensor_split([features.shape[1] // 2], dim=1)
    return fourier_filter(torch.cat([first * backbone, second], dim=1), threshold=1, scale=low).to(
        features.dtype
    )
