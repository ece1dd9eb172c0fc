"""AnchorAlign on exact cases: whole scales and shifts, its formula point by point, and boxes."""

import pytest
import torch

from qalign.sampling.anchor_align import anchor_align, object_box

PICTURE = torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(0))


def literal(structure, box, other, size):
    """Ĩ(x) = I((x - t) / s), pixel centres at halves, bilinear, the nearest pixel outside."""
    (left, top, right, bottom), (left_a, top_a, right_a, bottom_a) = box, other
    s = (bottom_a - top_a) / (bottom - top)
    tx, ty = (left_a + right_a) / 2 - s * (left + right) / 2, bottom_a - s * bottom
    result = torch.empty(len(structure), *size)
    height, width = structure.shape[1:]
    for i in range(size[0]):
        for j in range(size[1]):
            y = min(max((i + 0.5 - ty) / s - 0.5, 0), height - 1)
            x = min(max((j + 0.5 - tx) / s - 0.5, 0), width - 1)
            low, left_of = int(y), int(x)
            below, beside = min(low + 1, height - 1), min(left_of + 1, width - 1)
            fy, fx = y - low, x - left_of
            upper = structure[:, low, left_of] * (1 - fx) + structure[:, low, beside] * fx
            lower = structure[:, below, left_of] * (1 - fx) + structure[:, below, beside] * fx
            result[:, i, j] = upper * (1 - fy) + lower * fy
    return result


@pytest.mark.parametrize(
    ("box", "other", "size"),
    [
        ((2, 3, 9, 10), (2, 3, 9, 10), (12, 16)),
        ((2, 3, 9, 10), (1, 0, 5, 11), (15, 11)),
        ((1.5, 2, 6, 11.25), (4, 3.5, 12, 9), (20, 24)),
        ((0, 0, 16, 12), (30, 4, 34, 7), (9, 40)),
    ],
)
def test_it_is_the_formula(box, other, size) -> None:
    torch.testing.assert_close(
        anchor_align(PICTURE, box, other, size=size), literal(PICTURE, box, other, size), rtol=0, atol=2e-5
    )


def test_equal_boxes_change_nothing() -> None:
    torch.testing.assert_close(
        anchor_align(PICTURE, (3, 2, 9, 11), (3, 2, 9, 11)), PICTURE, rtol=0, atol=2e-6
    )


def test_equal_height_box_moves_by_bottom_centre() -> None:
    moved = anchor_align(PICTURE, (2, 1, 6, 8), (3, 4, 9, 11), fill=0.0)  # two right, three down
    expected = torch.zeros_like(PICTURE)
    expected[:, 3:, 2:] = PICTURE[:, :9, :14]
    torch.testing.assert_close(moved, expected, rtol=0, atol=2e-6)


def test_twice_the_height_doubles_every_pixel() -> None:
    doubled = anchor_align(PICTURE, (0, 0, 16, 12), (0, 0, 32, 24), size=(24, 32), nearest=True)
    assert torch.equal(doubled, PICTURE.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_object_takes_the_appearances_height_and_place() -> None:
    mask, other = torch.zeros(40, 40, dtype=torch.bool), torch.zeros(60, 50, dtype=torch.bool)
    mask[10:20, 5:25] = True  # 20 wide, 10 tall
    other[12:42, 20:30] = True  # 10 wide, 30 tall
    aligned = anchor_align(
        mask[None].float(), object_box(mask), object_box(other), size=(60, 50), nearest=True, fill=0.0
    )[0].bool()
    assert object_box(aligned) == (0, 12, 50, 42)  # 60 wide around 25, cut by the canvas
    narrow = anchor_align(
        mask[None].float(), object_box(mask), object_box(other), size=(60, 90), nearest=True, fill=0.0
    )[0].bool()
    assert object_box(narrow) == (0, 12, 55, 42) and narrow.sum() == 55 * 30


def test_boxes_and_pictures_are_named_when_refused() -> None:
    expected = (
        r"structure_box: expected \(left, top, right, bottom\) with left < right .*, got \(3, 2, 3, 5\)"
    )
    with pytest.raises(ValueError, match=expected):
        anchor_align(PICTURE, (3, 2, 3, 5), (0, 0, 1, 1))
    with pytest.raises(ValueError, match="appearance_box: expected"):
        anchor_align(PICTURE, (0, 0, 1, 1), (0, 0, 1))
    with pytest.raises(
        ValueError, match=r"structure: expected floats \[C, h, w\], got torch.float32 \[12, 16\]"
    ):
        anchor_align(PICTURE[0], (0, 0, 1, 1), (0, 0, 1, 1))
    with pytest.raises(
        ValueError, match=r"mask: expected bool \[h, w\] with a pixel inside, got torch.bool \[4, 4\] with 0"
    ):
        object_box(torch.zeros(4, 4, dtype=torch.bool))
