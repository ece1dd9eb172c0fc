"""Methods on grids of any sides: none is taken for a square, and a single token gives no NaN."""

import pytest
import torch

from qalign import BatchLayout, DreamMatcher, FeatureBank, Regions, Site, attach
from qalign.context.adain import token_adain
from qalign.methods import TRANSFERS
from qalign.methods.ctrl_x import _normalised
from tests.processors.models import make_unet


def run(unet, method, size: tuple[int, int], layers=None, **options) -> torch.Tensor:
    """Three steps under a method, with seeded latents of this size."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, *size, generator=generator)
    text = torch.randn(3, 7, 32, generator=generator)
    with torch.no_grad(), attach(unet, method, layers=layers, **options) as control:
        for timestep in control.track(torch.tensor([900, 700, 500])):
            output = unet(latents, timestep, encoder_hidden_states=text).sample
    return output


@pytest.mark.parametrize("size", [(8, 32), (16, 16), (12, 20), (9, 13)])
def test_dream_matcher_takes_the_latents_size(size: tuple[int, int]) -> None:
    unet = make_unet("sd15")
    expected = run(unet, DreamMatcher(size=size), size)
    for method in (DreamMatcher(), DreamMatcher(size=(16, 16))):
        assert torch.equal(run(unet, method, size), expected)


def test_without_a_size_nothing_is_assumed() -> None:
    """Sixteen tokens may be 4 x 4 or 2 x 8: the result differs, so the grid is asked for."""
    q, k, v = torch.randn(3, 3, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    site = Site(BatchLayout("output", "appearance", "structure"))
    found = [DreamMatcher(size=size).attend(q, k, v, site) for size in ((4, 4), (2, 8))]
    assert not torch.equal(*found)
    with pytest.raises(ValueError, match="^size: expected .* outside of attach, got None for 16 tokens$"):
        DreamMatcher().attend(q, k, v, site)


@pytest.mark.parametrize("method", TRANSFERS)
def test_a_single_token_gives_no_nan(method: str) -> None:
    unet = make_unet("sd15")  # its deepest layers then have one token
    assert run(unet, TRANSFERS[method](), (8, 8), steps=(0, 1)).isfinite().all()
    layers = None if method == "ctrl_x" else "mid"
    assert run(unet, TRANSFERS[method](), (8, 8), layers=layers, steps=(0, 1)).isfinite().all()


def test_one_token_has_no_deviation() -> None:
    x, one, more = torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4), torch.randn(2, 3, 5, 4)
    assert torch.equal(token_adain(x, more), x) and torch.equal(token_adain(more, one), more)
    assert torch.equal(_normalised(x), torch.zeros_like(x))
    assert torch.equal(_normalised(more * 0 + 3), torch.zeros_like(more))
    torch.testing.assert_close(_normalised(more), (more - more.mean(-2, True)) / more.std(-2, keepdim=True))


def test_a_bank_serves_dream_matcher_any_size() -> None:
    unet, size = make_unet("sd15"), (8, 32)
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(3, 4, *size, generator=generator), torch.randn(3, 7, 32, generator=generator)
    bank, steps = FeatureBank("appearance"), torch.tensor([900, 700, 500])
    expected = run(unet, DreamMatcher(), size)
    with torch.no_grad():
        for rows, method in (([1], bank.record(DreamMatcher())), ([0], bank.serve(DreamMatcher()))):
            with attach(unet, method, layout=BatchLayout("output", guidance=False)) as control:
                for timestep in control.track(steps):
                    found = unet(latents[rows], timestep, encoder_hidden_states=text[rows]).sample
    torch.testing.assert_close(found, expected[:1], rtol=1e-4, atol=1e-4)


def test_labels_still_tell_the_grid_without_attach() -> None:
    q, k, v = torch.randn(3, 3, 2, 32, 8, generator=torch.Generator().manual_seed(0))
    site = Site(
        BatchLayout("output", "appearance", "structure"),
        regions=Regions(structure=torch.ones(4, 8, dtype=torch.int64)),
    )
    assert torch.equal(DreamMatcher().attend(q, k, v, site), DreamMatcher(size=(8, 4)).attend(q, k, v, site))
