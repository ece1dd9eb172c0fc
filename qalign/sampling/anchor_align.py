"""AnchorAlign: scale and move the structure until its object matches the appearance's in place and height."""

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
    """Scale and move a structure so that its object stands where the appearance's object stands.

    s = h_a / h_s,  t = P_a - s P_s,  Ĩ(x) = I_s((x - t) / s)

    h is the height of an object's box and P the middle of the box's bottom edge.

    Args:
        structure: I_s, floats [C, h, w].
        structure_box: (left, top, right, bottom) of the structure's object in pixels. These are edges, not
            centres: pixel i reaches from i to i + 1.
        appearance_box: the same of the appearance's object.
        size: (height, width) of the result, the appearance's. None is the size of the structure.
        fill: the value outside of the structure. None repeats the structure's nearest pixel.
        nearest: take the nearest pixel, as label maps need it. False interpolates bilinearly. Pixels are
            not averaged, so an s well below 1 aliases.

    Returns:
        [C, height, width] in the dtype of `structure`.

    Raises:
        ValueError: an argument is invalid; the message names it.

    Example:
        >>> aligned = anchor_align(structure, (8, 8, 24, 24), (4, 16, 12, 32), size=(32, 32))
        >>> aligned.shape
        torch.Size([3, 32, 32])

    Source: SeAl (CVPR 2026), from a summary. The size of the result and its fill are inferred. There the
    boxes come from a segmentation model; `object_box` takes them from a mask.
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
    """Find the box around a mask.

    Args:
        mask: bool [h, w].

    Returns:
        (left, top, right, bottom) in pixels, as `anchor_align` takes it.

    Raises:
        ValueError: `mask` is of another kind, or empty.

    Example:
        >>> mask = torch.zeros(32, 32, dtype=torch.bool)
        >>> mask[8:20, 4:10] = True
        >>> object_box(mask)
        (4, 8, 10, 20)
    """
    if mask.ndim != 2 or mask.dtype != torch.bool or not mask.any():
        got = f"{mask.dtype} {list(mask.shape)} with {int(mask.sum())}"
        raise ValueError(f"mask: expected bool [h, w] with a pixel inside, got {got}")
    rows, columns = (mask.any(1 - axis).nonzero() for axis in (0, 1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _box(box: Sequence[float], name: str) -> tuple[float, float, float, float]:
    sides = tuple(float(side) for side in box)
    if len(sides) != 4 or not (sides[0] < sides[2] and sides[1] < sides[3]):
        expected = "(left, top, right, bottom) with left < right and top < bottom"
        raise ValueError(f"{name}: expected {expected}, got {tuple(box)!r}")
    return sides
