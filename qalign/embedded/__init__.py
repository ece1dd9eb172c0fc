"""A small Stable Diffusion that ships with the package, and the labelled scenes that it was trained on."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .quiet import quiet_libraries

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

FOLDER = Path(__file__).parent / "weights"


def load(dtype: torch.dtype = torch.float32) -> "StableDiffusionPipeline":
    """The embedded model as a StableDiffusionPipeline: 128x128 pictures, 4x32x32 latents, v-prediction.

    Loading it prints nothing.

    Raises:
        FileNotFoundError: the weights are not where the package keeps them.
    """
    if not (FOLDER / "model_index.json").exists():
        raise FileNotFoundError(
            f"embedded model: expected weights in {FOLDER}, got none; reinstall, or run python -m qalign.embedded.train"
        )
    with quiet_libraries():
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True, safety_checker=None)
        pipe = pipe.to(dtype)  # from_pretrained has renamed its argument for it
    pipe.set_progress_bar_config(disable=None)
    return pipe
