"""Appearance transfer: a picture in the appearance of one and the structure of another, from noise that inversion finds for both."""

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from ..context.adain import adain as adain_latents
from ..context.clock import Clock
from ..context.layout import BatchLayout
from ..context.regions import Regions
from ..methods import TRANSFERS, Method, QAlign, find_method
from ..processors.attach import Control, attach, find_unet
from ..processors.feature_bank import FeatureBank
from ..sampling.freeu import cross_image_freeu
from ..sampling.guidance import swap_guided, swap_scales
from ..sampling.inversion import KINDS, Inversion, denoise_step, invert_ddim, invert_ddpm
from ..sampling.inversion_cache import InversionCache, digest
from ..sampling.object_masks import (
    MOST_TOKENS,
    MapCollector,
    default_noun,
    noun_tokens,
    object_masks,
    object_regions,
)
from .base import Condition, LatentDiffusion, XLConditions, check_output
from .pictures import choose_size, cover, to_tensors

METHODS = TRANSFERS
PUBLISHED_STEPS = (11 / 68, 1.0)
ADAIN = ("masked", "whole", None)
SELF = "self"  # regions that the UNet's own attention tells
SEGMENTED_AT = (0.2, 0.4, 0.6)  # timesteps, as fractions of those of training
_QALIGN = QAlign()
_log = logging.getLogger("qalign")

Generators = torch.Generator | Sequence[torch.Generator] | None


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


