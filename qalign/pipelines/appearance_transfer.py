"""Appearance transfer: a picture in the appearance of one and the structure of another, from noise that inversion finds for both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from ..context.layout import BatchLayout
from ..context.regions import Regions
from ..methods import Method, QAlign
from ..processors.attach import attach
from ..processors.feature_bank import FeatureBank
from ..sampling.guidance import swap_scales
from ..sampling.inversion import Inversion
from .base import OnStepEnd, StepCallback, XLConditions
from .pair_inversion import PairInversion, ddim_scheduler
from .self_regions import SELF, SelfRegions
from .transfer_inputs import (
    Generators,
    active_steps,
    check_options,
    count_skipped,
    count_structures,
    find_method,
    stack_pictures,
)
from .transfer_loop import Blend, TransferLoop

_QALIGN = QAlign()


@dataclass
class AppearanceTransferOutput(BaseOutput):
    """What an appearance transfer made.

    Attributes:
        images: one for each structure: a list of PIL images, an array [n, H, W, 3] or a tensor [n, C, h, w], as `output_type` says.
        reconstructions: of the appearance and of the structures, in the same form: what inversion and denoising alone make of them.
        masks: bool [1 + n, h, w], the object in appearance and structures, as AdaIN used it; None without masked AdaIN.
        regions: those that the method had, given or found; None without.
    """

    images: Any
    reconstructions: Any
    masks: Tensor | None = None
    regions: Regions | None = None


class AppearanceTransfer(PairInversion, SelfRegions):
    """Appearance transfer as a mixin before a Stable Diffusion pipeline, whose components and conditioning it uses."""

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
        """The method, reading the features of the appearance's clean latents at each timestep in place of those of its row.

        >>> known = pipe.invert(appearance, structure, prompt)
        >>> image = pipe(None, None, prompt, method=pipe.noise_free(SeAl(), known, prompt), inversion=known).images[0]

        Args:
            method: such as `SeAl()`, whose cache this is, or its name.
            inversion: of the call that follows.
            prompt, skip, edit_steps, layers: as `__call__`, and the same there.
            bank: where the features are kept, `FeatureBank("appearance", ...)`, cleared before; None: on the device.

        Source: SeAl (CVPR 2026); see `FeatureBank.record_clean`.
        """
        found, bank = find_method(method), FeatureBank("appearance") if bank is None else bank
        if found is None or bank.roles != ("appearance",):
            raise ValueError(
                f"method, bank: expected a method and a bank of the appearance, got {method!r}, {bank.roles!r}"
            )
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
        """Give each structure the appearance.

        >>> image = pipe(appearance, structure, "a photo of a zebra", method=QAlign()).images[0]

        All pictures are inverted with guidance by the prompt. Then, from the step that `skip` says, they are denoised together with one
        output for each structure, which starts as the structure: without classifier-free guidance, in one UNet call a step over the rows
        [outputs, outputs without the edit, appearance, structures]. As published: 100 steps, of which 68 run; fractions are of these.

        Args:
            appearance: one picture: PIL, tensor [3, H, W] or array [H, W, 3], floats in [0, 1] or bytes.
            structure: one or several.
            prompt: what all of them show.
            method: such as `QAlign()`, or its name in `qalign.methods.METHODS`; None edits nothing.
            num_inference_steps: of the inversion.
            skip: the fraction of these that is left out at the noisy end; more keeps more of the structure.
            inversion: "ddpm", edit-friendly; "ddim", deterministic; or what `invert` returned for these pictures, which then need not be
                given and whose number of steps counts.
            inversion_guidance_scale: of the prompt against the empty one, at the inversion only.
            swap_guidance_scale: γ of plain + γ (edited - plain), falling to its half; 1 or less is none and saves the rows without edit.
            edit_steps: (start, stop), when the method edits; None is the method's own, or else Cross-Image's (11 / 68, 1). A method's own
                structure steps are counted from the first executed step.
            guidance_start: where swap guidance begins.
            adain: "masked", as published for Cross-Image: the output's latents take the statistics of the appearance's object inside the
                structure's; "whole": without masks; None: not at all.
            adain_start: where that begins, and the step whose attention maps make the masks.
            noun: the word of the prompt that is the object; None is a guess by its grammar. See `qalign.sampling.object_masks.noun_tokens`.
            freeu: `qalign.sampling.freeu` throughout. The official FreeU is `enable_freeu`.
            layers: as `attach`.
            regions: as `attach`; or "self", those of `self_regions`, for one structure.
            cache: a folder for inversions, one file each for a picture with its settings and noise.
            height, width: in pixels, multiples of 8; None is the first structure's. Pictures of another size are scaled to cover this one,
                and their middle is taken.
            generator: of the inversion's noise: one, from which all structures take the same, so that a structure's result does not depend
                on the others; or one for each of [appearance, structures...]. None is new noise, unless any is cached.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False: the tuple (images, reconstructions); type checkers see the output class.
            callback_on_step_end: called with (pipe, i, timestep, {"latents": float32 [outputs, appearance, structures]}) after each step; the
                latents it returns replace them. `pipe._interrupt = True` ends the loop.

        Raises:
            TypeError, ValueError: a bad argument, named. FloatingPointError: NaN or infinity in latents or predictions.
        Source: Cross-Image attention, arXiv 2311.03335; Q-Align, arXiv 2508.21090; inversion, arXiv 2304.06140.
        """
        method = find_method(method)
        check_options(adain, edit_steps, output_type, callback_on_step_end_tensor_inputs)
        if isinstance(inversion, Inversion):
            outputs, steps = count_structures(inversion), len(inversion.timesteps)
        else:
            pictures = stack_pictures(appearance, structure, height, width)
            outputs, steps = len(pictures) - 1, num_inference_steps
        skipped = count_skipped(skip, steps)
        guided = method is not None and swap_guidance_scale > 1
        scales = swap_scales(steps - skipped, swap_guidance_scale, start=guidance_start) if guided else None
        control, segmented = None, isinstance(regions, str) and regions == SELF
        if method is not None:
            given: Any = None if segmented else regions
            layout, active = _layout(outputs, guided), active_steps(method, edit_steps)
            control = attach(self, method, layout=layout, layers=layers, steps=active, regions=given)
        places = self._object(prompt, noun, outputs) if segmented else ()
        blend = None
        if adain is not None:
            blend = Blend(adain, adain_start, self._noun_tokens(prompt, noun) if adain == "masked" else ())
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
            change=getattr(method, "change_clean", None),
        )
        latents, start = known.latents[skipped, rows].to(device), getattr(method, "start", None)
        if start is not None:
            latents[:outputs] = start(latents[:outputs], latents[outputs : outputs + 1])
        callback = StepCallback(callback_on_step_end, tuple(callback_on_step_end_tensor_inputs))
        with self._freeu(freeu):
            latents, masks = loop.run(latents, control, callback)
        pictures = latents if output_type == "latent" else self._decode(latents)
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
    """Appearance transfer on Stable Diffusion. Make it by `from_pipe`, which takes SDXL too, or by `embedded`; call it as it is.

    >>> pipe = AppearanceTransferPipeline.embedded()
    >>> image = pipe(appearance, structure, "a quadruped").images[0]
    """


class AppearanceTransferXLPipeline(XLConditions, AppearanceTransfer, StableDiffusionXLPipeline):
    """`AppearanceTransferPipeline` on Stable Diffusion XL."""


def _layout(outputs: int, guided: bool) -> BatchLayout:
    """Rows [outputs, outputs without the edit where guided, appearance, structures]."""
    roles = ["output"] * outputs + ["plain"] * outputs * guided + ["appearance"] + ["structure"] * outputs
    return BatchLayout(*roles, guidance=False)
