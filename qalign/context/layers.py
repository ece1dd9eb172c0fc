"""What everybody asks of a denoiser: its layers by short names and by block, the grids of their tokens, the size of its pictures."""

from collections.abc import Sequence
from typing import Any


def short_name(layer: str) -> str:
    """A self-attention layer's name without what most share: up_blocks.1.attentions.0.transformer_blocks.0.attn1 -> up_blocks.1.attentions.0"""
    return layer.removesuffix(".attn1").removesuffix(".transformer_blocks.0")


def decoder_layers(names: Sequence[str]) -> list[str]:
    """Those of the decoder, the up blocks, in their order."""
    return [name for name in names if name.startswith("up_blocks.")]


def halved(grid: tuple[int, int]) -> tuple[int, int]:
    """Both sides halved and rounded up, as a UNet's downsampling does."""
    return -(-grid[0] // 2), -(-grid[1] // 2)


def token_grid(size: Sequence[int], tokens: int) -> tuple[int, int]:
    """(rows, columns) of a layer's tokens over latents or a picture of `size` (height, width), halved from layer to layer.

    Raises:
        ValueError: no number of halvings gives so many tokens.
    """
    height, width = size
    grid = height, width
    while grid[0] * grid[1] > max(tokens, 1):
        grid = halved(grid)
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"tokens: expected a grid of {height} x {width} halved some times, got {tokens}")
    return grid


def picture_size(pipe: Any) -> int:
    """The side, in pixels, of the pictures that a pipeline was trained on."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor
