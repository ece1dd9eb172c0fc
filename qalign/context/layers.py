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


def layer_grid(name: str, model: Any, size: Sequence[int]) -> tuple[int, int]:
    """Return the grid (rows, columns) of the tokens of a UNet's layer.

    >>> from qalign.context.layers import layer_grid
    >>> layer_grid("mid_block.attentions.0.transformer_blocks.0.attn1", pipe.unet, (16, 16))
    (2, 2)

    Args:
        name: of the layer or of another module in a block.
        model: the UNet. It halves the grid from block to block.
        size: (height, width) of the latents.
    """
    block, _, rest = name.partition(".")
    deepest = len(model.down_blocks) - 1
    level = deepest
    if block != "mid_block":
        number = int(rest.partition(".")[0])
        level = number if block == "down_blocks" else deepest - number
    grid = (size[0], size[1])
    for _ in range(level):
        grid = halved(grid)
    return grid


def latent_size(pipe: Any) -> tuple[int, int]:
    """Return (height, width) of the latents that a pipeline was trained on, as its UNet says.

    >>> from qalign.context.layers import latent_size
    >>> latent_size(pipe)
    (16, 16)

    Raises:
        ValueError: the UNet does not say it.
    """
    size = pipe.unet.config.sample_size
    if size is None:
        expected = "both, because the UNet has no sample_size"
        raise ValueError(f"height, width: expected {expected}, got None")
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def picture_size(pipe: Any) -> int:
    """Return the side, in pixels, of the square pictures that a pipeline was trained on.

    Raises:
        ValueError: they are not square.
    """
    height, width = latent_size(pipe)
    if height != width:
        expected = "a UNet of square pictures, because the scenes are square"
        raise ValueError(f"sample_size: expected {expected}, got {height} x {width}")
    return height * pipe.vae_scale_factor
