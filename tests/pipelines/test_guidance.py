"""Swap guidance and Delta-Bridge against the numbers and formulas of ALGORITHMS.md 2.3 and 10.7."""

import pytest
import torch

from qalign.sampling.guidance import delta_bridge, delta_bridge_strengths, low_pass, swap_guided, swap_scales


def test_68_steps_have_the_published_scales() -> None:
    scales = swap_scales(68)
    assert scales.dtype == torch.float32 and scales.shape == (68,)
    assert scales[:10].tolist() == [1.0] * 10
    assert scales[10:].tolist() == pytest.approx([3.5 - 1.75 * i / 67 for i in range(10, 68)])
    assert scales[-1] == 1.75


@pytest.mark.parametrize(
    "steps, first", [(1, 1), (6, 1), (7, 2), (34, 5), (68, 10), (100, 15), (136, 20), (680, 100)]
)
def test_guidance_starts_at_the_same_fraction(steps, first) -> None:
    scales = swap_scales(steps)
    assert (scales[:first] == 1).all() and (scales[first:] > 1).all()


def test_rounding_does_not_move_the_start() -> None:
    for steps in (100, 300):
        for first in range(1, steps):  # 0.07 * 100 is more than 7
            assert int((swap_scales(steps, start=first / steps) == 1).sum()) == first


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, -2.0])
def test_scale_up_to_one_is_no_guidance(scale) -> None:
    assert swap_scales(20, scale, start=0).tolist() == [1.0] * 20


def test_ramp_ends_at_half_scale_above_one() -> None:
    assert swap_scales(5, 8.0, start=0).tolist() == [8, 7, 6, 5, 4]
    assert swap_scales(5, 1.5, start=0).tolist() == [1.5, 1.375, 1.25, 1.125, 1.0]
    assert swap_scales(0).tolist() == []


def test_guided_is_a_line_through_both_predictions() -> None:
    plain, swapped = torch.randn(
        2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    assert torch.equal(swap_guided(plain, swapped, 0), plain)
    torch.testing.assert_close(swap_guided(plain, swapped, 1), swapped)
    torch.testing.assert_close(swap_guided(plain, swapped, 3.5), 3.5 * swapped - 2.5 * plain)
    assert torch.equal(swap_guided(plain, plain, 3.5), plain)
    assert torch.equal(swap_guided(plain, swapped, torch.tensor(2.0)), swap_guided(plain, swapped, 2.0))


def test_bad_steps_are_named() -> None:
    for steps in (-1, 2.5):
        with pytest.raises(ValueError, match="^steps: expected an integer of at least 0, got"):
            swap_scales(steps)


def predictions(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 2, 4, 7, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def literal_low_pass(x: torch.Tensor, kernel: int, count: int) -> torch.Tensor:
    for _ in range(count):
        mean, reach = torch.empty_like(x), kernel // 2
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                mean[..., i, j] = x[
                    ..., max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1
                ].mean((-1, -2))
        x = mean
    return x


@pytest.mark.parametrize(("kernel", "count"), [(3, 2), (5, 1), (1, 4), (3, 0)])
def test_delta_bridge_is_its_formula(kernel, count) -> None:
    empty, generated, appearance = predictions()
    difference = (generated - empty) - (appearance - empty)
    expected = empty + 7.5 * (generated - empty) + 0.6 * literal_low_pass(difference, kernel, count)
    torch.testing.assert_close(
        delta_bridge(empty, generated, appearance, 7.5, 0.6, kernel=kernel, count=count), expected
    )


def test_delta_bridge_without_effect_is_plain_guidance() -> None:
    empty, generated, appearance = predictions()
    plain = empty + 7.5 * (generated - empty)
    assert torch.equal(delta_bridge(empty, generated, appearance, 7.5, 0.0), plain)
    assert torch.equal(delta_bridge(empty, generated, generated, 7.5, 0.6), plain)
    assert torch.equal(delta_bridge(empty, generated, appearance, 7.5, torch.tensor(0.0)), plain)


def test_low_pass_keeps_constants_and_smooths() -> None:
    constant = torch.full((1, 2, 5, 6), 0.3)
    torch.testing.assert_close(low_pass(constant, count=3), constant)
    noise = predictions(1)[0]
    assert low_pass(noise).var() < 0.3 * noise.var() and torch.equal(low_pass(noise, kernel=1), noise)


def test_bridge_strength_holds_then_falls_to_zero() -> None:
    assert delta_bridge_strengths(11, 2.0, hold=0.4, end=0.8).tolist() == pytest.approx(
        [2, 2, 2, 2, 2, 1.5, 1, 0.5, 0, 0, 0], abs=1e-6
    )
    assert delta_bridge_strengths(3, 1.0, hold=0.0, end=1.0).tolist() == [1, 0.5, 0]
    assert delta_bridge_strengths(1).tolist() == [1] and delta_bridge_strengths(0).tolist() == []


def test_bad_arguments_of_the_bridge_are_named() -> None:
    for kernel in (0, 2, 1.0):
        with pytest.raises(ValueError, match="^kernel: expected an odd integer of at least 1, got"):
            low_pass(predictions(1)[0], kernel=kernel)
    with pytest.raises(ValueError, match="^count: expected"):
        low_pass(predictions(1)[0], count=-1)
    with pytest.raises(ValueError, match="^hold, end: expected 0 <= hold < end <= 1, got 0.5, 0.5"):
        delta_bridge_strengths(4, hold=0.5, end=0.5)
    with pytest.raises(ValueError, match="^steps: expected"):
        delta_bridge_strengths(-1)
