"""The layers of a denoiser: short names, blocks, the grids of their tokens, and the size of its pictures."""

from collections.abc import Sequence
from typing import Any


def short_name(layer: str) -> str:
    """Shorten up_blocks.1.attentions.0.transformer_blocks.0.attn1 to up_blocks.1.attentions.0."""
    return layer.removesuffix(".attn1").removesuffix(".transformer_blocks.0")


def decoder_layers(names: Sequence[str]) -> list[str]:
    """Select the layers of the decoder, which are those of the up blocks, in their order."""
    return [name for name in names if name.startswith("up_blocks.")]


def halved(grid: tuple[int, int]) -> tuple[int, int]:
    """Halve both sides and round up, as a UNet's downsampling does."""
    return -(-grid[0] // 2), -(-grid[1] // 2)


def token_grid(size: Sequence[int], tokens: int) -> tuple[int, int]:
    """Return the grid (rows, columns) of a layer's tokens.

    `size` is (height, width) of the latents or of the picture. A UNet halves the grid from block to block.

    >>> from qalign.context.layers import token_grid
    >>> token_grid((64, 96), 24 * 16)
    (16, 24)

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
    """Return the side, in pixels, of the pictures that a pipeline was trained on."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor
