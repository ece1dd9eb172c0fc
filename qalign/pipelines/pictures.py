"""Pictures of any kind as tensors of one size."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import require_count

MULTIPLE = 8  # pixels: every Stable Diffusion pipeline needs sides that are multiples of it


def to_tensors(pictures: Any, name: str) -> list[Tensor]:
    """Convert pictures of any kind to tensors.

    Args:
        pictures: one picture, a list, or a batch: PIL images, tensors [3, H, W] or [B, 3, H, W], arrays
            [H, W, 3] or [B, H, W, 3]. Floats are in [0, 1], integers in 0 to 255.
        name: of the argument, for errors.

    Returns:
        a list of float32 [3, H, W] in [0, 1].

    Raises:
        TypeError: a picture is of another kind.
        ValueError: there is no picture, or a value is out of range.

    Example:
        >>> [list(picture.shape) for picture in to_tensors([appearance, structure], "pictures")]
        [[3, 32, 32], [3, 32, 32]]
    """
    if isinstance(pictures, list | tuple):
        tensors = [tensor for picture in pictures for tensor in to_tensors(picture, name)]
    elif getattr(pictures, "ndim", 0) == 4:
        tensors = [_to_tensor(picture, name) for picture in pictures]
    else:
        tensors = [_to_tensor(pictures, name)]
    if not tensors:
        raise ValueError(f"{name}: expected at least one picture, got none")
    return tensors


def choose_size(picture: Tensor, height: int | None, width: int | None, name: str) -> tuple[int, int]:
    """Choose the size of the result.

    Args:
        picture: [3, H, W].
        height: in pixels. None is the picture's.
        width: the same across.
        name: of the picture's argument, for errors.

    Returns:
        (height, width).

    Raises:
        ValueError: a side is no multiple of 8, or below it.

    Example:
        >>> choose_size(structure, 64, None, "structure")
        (64, 32)
    """
    for side, given in (("height", height), ("width", width)):
        if given is not None:
            require_count(side, given, MULTIPLE)
    size = (height or picture.shape[1], width or picture.shape[2])
    if any(side % MULTIPLE or side <= 0 for side in size):
        source = "height and width" if height and width else name
        if (height or width or 0) % MULTIPLE and not (height and width):
            source = "height" if height else "width"
        got = f"{size[0]} x {size[1]} (height and width resize a picture)"
        raise ValueError(f"{source}: expected multiples of {MULTIPLE} pixels, got {got}")
    return size


def cover(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale a picture until it covers a size, and cut out the middle.

    Args:
        picture: [3, H, W] in [0, 1].
        size: (height, width).

    Returns:
        [3, height, width]. The aspect ratio stays.

    Example:
        >>> cover(structure, (16, 64)).shape
        torch.Size([3, 16, 64])
    """
    if picture.shape[1:] == size:
        return picture
    scale = max(wanted / side for wanted, side in zip(size, picture.shape[1:]))
    scaled = tuple(max(wanted, round(side * scale)) for wanted, side in zip(size, picture.shape[1:]))
    picture = (
        F.interpolate(picture.unsqueeze(0), scaled, mode="bicubic", antialias=True).squeeze(0).clamp(0, 1)
    )
    top, left = ((side - wanted) // 2 for wanted, side in zip(size, scaled))
    return picture[:, top : top + size[0], left : left + size[1]]


def _to_tensor(picture: Any, name: str) -> Tensor:
    if hasattr(picture, "convert"):
        import numpy

        picture = numpy.array(picture.convert("RGB"))
    if hasattr(picture, "__array__") and not isinstance(picture, Tensor):
        picture = torch.as_tensor(picture)
        picture = picture.permute(2, 0, 1) if picture.ndim == 3 else picture
    if not isinstance(picture, Tensor) or picture.ndim != 3 or picture.shape[0] != 3:
        got = list(picture.shape) if isinstance(picture, Tensor) else type(picture).__name__
        raise TypeError(f"{name}: expected pictures (PIL, tensors [3, H, W] or arrays [H, W, 3]), got {got}")
    tensor = picture.float() if picture.is_floating_point() else picture.float() / 255
    if not (tensor.min() >= 0 and tensor.max() <= 1):
        raise ValueError(f"{name}: expected values from 0 to 1, got {tensor.min():.3g} to {tensor.max():.3g}")
    return tensor
