"""Swap guidance against the numbers of ALGORITHMS.md 2.3."""

import pytest
import torch

from qalign.guidance import swap_guided, swap_scales


def test_68_steps_have_the_published_scales() -> None:
    scales = swap_scales(68)
    assert scales.dtype == torch.float32 and scales.shape == (68,)
    assert scales[:10].tolist() == [1.0] * 10
    assert scales[10:].tolist() == pytest.approx([3.5 - 1.75 * i / 67 for i in range(10, 68)])
    assert scales[-1] == 1.75


@pytest.mark.parametrize("steps, first", [(1, 1), (6, 1), (7, 2), (34, 5), (68, 10), (100, 15), (136, 20), (680, 100)])
def test_guidance_starts_at_the_same_fraction(steps, first) -> None:
    scales = swap_scales(steps)
    assert (scales[:first] == 1).all() and (scales[first:] > 1).all()


def test_rounding_does_not_move_the_start() -> None:
    for steps in (100, 300):
        for first in range(1, steps):  # 0.07 * 100 is more than 7
            assert int((swap_scales(steps, start=first / steps) == 1).sum()) == first


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, -2.0])
def test_a_scale_of_one_or_less_is_no_guidance(scale) -> None:
    assert swap_scales(20, scale, start=0).tolist() == [1.0] * 20


def test_the_ramp_ends_at_half_the_scale_but_not_below_one() -> None:
    assert swap_scales(5, 8.0, start=0).tolist() == [8, 7, 6, 5, 4]
    assert swap_scales(5, 1.5, start=0).tolist() == [1.5, 1.375, 1.25, 1.125, 1.0]
    assert swap_scales(0).tolist() == []


def test_guided_is_a_line_through_both_predictions() -> None:
    plain, swapped = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(swap_guided(plain, swapped, 0), plain)
    torch.testing.assert_close(swap_guided(plain, swapped, 1), swapped)
    torch.testing.assert_close(swap_guided(plain, swapped, 3.5), 3.5 * swapped - 2.5 * plain)
    assert torch.equal(swap_guided(plain, plain, 3.5), plain)
    assert torch.equal(swap_guided(plain, swapped, torch.tensor(2.0)), swap_guided(plain, swapped, 2.0))


def test_bad_steps_are_named() -> None:
    for steps in (-1, 2.5):
        with pytest.raises(ValueError, match="^steps: expected an integer of at least 0, got"):
            swap_scales(steps)