class AppearanceTransfer(LatentDiffusion):
    """Appearance transfer as a mixin before a Stable Diffusion pipeline, whose components and conditioning it uses."""

    @classmethod
    def _kinds(cls) -> tuple[Any, Any]:
        return AppearanceTransferPipeline, AppearanceTransferXLPipeline

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
        """The inversion of [appearance, structures...], which several calls with the same pictures may share. Arguments as `__call__`."""
        if inversion not in KINDS:
            raise ValueError(
                f"inversion: expected an Inversion or one of {', '.join(KINDS)}, got {inversion!r}"
            )
        pictures = _pictures(appearance, structure, height, width)
        clean, scheduler = self.encode(pictures), _ddim(self.scheduler)
        condition, unconditional = self.conditions(prompt, *pictures.shape[-2:])
        generators = _generators(generator, len(pictures))
        keys = [""] * len(pictures)
        if cache is not None:
            noise = [
                each.get_state() if generator is not None and inversion == "ddpm" else None
                for each in generators
            ]
            settings = [num_inference_steps, inversion, inversion_guidance_scale, freeu]
            shared = digest(settings, dict(scheduler.config), condition, unconditional, find_unet(self))
            keys = [digest(shared, row, state) for row, state in zip(clean, noise)]

        def make(rows: list[int]) -> Inversion:
            predict = self._guided(condition, unconditional, inversion_guidance_scale)
            with self._freeu(freeu), self.progress_bar(total=num_inference_steps) as bar:
                options: dict[str, Any] = {"steps": num_inference_steps, "progress": bar.update}
                if inversion == "ddim":
                    return invert_ddim(predict, scheduler, clean[rows], **options)
                options |= {
                    "generator": [generators[row] for row in rows],
                    "batch_size": 3 * len(pictures) - 2,
                }  # as many rows as denoising has
                return invert_ddpm(predict, scheduler, clean[rows], **options)

        inverted = InversionCache(cache).fill(keys, make)
        self.maybe_free_model_hooks()
        return inverted.to(clean.device)

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
        found, bank = _method(method), FeatureBank("appearance") if bank is None else bank
        if found is None or bank.roles != ("appearance",):
            raise ValueError(
                f"method, bank: expected a method and a bank of the appearance, got {method!r}, {bank.roles!r}"
            )
        bank.clear()
        clean, skipped = inversion.latents[-1, :1], _skipped(skip, len(inversion.timesteps))
        condition = self.conditions(prompt, *(side * self.vae_scale_factor for side in clean.shape[-2:]))[0]
        clean, steps = clean.to(self._execution_device, self.unet.dtype), _active(found, edit_steps)
        served = bank.record_clean(
            self, found, clean, inversion.timesteps[skipped:], layers=layers, steps=steps, **condition
        )
        self.maybe_free_model_hooks()
        return served

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
        pictures = _pictures(appearance, structure, height, width)
        places = self._object(prompt, noun, len(pictures) - 1)
        found = self._segment(self.encode(pictures), prompt, places)
        self.maybe_free_model_hooks()
        return found

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
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None] | None = None,
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
        method = _method(method)
        _check(adain, edit_steps, output_type, callback_on_step_end_tensor_inputs)
        known = inversion if isinstance(inversion, Inversion) else None
        outputs = len(to_tensors(structure, "structure")) if known is None else _structures(known)
        steps = num_inference_steps if known is None else len(known.timesteps)
        skipped = _skipped(skip, steps)
        guided = method is not None and swap_guidance_scale > 1
        scales = swap_scales(steps - skipped, swap_guidance_scale, start=guidance_start) if guided else None
        control, segmented = None, isinstance(regions, str) and regions == SELF
        if method is not None:
            roles = (
                ["output"] * outputs + ["plain"] * outputs * guided + ["appearance"] + ["structure"] * outputs
            )
            layout = BatchLayout(*roles, guidance=False)
            given: Any = None if segmented else regions
            control = attach(
                self, method, layout=layout, layers=layers, steps=_active(method, edit_steps), regions=given
            )
        places = self._object(prompt, noun, outputs) if segmented else ()
        blend = (
            None
            if adain is None
            else _Blend(adain, adain_start, self._noun_tokens(prompt, noun) if adain == "masked" else ())
        )
        if known is None:
            settings = {
                "num_inference_steps": steps,
                "inversion": inversion,
                "inversion_guidance_scale": inversion_guidance_scale,
            }
            options = {
                "freeu": freeu,
                "cache": cache,
                "height": height,
                "width": width,
                "generator": generator,
            }
            known = self.invert(appearance, structure, prompt, **settings, **options)

        rows, device = [*range(1, outputs + 1), *range(outputs + 1)], self._execution_device
        if control is not None and segmented:
            control.regions = self._segment(known.latents[-1].to(device), prompt, places)
        loop = _Loop(
            pipe=self,
            scheduler=_ddim(self.scheduler, known.timesteps),
            timesteps=known.timesteps[skipped:],
            noises=None if known.noises is None else known.noises[skipped:, rows].to(device),
            eta=known.eta,
            outputs=outputs,
            condition=self.conditions(
                prompt, *(side * self.vae_scale_factor for side in known.latents.shape[-2:])
            )[0],
            scales=scales,
            blend=blend,
            change=None if method is None else method.change_clean,
        )
        latents = known.latents[skipped, rows].to(device)
        if method is not None:
            latents[:outputs] = method.start(latents[:outputs], latents[outputs : outputs + 1])
        with self._freeu(freeu):
            latents, masks = loop.run(
                latents, control, callback_on_step_end, callback_on_step_end_tensor_inputs
            )
        pictures = latents if output_type == "latent" else self._decode(latents)
        self.maybe_free_model_hooks()
        parts = [
            self.image_processor.postprocess(some, output_type=output_type)
            for some in pictures.split([outputs, outputs + 1])
        ]
        result = AppearanceTransferOutput(*parts, masks, None if control is None else control.regions)
        if not return_dict:
            return result.images, result.reconstructions  # type: ignore[return-value]
        return result

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
        condition = self.conditions(prompt, *(side * self.vae_scale_factor for side in clean.shape[-2:]))[0]
        scheduler, generator = _ddim(self.scheduler), torch.Generator().manual_seed(0)
        with MapCollector(self, average=True) as collector:
            for fraction in SEGMENTED_AT:
                timestep = torch.tensor(round(fraction * scheduler.config.num_train_timesteps))
                noise = torch.randn(clean.shape, generator=generator).to(clean)
                self.predict(
                    scheduler.add_noise(clean, noise, timestep.expand(len(clean))), timestep, condition
                )
        return object_regions(object_masks(collector.maps(), places, rule="absolute"))

    def _freeu(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        return cross_image_freeu(self) if wanted else contextlib.nullcontext()


class AppearanceTransferPipeline(AppearanceTransfer, StableDiffusionPipeline):
    """Appearance transfer on Stable Diffusion. Make it by `from_pipe`, which takes SDXL too, or by `embedded`; call it as it is.

    >>> pipe = AppearanceTransferPipeline.embedded()
    >>> image = pipe(appearance, structure, "a quadruped").images[0]
    """


class AppearanceTransferXLPipeline(XLConditions, AppearanceTransfer, StableDiffusionXLPipeline):
    """`AppearanceTransferPipeline` on Stable Diffusion XL."""


@dataclass(frozen=True)
class _Blend:
    """AdaIN of the output's latents: "masked" or "whole", from which fraction of the steps, and the places of the object's noun."""

    kind: str
    start: float
    noun: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Loop:
    """The denoising of [outputs, appearance, structures].

    Attributes:
        timesteps: int64 [T], those that run.
        noises: [T, B, C, h, w], or None where denoising is deterministic.
        scales: of the swap guidance at each step; None: there are no rows without the edit.
        change: what the method makes of the outputs' x̂_0, as its `change_clean`.
    """

    pipe: Any
    scheduler: DDIMScheduler
    timesteps: Tensor
    noises: Tensor | None
    eta: float
    outputs: int
    condition: Condition
    scales: Tensor | None
    blend: _Blend | None
    change: Callable[[Tensor, Tensor, int], Tensor] | None

    def run(
        self, latents: Tensor, control: Control | None, callback: Callable | None, names: Sequence[str]
    ) -> tuple[Tensor, Tensor | None]:
        """The clean latents of all rows, and the masks of appearance and structures if any were made."""
        pipe, timesteps, masks = self.pipe, self.timesteps, None
        pipe._interrupt, pipe._num_timesteps = False, len(timesteps)
        with control or contextlib.nullcontext(), pipe.progress_bar(total=len(timesteps)) as bar:
            for step, timestep in enumerate(timesteps if control is None else control.track(timesteps)):
                if pipe.interrupt:
                    break
                blend = (
                    self.blend
                    if self.blend is not None and step / len(timesteps) >= self.blend.start
                    else None
                )
                if blend is not None and blend.kind == "masked" and masks is None:
                    with self._collector(latents) as collector:
                        output = self._predict(latents, timestep, step)
                    masks = object_masks(collector.maps(), blend.noun)
                else:
                    output = self._predict(latents, timestep, step)
                noise = None if self.noises is None else self.noises[step]
                change = (
                    None if self.change is None else functools.partial(self._change, timestep=int(timestep))
                )
                latents = denoise_step(
                    self.scheduler, output, timestep, latents, noise=noise, eta=self.eta, change=change
                )
                if blend is not None:
                    latents = self._adain(latents, masks)
                if callback is not None:
                    returned = callback(pipe, step, timestep, {name: latents for name in names}) or {}
                    latents = returned.get("latents", latents)
                bar.update()
        return latents, masks

    def _predict(self, latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        """The UNet's output for every row, under swap guidance in the output rows."""
        n = self.outputs
        if self.scales is None:
            return self.pipe.predict(latents, timestep, self.condition)
        edited, plain, others = self.pipe.predict(
            torch.cat([latents[:n], latents]), timestep, self.condition
        ).split([n, n, n + 1])
        return torch.cat([swap_guided(plain, edited, self.scales[step]), others])

    def _change(self, clean: Tensor, timestep: int) -> Tensor:
        n = self.outputs
        return torch.cat([self.change(clean[:n], clean[n : n + 1], timestep), clean[n:]])  # type: ignore[misc]

    def _collector(self, latents: Tensor) -> MapCollector:
        """Of the maps of appearance and structures, on the latents' own grid where the UNet attends there, as published."""
        first = self.outputs if self.scales is None else 2 * self.outputs
        tokens = latents.shape[-2] * latents.shape[-1]
        attends = tokens <= MOST_TOKENS and getattr(
            self.pipe.unet.up_blocks[-1], "has_cross_attention", False
        )
        return MapCollector(
            self.pipe, rows=range(first, first + self.outputs + 1), self_tokens=tokens if attends else None
        )

    def _adain(self, latents: Tensor, masks: Tensor | None) -> Tensor:
        content, style = latents[: self.outputs], latents[self.outputs : self.outputs + 1]
        inside, model = (None, None) if masks is None else (masks[1:], masks[:1])
        return torch.cat(
            [adain_latents(content, style, content_mask=inside, style_mask=model), latents[self.outputs :]]
        )


def _check(
    adain: str | None, edit_steps: tuple[float, float] | None, output_type: str, names: Sequence[str]
) -> None:
    if adain not in ADAIN:
        raise ValueError(f"adain: expected 'masked', 'whole' or None, got {adain!r}")
    if edit_steps is not None and not (len(edit_steps) == 2 and 0 <= edit_steps[0] < edit_steps[1] <= 1):
        raise ValueError(
            f"edit_steps: expected None or fractions (start, stop) with 0 <= start < stop <= 1, got {edit_steps!r}"
        )
    check_output(output_type, names)


def _method(method: Method | str | None) -> Method | None:
    if isinstance(method, str):
        return find_method(method, METHODS)()
    return method


def _active(method: Method, edit_steps: tuple[float, float] | None) -> tuple[float, float]:
    return edit_steps or method.default_steps or PUBLISHED_STEPS


def edited_steps(method: Method, num_inference_steps: int, *, skip: float = 0.32) -> list[int]:
    """The steps of a transfer, counted from the first that `skip` leaves, at which `method` edits and reads the appearance."""
    total = num_inference_steps - _skipped(skip, num_inference_steps)
    clock = Clock(_active(method, None), method.takes_structure)
    found = []
    for step in range(total):
        clock.set(step, total)
        if not clock.idle and not clock.from_structure:
            found.append(step)
    return found


def _structures(inversion: Inversion) -> int:
    rows = inversion.latents.shape[1]
    if rows < 2:
        raise ValueError(f"inversion: expected rows for [appearance, structures...], got {rows}")
    return rows - 1


def _skipped(skip: float, steps: int) -> int:
    if not 0 <= skip < 1 or round(skip * steps) >= steps:
        raise ValueError(f"skip: expected a fraction that leaves at least one of {steps} steps, got {skip!r}")
    return round(skip * steps)


def _pictures(appearance: Any, structure: Any, height: int | None, width: int | None) -> Tensor:
    """float32 [1 + n, 3, H, W] in [0, 1]."""
    appearances, structures = to_tensors(appearance, "appearance"), to_tensors(structure, "structure")
    if len(appearances) != 1:
        raise ValueError(f"appearance: expected one picture, got {len(appearances)}")
    size = choose_size(structures[0], height, width, "structure")
    return torch.stack([cover(picture, size).cpu() for picture in appearances + structures])


def _generators(generator: Generators, pictures: int) -> list[torch.Generator]:
    """One generator for each picture; of one there are made two, the second with a copy for every structure."""
    if generator is None or isinstance(generator, torch.Generator):
        seeds = torch.randint(
            2**62, (2,), generator=generator, device=generator.device if generator else "cpu"
        ).tolist()
        return [torch.Generator().manual_seed(seed) for seed in [seeds[0]] + [seeds[1]] * (pictures - 1)]
    if len(generator) != pictures:
        raise ValueError(
            f"generator: expected one, or one for each of {pictures} pictures, got {len(generator)}"
        )
    return list(generator)


def _ddim(scheduler: Any, timesteps: Tensor | None = None) -> DDIMScheduler:
    """A DDIMScheduler with the noise levels of the pipeline's own, which stays as it is; set to `timesteps`."""
    ddim = DDIMScheduler.from_config(scheduler.config)
    if timesteps is not None:
        ddim.set_timesteps(len(timesteps))
        if not torch.equal(ddim.timesteps, timesteps):
            raise ValueError(
                f"inversion: expected the {len(timesteps)} timesteps of this pipeline's scheduler, got those of another"
            )
    return ddim
