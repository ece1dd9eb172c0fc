"""Fixtures that the tests of the pipelines share."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qalign.sampling.inversion import Inversion


@pytest.fixture(scope="module")
def small():
    """A pipeline with a UNet of one block; tests leave it as it was."""
    from tests.pipelines.transfers import make

    return make()


@pytest.fixture(scope="module")
def pair(small) -> "Inversion":
    """The inversion of `transfer`'s default pair; a transfer with it only denoises."""
    from tests.pipelines.transfers import PROMPT, pictures, seeded

    return small.invert(
        pictures(1)[0], pictures(1, seed=1), PROMPT, num_inference_steps=6, generator=seeded()
    )
