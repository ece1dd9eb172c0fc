"""Inversion of an appearance and its structures, with a cache on disk."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require_uninterrupted
from ..processors.attach import find_unet
from ..processors.unet import UNetAttnProcessor
from ..sampling.denoising import ddim_scheduler
from ..sampling.freeu import cross_image_freeu
from ..sampling.inversion import Inversion, invert_ddim, invert_ddpm
from ..sampling.inversion_cache import InversionCache, digest
from .arguments import check_generator, one_prompt, require_folder
from .base import LatentDiffusion
from .transfer_inputs import Generators, check_inversion, make_generators, stack_pictures


class PairInversion(LatentDiffusion):
    """The inversion of pictures as a mixin before a Stable Diffusion pipeline."""

    @torch.no_grad()
    def invert(
        self: Any,
        appearance: Any,
        structure: Any,
        prompt: str = "",
        *,
        num_inference_steps: int = 100,
        inversion: str = "ddpm",
        inversion_guidance_scale: float = 3.5,
        freeu: bool = False,
        cache: str | Path | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
    ) -> Inversion:
        """Invert an appearance and its structures, once for several transfers of the same pictures.

        Args:
            appearance: one picture: PIL, a tensor [3, H, W] or an array [H, W, 3], floats in [0, 1] or
                bytes.
            structure: one or several pictures.
            prompt: what all of the pictures show.
            num_inference_steps: T.
            inversion: "ddpm" is edit-friendly, "ddim" is deterministic.
            inversion_guidance_scale: of classifier-free guidance.
            freeu: run Cross-Image's FreeU, `qalign.sampling.freeu`.
            cache: a folder for inversions, one file for each picture with its settings and noise. None
                keeps none.
            height: of the pictures in pixels, a multiple of 8. None is the first structure's. Pictures of
                other sizes are scaled to cover it, and their middle is cut out.
            width: the same across.
            generator: of the noise: one, or a list with one for each of [appearance, structures...]. None
                draws new noise, unless the cache has the pictures.

        Returns:
            an `Inversion` with rows [appearance, structures...].

        Raises:
            TypeError: an argument is of the wrong type; the message names it.
            ValueError: an argument is invalid; the message names it.
            FloatingPointError: latents or predictions are NaN or infinite.
            RuntimeError: `pipe._interrupt = True` ended the inversion early.

        Example:
            >>> from qalign import AppearanceTransferPipeline
            >>> pipe = AppearanceTransferPipeline.from_pipe(pipe)
            >>> pipe.invert(appearance, structure, prompt, num_inference_steps=2).latents.shape
            torch.Size([3, 2, 4, 16, 16])

        Notes:
            One generator gives all structures the same noise. The result is deterministic for a given
            generator.

        Source: "ddpm", arXiv 2304.06140; "ddim", arXiv 2010.02502.
        """
        self._interrupt = False
        return self._invert(
            stack_pictures(appearance, structure, height, width),
            prompt,
            num_inference_steps=num_inference_steps,
            inversion=inversion,
            guidance_scale=inversion_guidance_scale,
            freeu=freeu,
            cache=cache,
            generator=generator,
        )

    def _invert(
        self: Any,
        pictures: Tensor,
        prompt: str,
        *,
        num_inference_steps: int,
        inversion: str,
        guidance_scale: float,
        freeu: bool,
        cache: str | Path | None,
        generator: Generators,
    ) -> Inversion:
        """The inversion of pictures [1 + n, 3, H, W], from the cache where it has them."""
        prompt, scheduler = one_prompt(prompt), ddim_scheduler(self.scheduler)
        check_inversion(inversion, num_inference_steps, guidance_scale, freeu, scheduler)
        check_generator(generator, several=True)
        generators = make_generators(generator, len(pictures))
        require_folder(cache)
        self._check_unet()
        clean = self.encode(pictures)
        condition, unconditional = self.conditions(prompt, *pictures.shape[-2:])
        keys = [""] * len(pictures)
        if cache is not None:
            noise = [
                each.get_state() if generator is not None and inversion == "ddpm" else None
                for each in generators
            ]
            settings = [num_inference_steps, inversion, guidance_scale, freeu]
            shared = digest(
                settings,
                dict(scheduler.config),
                scheduler.alphas_cumprod,
                scheduler.final_alpha_cumprod,
                condition,
                unconditional,
                _require_plain(find_unet(self)),
            )
            keys = [digest(shared, row, state) for row, state in zip(clean, noise)]

        def make(rows: list[int]) -> Inversion:
            guided = self._guided(condition, unconditional, guidance_scale)

            def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
                require_uninterrupted(self, "the inversion")
                return guided(latents, timesteps)

            with self._freeu(freeu), self.progress_bar(total=num_inference_steps) as bar:
                options: dict[str, Any] = {"steps": num_inference_steps, "progress": bar.update}
                if inversion == "ddim":
                    return invert_ddim(predict, scheduler, clean[rows], **options)
                options["generator"] = [generators[row] for row in rows]
                options["batch_size"] = 3 * len(pictures) - 2  # the number of rows in denoising
                return invert_ddpm(predict, scheduler, clean[rows], **options)

        inverted = InversionCache(cache).fill(keys, make)
        self.maybe_free_model_hooks()
        return inverted.to(clean.device)

    def _freeu(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        return cross_image_freeu(self) if wanted else contextlib.nullcontext()


def _require_plain(unet: nn.Module) -> nn.Module:
    """Refuse a UNet that `attach` has changed: the key of an inversion does not cover a method."""
    processors = [getattr(module, "processor", None) for module in unet.modules()]
    methods = [
        type(each.method).__name__
        for each in processors
        if isinstance(each, UNetAttnProcessor) and each.method and "output" in each.layout.roles
    ]
    if methods:
        got = f"{methods[0]} on {len(methods)} layers"
        raise ValueError(f"cache: expected a UNet without an attached method, or None, got {got}")
    return unet
