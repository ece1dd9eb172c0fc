"""Latent AdaIN: the statistics, the tokens they are of, and the conventions."""

import pytest
import torch

from qalign.context.adain import adain

EPS = 1e-5


def make_latents(
    rows: int = 3, seed: int = 0, size: tuple[int, int] = (8, 12), dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = 0.5 + torch.rand(rows, 4, 1, 1, generator=generator, dtype=dtype)
    centre = torch.randn(rows, 4, 1, 1, generator=generator, dtype=dtype)
    return centre + spread * torch.randn(rows, 4, *size, generator=generator, dtype=dtype)


def make_mask(rows: int = 3, seed: int = 9, size: tuple[int, int] = (8, 12)) -> torch.Tensor:
    return torch.rand(rows, *size, generator=torch.Generator().manual_seed(seed)) < 0.4


def literal(content, style, content_mask=None, style_mask=None):
    """2.4 for one row and one channel at a time."""
    result = content.clone()
    for row in range(content.shape[0]):
        for channel in range(content.shape[1]):
            x, y = content[row, channel], style[row, channel]
            inside = x.flatten() if content_mask is None else x[content_mask[row]]
            model = y.flatten() if style_mask is None else y[style_mask[row]]
            normalised = (x - inside.mean()) / (inside.var() + EPS).sqrt() * (
                model.var() + EPS
            ).sqrt() + model.mean()
            m = 1.0 if content_mask is None else content_mask[row].double()
            result[row, channel] = x * (1 - m) + normalised * m
    return result


@pytest.mark.parametrize("content_masked", [False, True])
@pytest.mark.parametrize("style_masked", [False, True])
def test_is_the_formula(content_masked, style_masked) -> None:
    content, style = make_latents(), make_latents(seed=1, size=(6, 6))
    inside = make_mask() if content_masked else None
    model = make_mask(size=(6, 6)) if style_masked else None
    actual = adain(content, style, content_mask=inside, style_mask=model)
    torch.testing.assert_close(actual, literal(content, style, inside, model), rtol=1e-10, atol=1e-10)


def test_style_statistics_inside_the_mask_content_statistics_outside() -> None:
    content, style, inside, model = make_latents(), make_latents(seed=1), make_mask(), make_mask(seed=10)
    result = adain(content, style, content_mask=inside, style_mask=model, eps=0)
    for row in range(3):
        changed, wanted = result[row][:, inside[row]], style[row][:, model[row]]
        torch.testing.assert_close(changed.mean(1), wanted.mean(1))
        torch.testing.assert_close(changed.std(1), wanted.std(1))  # both unbiased
        assert torch.equal(result[row][:, ~inside[row]], content[row][:, ~inside[row]])


def test_variance_is_unbiased_with_eps_added() -> None:
    content = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2).double()  # unbiased variance 2, biased 1
    style = torch.tensor([10.0, 10.0, 10.0]).view(1, 1, 1, 3).double()  # variance 0
    result = adain(content, style, eps=0.5)
    shift = (0.5 / 2.5) ** 0.5
    torch.testing.assert_close(result.flatten(), torch.tensor([10 - shift, 10 + shift]).double())
    result = adain(
        content, torch.tensor([0.0, 4.0, 8.0]).view(1, 1, 1, 3).double(), eps=0.0
    )  # variance 16, biased 32/3
    torch.testing.assert_close(result.flatten(), torch.tensor([4 - 8**0.5, 4 + 8**0.5]).double())


def test_adain_to_itself_is_identity_and_idempotent() -> None:
    content, style = make_latents(), make_latents(seed=1)
    torch.testing.assert_close(adain(content, content), content)
    once = adain(content, style, eps=0)
    torch.testing.assert_close(adain(once, style, eps=0), once)


def test_rows_share_one_style_and_one_mask() -> None:
    content, style, inside, model = (
        make_latents(),
        make_latents(1, seed=1),
        make_mask(1),
        make_mask(1, seed=10),
    )
    shared = adain(content, style, content_mask=inside, style_mask=model)
    apart = adain(
        content,
        style.expand(3, -1, -1, -1),
        content_mask=inside.expand(3, -1, -1),
        style_mask=model.expand(3, -1, -1),
    )
    assert torch.equal(shared, apart)
    torch.testing.assert_close(shared[1:2], adain(content[1:2], style, content_mask=inside, style_mask=model))


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("which", ["content_mask", "style_mask"])
def test_a_row_whose_mask_has_no_variance_stays(which, count) -> None:
    content, style = make_latents(), make_latents(seed=1)
    mask = make_mask()
    mask[1] = False
    mask[1].view(-1)[:count] = True
    result = adain(content, style, **{which: mask})
    assert torch.equal(result[1], content[1])
    for row in (0, 2):
        alone = {which: mask[row : row + 1]}
        torch.testing.assert_close(
            result[row], adain(content[row : row + 1], style[row : row + 1], **alone)[0]
        )
        assert not torch.allclose(result[row], content[row])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded(dtype) -> None:
    content, style, mask = (1000 + make_latents()).to(dtype), make_latents(seed=1).to(dtype), make_mask()
    actual = adain(content, style, content_mask=mask)
    assert actual.dtype == dtype
    assert torch.equal(actual, adain(content.float(), style.float(), content_mask=mask).to(dtype))


def test_wrong_shapes_and_dtypes_are_named() -> None:
    content, mask = make_latents(), make_mask()
    for style in (make_latents(2), content[:, :3], content[0]):
        with pytest.raises(
            ValueError,
            match=r"^style: expected \[3 or 1, C, h, w\] with the channels of content \[3, 4, 8, 12\], got",
        ):
            adain(content, style)
    for wrong in (mask.float(), mask[:2], mask.unsqueeze(1), mask[:, :4]):
        with pytest.raises(ValueError, match=r"^content_mask: expected bool \[3 or 1, 8, 12\], got"):
            adain(content, content, content_mask=wrong)
    with pytest.raises(ValueError, match=r"^style_mask: expected bool \[1 or 1, 8, 12\], got"):
        adain(content, content[:1], style_mask=mask)
