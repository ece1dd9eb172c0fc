"""A small Stable Diffusion that ships with the package, and the labelled scenes that it was trained on."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .quiet import quiet_libraries

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

FOLDER = Path(__file__).parent / "weights"


def load(dtype: torch.dtype = torch.float32) -> "StableDiffusionPipeline":
    """Load the embedded model as a StableDiffusionPipeline.

    Its pictures have 128x128 pixels, its latents 4x32x32 values, and it predicts v. Loading prints nothing.

    Args:
        dtype: of the networks.

    Raises:
        FileNotFoundError: the package has no weights.

    >>> load().unet.config.sample_size
    32
    """
    if not (FOLDER / "model_index.json").exists():
        advice = "reinstall, or run python -m qalign.embedded.train"
        raise FileNotFoundError(f"embedded model: expected weights in {FOLDER}, got none; {advice}")
    with quiet_libraries():
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True, safety_checker=None)
        pipe = pipe.to(dtype)  # the argument of from_pretrained has changed its name between versions
    pipe.set_progress_bar_config(disable=None)
    return pipe
