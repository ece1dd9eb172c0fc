"""Appearance transfer: a picture with the appearance of one picture and the structure of another."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from .._checks import require_number
from ..context.layout import BatchLayout
from ..context.regions import Regions
from ..methods import Method, QAlign
from ..processors.attach import attach
from ..processors.feature_bank import FeatureBank
from ..sampling.denoising import ddim_scheduler
from ..sampling.guidance import swap_scales
from ..sampling.inversion import Inversion
from .arguments import check_fractions, check_output, one_prompt
from .base import OnStepEnd, StepCallback, XLConditions
from .pair_inversion import PairInversion
from .self_regions import SELF, SelfRegions
from .transfer_inputs import (
    Generators,
    active_steps,
    check_options,
    count_skipped,
    count_structures,
    expect_start,
    make_method,
    stack_pictures,
)
from .transfer_loop import Blend, TransferLoop

_QALIGN = QAlign()


@dataclass
class AppearanceTransferOutput(BaseOutput):
    """Hold the result of an appearance transfer.

    Attributes:
        images: one for each structure, as `output_type` says: a list of PIL images, an array [n, H, W, 3]
            or a tensor [n, C, h, w].
        reconstructions: the appearance and the structures after inversion and denoising, in the same form.
        masks: bool [1 + n, h, w], the object in appearance and structures, as AdaIN used it. None without
            masked AdaIN.
        regions: the regions of the method, given or computed. None is none.
    """

    images: Any
    reconstructions: Any
    masks: Tensor | None = None
    regions: Regions | None = None


class AppearanceTransfer(PairInversion, SelfRegions):
    """Appearance transfer as a mixin before a Stable Diffusion pipeline."""

    @classmethod
    def _kinds(cls) -> tuple[Any, Any]:
        return AppearanceTransferPipeline, AppearanceTransferXLPipeline

    @torch.no_grad()
    def noise_free(
        self: Any,
        method: Method | str,
        inversion: Inversion,
        prompt: str = "",
        *,
        skip: float = 0.32,
        edit_steps: tuple[float, float] | None = None,
        layers: str | Sequence[str] | None = None,
        bank: FeatureBank | None = None,
    ) -> Method:
        """Bind a method to features of the appearance without noise.

        At each timestep the appearance's clean latents go through the UNet, and the method then reads these
        features in place of those of the appearance's row.

        Args:
            method: a method such as `SeAl()`, whose feature cache this is, or its name.
            inversion: from `invert`. Give the same one to the call that follows.
            prompt: as in that call.
            skip: as in that call.
            edit_steps: as in that call.
            layers: as in that call.
            bank: a `FeatureBank("appearance", ...)` for the features. It is cleared first. None makes one
                in the memory of the device.

        Returns:
            a method for `pipe(..., method=..., inversion=inversion)`.

        Raises:
            ValueError: `method` is None, or `bank` is for other roles.

        Example:
            >>> from qalign import AppearanceTransferPipeline, SeAl
            >>> pipe = AppearanceTransferPipeline.from_pipe(pipe)
            >>> known = pipe.invert(appearance, structure, prompt, num_inference_steps=50)
            >>> method = pipe.noise_free(SeAl(), known, prompt)
            >>> pipe(None, None, prompt, method=method, inversion=known, output_type="pt").images.shape
            torch.Size([1, 3, 32, 32])

        Notes:
            `FeatureBank.nbytes` says what the features take.

        Source: SeAl (CVPR 2026); see `FeatureBank.record_clean`.
        """
        prompt = one_prompt(prompt)
        if not isinstance(inversion, Inversion):
            raise TypeError(f"inversion: expected an Inversion, from `invert`, got {inversion!r}")
        self._check_unet()
        found, bank = make_method(method), FeatureBank("appearance") if bank is None else bank
        if found is None or bank.roles != ("appearance",):
            expected = "a method and a bank of the appearance"
            raise ValueError(f"method, bank: expected {expected}, got {method!r}, {bank.roles!r}")
        bank.clear()
        clean, skipped = inversion.latents[-1, :1], count_skipped(skip, len(inversion.timesteps))
        condition = self.conditions(prompt, *self._size(clean))[0]
        clean, steps = clean.to(self._execution_device, self.unet.dtype), active_steps(found, edit_steps)
        served = bank.record_clean(
            self, found, clean, inversion.timesteps[skipped:], layers=layers, steps=steps, **condition
        )
        self.maybe_free_model_hooks()
        return served

    @torch.no_grad()
    def __call__(
        self: Any,
        appearance: Any,
        structure: Any,
        prompt: str = "",
        *,
        method: Method | str | None = _QALIGN,
        num_inference_steps: int = 100,
        skip: float = 0.32,
        inversion: str | Inversion = "ddpm",
        inversion_guidance_scale: float = 3.5,
        swap_guidance_scale: float = 3.5,
        edit_steps: tuple[float, float] | None = None,
        guidance_start: float = 10 / 68,
        adain: str | None = None,
        adain_start: float = 20 / 68,
        noun: str | None = None,
        freeu: bool = False,
        layers: str | Sequence[str] | None = None,
        regions: Regions | str | None = None,
        cache: str | Path | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> AppearanceTransferOutput:
        """Give each structure the appearance of a picture.

        All pictures are inverted with the prompt. The output begins as its structure, at the step that
        `skip` selects. Then the rows [outputs, outputs without the edit, appearance, structures] are
        denoised together, in one UNet call a step, without classifier-free guidance. The fractions
        `edit_steps`, `guidance_start` and `adain_start` are of the steps that run; as published 68 of 100.

        Args:
            appearance: one picture: PIL, a tensor [3, H, W] or an array [H, W, 3], floats in [0, 1] or
                bytes. Ignored with a given `inversion`.
            structure: one or several pictures. Ignored with a given `inversion`.
            prompt: what all of the pictures show.
            method: a method such as `QAlign()`, or its name in `qalign.pipelines.METHODS`. None edits
                nothing.
            num_inference_steps: steps of the inversion. Ignored with a given `inversion`.
            skip: the fraction of the steps that is left out at the noisy end. A larger value keeps more of
                the structure.
            inversion: "ddpm" is edit-friendly, "ddim" is deterministic. Or what `invert` returned for these
                pictures.
            inversion_guidance_scale: of classifier-free guidance in the inversion.
            swap_guidance_scale: γ of plain + γ (edited - plain), at the start; it falls to half of that. 1
                or less is no guidance and saves the rows without the edit.
            edit_steps: (start, stop) of the method. None is the method's own default, or else Cross-Image's
                (11 / 68, 1). A method that reads the structure in some steps counts them from the first
                step that runs.
            guidance_start: the fraction at which swap guidance begins.
            adain: "masked" gives the output's latents the statistics of the appearance's object inside the
                structure's object, as published for Cross-Image. "whole" works without masks. None is no
                AdaIN.
            adain_start: the fraction at which AdaIN begins. The masks are made of that step's attention.
            noun: the word of the prompt for the object. None guesses it with
                `qalign.sampling.object_masks.default_noun`.
            freeu: run Cross-Image's FreeU, `qalign.sampling.freeu`, in inversion and denoising. The
                official FreeU is `pipe.enable_freeu`.
            layers: layers of the method, as `attach` takes them. None is the method's own choice.
            regions: label maps, as `attach` takes them. "self" computes those of `self_regions`, for one
                structure. None is none.
            cache: a folder for inversions, one file for each picture with its settings and noise. None
                keeps none.
            height: of the result in pixels, a multiple of 8. None is the first structure's. Pictures of
                other sizes are scaled to cover the result, and their middle is cut out.
            width: the same across.
            generator: of the inversion's noise. One generator gives all structures the same noise, so a
                result does not depend on the other structures. A list has one for each of [appearance,
                structures...]. None draws new noise, unless the cache has the pictures.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns the tuple (images, reconstructions).
            callback_on_step_end: called after each step with (pipe, i, timestep, {"latents": latents}),
                float32 latents of [outputs, appearance, structures]. Latents in the returned dict replace
                them. `pipe._interrupt = True` ends the loop; during the inversion it is an error, because
                there is no picture yet.
            callback_on_step_end_tensor_inputs: ("latents",) or ().

        Returns:
            an `AppearanceTransferOutput`.

        Raises:
            TypeError: an argument is of the wrong type; the message names it.
            ValueError: an argument is invalid; the message names it.
            FloatingPointError: latents or predictions are NaN or infinite.
            RuntimeError: `pipe._interrupt = True` ended the inversion early.

        Example:
            >>> from qalign import AppearanceTransferPipeline, QAlign
            >>> pipe = AppearanceTransferPipeline.from_pipe(pipe)
            >>> result = pipe(appearance, structure, prompt, method=QAlign(), num_inference_steps=50)
            >>> result.images[0].size, len(result.reconstructions)
            ((32, 32), 2)

        Notes:
            Latents are float32 whatever the dtype of the UNet. A batch has 2n + 1 rows for n structures,
            and 3n + 1 with swap guidance. The result is deterministic for a given generator.

        Source: Cross-Image attention, arXiv 2311.03335; Q-Align, arXiv 2508.21090; inversion,
            arXiv 2304.06140.
        """
        self._interrupt = False
        prompt, method = one_prompt(prompt), make_method(method)
        check_output(output_type, callback_on_step_end_tensor_inputs)
        callback = StepCallback(callback_on_step_end, tuple(callback_on_step_end_tensor_inputs))
        check_options(method, adain, edit_steps, regions, noun, freeu)
        check_fractions(guidance_start=guidance_start, adain_start=adain_start)
        require_number("swap_guidance_scale", swap_guidance_scale)
        self._check_unet()
        if isinstance(inversion, Inversion):
            ddim_scheduler(self.scheduler, inversion.timesteps)
            outputs = count_structures(inversion, self.unet.config.in_channels)
            steps, size = len(inversion.timesteps), [*inversion.latents.shape[-2:]]
        else:
            pictures = stack_pictures(appearance, structure, height, width)
            outputs, steps = len(pictures) - 1, num_inference_steps
            size = [side // self.vae_scale_factor for side in pictures.shape[-2:]]
        skipped = count_skipped(skip, steps)
        guided = method is not None and swap_guidance_scale > 1
        scales = swap_scales(steps - skipped, swap_guidance_scale, start=guidance_start) if guided else None
        control, segmented = None, isinstance(regions, str) and regions == SELF
        if method is not None:
            given: Any = None if segmented else regions
            layout, active = _layout(outputs, guided), active_steps(method, edit_steps)
            control = attach(self, method, layout=layout, layers=layers, steps=active, regions=given)
            control.check((size[0], size[1]))
            control.expect(steps - skipped)
        places = self._object(prompt, noun, outputs) if segmented else ()
        noun_places = self._noun_tokens(prompt, noun) if adain == "masked" else ()
        blend = None
        if adain is not None:
            expect_start("adain", adain_start, steps - skipped)
            blend = Blend(adain, adain_start, noun_places)
        if isinstance(inversion, Inversion):
            known = inversion
        else:
            known = self._invert(
                pictures,
                prompt,
                num_inference_steps=steps,
                inversion=inversion,
                guidance_scale=inversion_guidance_scale,
                freeu=freeu,
                cache=cache,
                generator=generator,
            )

        rows, device = [*range(1, outputs + 1), *range(outputs + 1)], self._execution_device
        if control is not None and segmented:
            control.regions = self._segment(known.latents[-1].to(device), prompt, places)
        loop = TransferLoop(
            pipe=self,
            scheduler=ddim_scheduler(self.scheduler, known.timesteps),
            timesteps=known.timesteps[skipped:],
            noises=None if known.noises is None else known.noises[skipped:, rows].to(device),
            eta=known.eta,
            outputs=outputs,
            condition=self.conditions(prompt, *self._size(known.latents))[0],
            scales=scales,
            blend=blend,
            change=None if method is None else method.change_clean,
        )
        latents = known.latents[skipped, rows].to(device)
        if method is not None:
            latents[:outputs] = method.start(latents[:outputs], latents[outputs : outputs + 1])
        with self._freeu(freeu):
            latents, masks = loop.run(latents, control, callback)
        pictures = self._finished(latents, output_type)
        self.maybe_free_model_hooks()
        images, reconstructions = (
            self.image_processor.postprocess(some, output_type=output_type)
            for some in pictures.split([outputs, outputs + 1])
        )
        result = AppearanceTransferOutput(
            images, reconstructions, masks, None if control is None else control.regions
        )
        both: Any = (images, reconstructions)
        return result if return_dict else both


class AppearanceTransferPipeline(AppearanceTransfer, StableDiffusionPipeline):
    """Transfer appearance with Stable Diffusion.

    `from_pipe` makes one of any pipeline of Stable Diffusion or SDXL, `embedded` makes one on the small
    model of this package. `__call__` transfers, `invert` inverts once for several calls, `self_regions`
    segments.

    Example:
        >>> from qalign import AppearanceTransferPipeline
        >>> pipe = AppearanceTransferPipeline.from_pipe(pipe)
        >>> image = pipe(appearance, structure, prompt, num_inference_steps=50).images[0]
        >>> image.size
        (32, 32)
    """


class AppearanceTransferXLPipeline(XLConditions, AppearanceTransfer, StableDiffusionXLPipeline):
    """Transfer appearance with Stable Diffusion XL. `AppearanceTransferPipeline.from_pipe` makes one."""


def _layout(outputs: int, guided: bool) -> BatchLayout:
    """Rows [outputs, outputs without the edit where guided, appearance, structures]."""
    roles = ["output"] * outputs + ["plain"] * outputs * guided + ["appearance"] + ["structure"] * outputs
    return BatchLayout(*roles, guidance=False)
