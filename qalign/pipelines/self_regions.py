"""Regions of an appearance and a structure from the UNet's own attention."""

from typing import Any

import torch
from torch import Tensor

from ..context.regions import Regions
from ..sampling.attention_maps import MapCollector
from ..sampling.object_masks import default_noun, noun_tokens, object_masks, object_regions
from .base import LatentDiffusion
from .pair_inversion import ddim_scheduler
from .transfer_inputs import stack_pictures

SELF = "self"  # the value of `regions` that selects these
SEGMENTED_AT = (0.2, 0.4, 0.6)  # timesteps, as fractions of those of training


class SelfRegions(LatentDiffusion):
    """The segmentation of pictures as a mixin before a Stable Diffusion pipeline."""

    @torch.no_grad()
    def self_regions(
        self: Any,
        appearance: Any,
        structure: Any,
        prompt: str,
        *,
        noun: str | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Regions:
        """Object and background of two pictures, from the UNet's own attention: label maps of 1 and 0 on the latents' grid.

        >>> with attach(pipe, QAlign(), regions=pipe.self_regions(appearance, structure, "a photo of a zebra")):
        ...     images = pipe([prompt] * 3, latents=latents).images

        Both latents are noised to three timesteps, with the same noise in every call. Over these, layers and heads attention maps are averaged;
        k-means with k = 5 on the rows of the self-attention clusters each picture's tokens, and a cluster is object where the prompt's noun is
        attended with a score above 0.35. That name is what corresponds between the pictures: clusters within the object have none that they share.
        Where a picture has no cluster of the object, or no other one, nothing is restricted: both maps are 0.

        Arguments as `__call__`, with one structure.

        Raises:
            ValueError: as `__call__`, or the prompt names no object.
        Source: self-segmentation, arXiv 2303.11306, which averages over the steps of a generation.
        """
        pictures = stack_pictures(appearance, structure, height, width)
        places = self._object(prompt, noun, len(pictures) - 1)
        found = self._segment(self.encode(pictures), prompt, places)
        self.maybe_free_model_hooks()
        return found

    def _noun_tokens(self: Any, prompt: str, noun: str | None) -> tuple[int, ...]:
        word = noun or default_noun(prompt)
        return noun_tokens(self.tokenizer, prompt, word) if word else ()

    def _object(self: Any, prompt: str, noun: str | None, structures: int) -> tuple[int, ...]:
        """The places of the object's noun, for regions of one structure."""
        if structures != 1:
            raise ValueError(f"regions: expected one structure with {SELF!r}, got {structures}")
        places = self._noun_tokens(prompt, noun)
        if not places:
            raise ValueError(
                f"noun: expected a word of the prompt with regions={SELF!r}, got none, and the prompt {prompt!r}"
            )
        return places

    def _segment(self: Any, clean: Tensor, prompt: str, places: tuple[int, ...]) -> Regions:
        """Regions of [appearance, structure], from their clean latents."""
        condition = self.conditions(prompt, *self._size(clean))[0]
        scheduler, generator = ddim_scheduler(self.scheduler), torch.Generator().manual_seed(0)
        with MapCollector(self, average=True) as collector:
            for fraction in SEGMENTED_AT:
                timestep = torch.tensor(round(fraction * scheduler.config.num_train_timesteps))
                noise = torch.randn(clean.shape, generator=generator).to(clean)
                self.predict(
                    scheduler.add_noise(clean, noise, timestep.expand(len(clean))), timestep, condition
                )
        return object_regions(object_masks(collector.maps(), places, rule="absolute"))
