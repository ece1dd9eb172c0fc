"""AnchorAlign: the structure scaled and moved so that its object stands where, and as tall as, the appearance's does."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def anchor_align(
    structure: Tensor,
    structure_box: Sequence[float],
    appearance_box: Sequence[float],
    *,
    size: tuple[int, int] | None = None,
    fill: float | None = None,
    nearest: bool = False,
) -> Tensor:
    """Draw the structure on a canvas of the appearance's.

    s = h_a / h_s, the heights of the boxes; t = P_a - s P_s, P the middle of a box's bottom edge; Ĩ(x) = I_s((x - t) / s)

    >>> aligned = anchor_align(structure, object_box(structure_mask), object_box(appearance_mask), size=appearance.shape[-2:])

    Args:
        structure: I_s [C, h, w], floats; label maps with `nearest`.
        structure_box, appearance_box: (left, top, right, bottom) in pixels, edges and not centres: pixel i reaches from i to i + 1.
        size: (height, width) of the canvas, the appearance's; None: the structure's.
        fill: what the canvas has outside of the structure; None: its nearest pixel.
        nearest: take the nearest pixel; otherwise between pixels, bilinearly. Pixels are not averaged where s is well below 1.

    Returns:
        [C, height, width].
    Raises:
        ValueError: a bad argument, named.
    Source: SeAl (CVPR 2026), from a summary; the canvas's size and what fills it are inferred. There the boxes come from a segmentation model.
    """
    if structure.ndim != 3 or not structure.is_floating_point():
        raise ValueError(
            f"structure: expected floats [C, h, w], got {structure.dtype} {list(structure.shape)}"
        )
    left, top, right, bottom = _box(structure_box, "structure_box")
    left_a, top_a, right_a, bottom_a = _box(appearance_box, "appearance_box")
    scale = (bottom_a - top_a) / (bottom - top)
    across, down = (left_a + right_a) / 2 - scale * (left + right) / 2, bottom_a - scale * bottom
    height, width = structure.shape[-2:]
    rows, columns = size or (height, width)
    y, x = (
        (torch.arange(n, dtype=torch.float64) + 0.5 - moved) / scale
        for n, moved in ((rows, down), (columns, across))
    )
    outside = ((y < 0) | (y > height))[:, None] | ((x < 0) | (x > width))
    grid = torch.stack(torch.meshgrid(2 * y / height - 1, 2 * x / width - 1, indexing="ij")[::-1], dim=-1).to(
        structure
    )
    mode = "nearest" if nearest else "bilinear"
    drawn = F.grid_sample(structure[None], grid[None], mode=mode, padding_mode="border", align_corners=False)[
        0
    ]
    return drawn if fill is None else torch.where(outside.to(drawn.device), fill, drawn)


def object_box(mask: Tensor) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) around a mask, bool [h, w], for `anchor_align`.

    Raises:
        ValueError: nothing is in the mask.
    """
    if mask.ndim != 2 or mask.dtype != torch.bool or not mask.any():
        raise ValueError(
            f"mask: expected bool [h, w] with something in it, got {mask.dtype} {list(mask.shape)} with {int(mask.sum())}"
        )
    rows, columns = (mask.any(1 - axis).nonzero() for axis in (0, 1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _box(box: Sequence[float], name: str) -> tuple[float, float, float, float]:
    sides = tuple(float(side) for side in box)
    if len(sides) != 4 or not (sides[0] < sides[2] and sides[1] < sides[3]):
        raise ValueError(
            f"{name}: expected (left, top, right, bottom) with left < right and top < bottom, got {tuple(box)!r}"
        )
    return sides
