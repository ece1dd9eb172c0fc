"""Regions of an appearance and a structure from the UNet's own attention."""

from typing import Any

import torch
from torch import Tensor

from ..context.regions import Regions
from ..sampling.attention_maps import MapCollector
from ..sampling.denoising import ddim_scheduler
from ..sampling.object_masks import default_noun, noun_tokens, object_masks, object_regions
from .arguments import check_noun, one_prompt
from .base import LatentDiffusion
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
        """Segment two pictures into object and background by the UNet's own attention.

        Both latents are noised to three timesteps, with the same noise in every call. Attention maps are
        averaged over timesteps, layers and heads. k-means with k = 5 on the rows of the self-attention
        clusters the tokens of each picture. A cluster is object if the prompt's noun scores above 0.35 in
        it. The noun is what corresponds between the pictures; parts within the object have no common name.

        Args:
            appearance: one picture, as in `__call__`.
            structure: one picture.
            prompt: what both pictures show.
            noun: the word of the prompt for the object. None guesses it.
            height: in pixels, a multiple of 8. None is the structure's.
            width: the same across.

        Returns:
            label maps on the latents' grid: 1 is the object, 0 the background. Both maps are 0, which
            restricts nothing, if a picture has no cluster of the object or no other one.

        Raises:
            TypeError: a picture is of the wrong type.
            ValueError: an argument is invalid, or the prompt names no object.

        Example:
            >>> from qalign import AppearanceTransferPipeline, QAlign, attach
            >>> tool = AppearanceTransferPipeline.from_pipe(pipe)
            >>> regions = tool.self_regions(appearance, structure, prompt)
            >>> regions.structure.shape
            torch.Size([16, 16])
            >>> with attach(pipe, QAlign(), regions=regions):
            ...     images = pipe([prompt] * 3, latents=latents, num_inference_steps=50).images

        Notes:
            The result is deterministic. k-means needs scikit-learn.

        Source: self-segmentation, arXiv 2303.11306, which averages over the steps of a generation.
        """
        prompt = one_prompt(prompt)
        check_noun(noun)
        ddim_scheduler(self.scheduler)
        self._check_unet()
        pictures = stack_pictures(appearance, structure, height, width)
        places = self._object(prompt, noun, len(pictures) - 1)
        found = self._segment(self.encode(pictures), prompt, places)
        self.maybe_free_model_hooks()
        return found

    def _noun_tokens(self: Any, prompt: str, noun: str | None) -> tuple[int, ...]:
        def places(tokenizer: Any) -> tuple[int, ...]:
            word = noun or default_noun(prompt, tokenizer)
            return noun_tokens(tokenizer, prompt, word) if word else ()

        return self._same_tokens(places)

    def _object(self: Any, prompt: str, noun: str | None, structures: int) -> tuple[int, ...]:
        """The places of the object's noun, for regions of one structure."""
        if structures != 1:
            raise ValueError(f"regions: expected one structure with {SELF!r}, got {structures}")
        places = self._noun_tokens(prompt, noun)
        if not places:
            got = f"none, and the prompt {prompt!r}"
            raise ValueError(f"noun: expected a word of the prompt with regions={SELF!r}, got {got}")
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
