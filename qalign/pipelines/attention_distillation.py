"""Attention distillation: pictures and textures whose self-attention reads from a style.

`__call__` and `expand` have the parameters of a pipeline of diffusers, which are more than twelve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from .._checks import require_count, require_number
from ..context.layers import latent_size
from ..context.regions import Regions, label_scale
from ..methods.attention_distillation import AttentionDistillation, Losses
from ..sampling.attention_reader import AttentionReader
from ..sampling.decoder_tuning import tuned_decoder
from ..sampling.denoising import ddim_scheduler, require_finite, set_steps
from .arguments import check_generator, check_output, check_switches, one_prompt
from .base import LatentDiffusion, OnStepEnd, StepCallback, XLConditions
from .distillation_run import (
    MODES,
    TEXTURE,
    Expansion,
    Objective,
    Optimisation,
    Run,
    Sampling,
    Settings,
    choose_settings,
    draw_noise,
    windows,
)
from .pictures import choose_size, cover, to_tensors

_METHOD = AttentionDistillation()
INITIAL = ("content", "noise")


@dataclass
class AttentionDistillationOutput(BaseOutput):
    """Hold the result of attention distillation.

    Attributes:
        images: one for each content, as `output_type` says: PIL images, an array [n, H, W, 3] or a tensor
            [n, C, h, w].
        losses: float32 [iterations, 3], (total, distillation, content) before each iteration.
        interrupted: whether Ctrl-C or `pipe._interrupt` ended the run early. The images are then the best
            so far, decoded by the stock decoder.
        decoder_losses: float32 [tune_decoder], the loss before each iteration of the decoder's tuning.
    """

    images: Any
    losses: Tensor
    interrupted: bool = False
    decoder_losses: Tensor | None = None


class AttentionDistillationMixin(LatentDiffusion):
    """Attention distillation as a mixin before a Stable Diffusion pipeline."""

    @classmethod
    def _kinds(cls) -> tuple[Any, Any]:
        return AttentionDistillationPipeline, AttentionDistillationXLPipeline

    @torch.no_grad()
    def __call__(
        self: Any,
        style: Any,
        content: Any = None,
        prompt: str = "",
        *,
        mode: str = "optimise",
        method: AttentionDistillation = _METHOD,
        num_inference_steps: int | None = None,
        iterations: int | None = None,
        learning_rate: float | None = None,
        guidance_scale: float = 7.5,
        adain: bool = True,
        initial: str = "content",
        anneal: bool = False,
        layers: str | Sequence[str] | None = None,
        regions: Regions | None = None,
        tune_decoder: int = 0,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> AttentionDistillationOutput:
        """Give a content, or a new picture, the textures and colours of a style.

        "optimise": clean latents descend the loss with one Adam. The timestep at which their features are
        read walks down the schedule.
        "sample": after each step of DDIM the latents take the statistics of the noised style, then descend
        the loss with a new Adam. The features of style and content are of noised latents.
        The features are read without prompt and guidance in both modes.

        Args:
            style: one picture or several: PIL, a tensor [3, H, W] or an array [H, W, 3], floats in [0, 1]
                or bytes.
            content: the pictures to keep, with one output for each. None makes one output and keeps
                nothing.
            prompt: of the steps of "sample".
            mode: "optimise" or "sample".
            method: the losses and their weights.
            num_inference_steps: of the schedule. None is 200 for "optimise" and 50 for "sample".
            iterations: of the descent at each step. None is 1 for "optimise" and 2 for "sample".
            learning_rate: of Adam. None is 0.05 for "optimise" and 0.015 for "sample".
            guidance_scale: of classifier-free guidance in "sample".
            adain: whether the latents of "sample" take the statistics of the style.
            initial: where "optimise" begins: at the "content", or at "noise" as it does without content.
            anneal: whether the rate of "optimise" falls linearly to 0, which leaves less noise of Adam in
                the picture. Not published.
            layers: of the loss, as `attach` takes them. None is the last six of the decoder.
            regions: label maps: `appearance` of the one style, `structure` of the output. None is none.
            tune_decoder: iterations of `tuned_decoder` on the styles before the output is decoded. 0 keeps
                the stock decoder; published are 75.
            height: of the output in pixels, a multiple of 8. None is the content's. Without content it is
                that of the output's labels at the scale of the style's, or else the style's. Styles keep
                the size of the first one.
            width: the same across.
            generator: of all noise. None is torch's own.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns the tuple (images, losses).
            callback_on_step_end: called after each step with (pipe, i, timestep, {"latents": latents}),
                float32 [n, C, h, w]. Latents in the returned dict replace them. `pipe._interrupt = True`
                ends the loop.
            callback_on_step_end_tensor_inputs: ("latents",) or ().

        Returns:
            an `AttentionDistillationOutput`.

        Raises:
            TypeError: an argument is of the wrong type; the message names it.
            ValueError: an argument is invalid; the message names it.
            FloatingPointError: latents, predictions or gradients are NaN or infinite.

        Example:
            >>> from qalign import AttentionDistillationPipeline
            >>> pipe = AttentionDistillationPipeline.from_pipe(pipe)
            >>> result = pipe(appearance, structure, num_inference_steps=200, output_type="pt")
            >>> result.images.shape, result.losses.shape
            (torch.Size([1, 3, 32, 32]), torch.Size([2, 3]))

        Notes:
            Latents, loss and Adam are float32 whatever the dtype of the UNet. Memory is that of a backward
            pass through the UNet down to the last layer of the loss;
            `pipe.unet.enable_gradient_checkpointing()` saves most of it. After Ctrl-C the result has the
            latents of the lowest loss ("optimise") or the last estimate of the clean latents ("sample").

        Source: Attention Distillation, arXiv 2502.20235.
        """
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        if initial not in INITIAL:
            raise ValueError(f"initial: expected one of {', '.join(INITIAL)}, got {initial!r}")
        settings = choose_settings(MODES[mode], num_inference_steps, iterations, learning_rate)
        prompt = one_prompt(prompt)
        _check(method, regions, tune_decoder)
        check_output(output_type, callback_on_step_end_tensor_inputs)
        callback = StepCallback(callback_on_step_end, tuple(callback_on_step_end_tensor_inputs))
        check_switches(adain=adain, anneal=anneal)
        require_number("guidance_scale", guidance_scale)
        self._check_run(settings, generator)
        styles = _styles(style, regions)
        contents = [] if content is None else to_tensors(content, "content")
        of_style = choose_size(styles[0], None, None, "style")
        if regions is not None and not contents and height is width is None:
            height, width = _labelled_size(regions, of_style)
        size = choose_size((contents or styles)[0], height, width, "content" if contents else "style")
        self._check_labels(regions, of_style, size)
        pictures, null_condition = _covering(styles, of_style), self.conditions("", *size)[0]
        kept = self.encode(_covering(contents, size)) if contents else None
        if kept is None or mode == "sample" or initial == "noise":
            start = draw_noise(
                self._latent_shape(max(len(contents), 1), size), generator, self._execution_device
            )
        else:
            start = kept
        shared: dict[str, Any] = {
            "pipe": self,
            "settings": settings,
            "objective": Objective(AttentionReader(self, layers), method, null_condition, regions),
            "latents": start,
            "style": self.encode(pictures),
            "content": kept,
            "generator": generator,
            "callback": callback,
        }
        run: Run
        if mode == "optimise":
            run = Optimisation(**shared, anneal=anneal)
        else:
            predict = self._guided(*self.conditions(prompt, *size), guidance_scale)
            run = Sampling(**shared, predict=predict, adain=adain)
        return self._result(run, pictures, tune_decoder, output_type, return_dict)

    @torch.no_grad()
    def expand(
        self: Any,
        style: Any,
        height: int,
        width: int,
        *,
        method: AttentionDistillation = _METHOD,
        num_inference_steps: int | None = None,
        iterations: int | None = None,
        learning_rate: float | None = None,
        window: int | None = None,
        stride: int | None = None,
        batch_size: int = 8,
        layers: str | Sequence[str] | None = None,
        regions: Regions | None = None,
        tune_decoder: int = 0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> AttentionDistillationOutput:
        """Expand a texture to any size.

        This is mode "sample" without prompt and AdaIN, in overlapping windows. Their latents are averaged
        after each step.

        Args:
            style: the texture, one picture or several.
            height: of the output in pixels, a multiple of 8.
            width: the same across.
            method: the losses and their weights.
            num_inference_steps: of the schedule. None is 50.
            iterations: of the descent at each step. None is 3.
            learning_rate: of Adam. None is 0.05.
            window: the side of a window, in latents. None is the model's own size.
            stride: from one window to the next, in latents. None is half a window; published is an eighth.
            batch_size: windows in one call of the UNet.
            layers: of the loss, as `attach` takes them. None is the last six of the decoder.
            regions: label maps: `appearance` of the one style, `structure` of the whole output. A window
                reads the style's tokens of the labels in it. None is none.
            tune_decoder: iterations of `tuned_decoder` on the styles before the output is decoded. 0 keeps
                the stock decoder.
            generator: of all noise. None is torch's own.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns the tuple (images, losses).
            callback_on_step_end: called after each step with (pipe, i, timestep, {"latents": latents}),
                float32 [n, C, h, w]. Latents in the returned dict replace them. `pipe._interrupt = True`
                ends the loop.
            callback_on_step_end_tensor_inputs: ("latents",) or ().

        Returns:
            an `AttentionDistillationOutput` with one image.

        Raises:
            TypeError: an argument is of the wrong type; the message names it.
            ValueError: an argument is invalid; the message names it.
            FloatingPointError: latents, predictions or gradients are NaN or infinite.

        Example:
            >>> from qalign import AttentionDistillationPipeline
            >>> pipe = AttentionDistillationPipeline.from_pipe(pipe)
            >>> result = pipe.expand(appearance, 32, 64, num_inference_steps=50, output_type="pt")
            >>> result.images.shape
            torch.Size([1, 3, 32, 64])

        Notes:
            Memory grows with `batch_size`, and hardly with the size of the output.

        Source: Attention Distillation, arXiv 2502.20235; windows, MultiDiffusion, arXiv 2302.08113.
        """
        settings = choose_settings(TEXTURE, num_inference_steps, iterations, learning_rate)
        _check(method, regions, tune_decoder)
        check_output(output_type, callback_on_step_end_tensor_inputs)
        callback = StepCallback(callback_on_step_end, tuple(callback_on_step_end_tensor_inputs))
        require_count("batch_size", batch_size, 1)
        for side, number in (("height", height), ("width", width)):
            require_count(side, number, 1)
        self._check_run(settings, generator)
        styles = _styles(style, regions)
        of_style, size = (
            choose_size(styles[0], None, None, "style"),
            choose_size(styles[0], height, width, "style"),
        )
        self._check_labels(regions, of_style, size)
        shape = self._latent_shape(1, size)
        sides = latent_size(self) if window is None else (window, window)
        places = windows(shape[2:], sides, stride)
        pictures = _covering(styles, of_style)
        seen = [min(each * self.vae_scale_factor, side) for each, side in zip(sides, size)]
        null_condition = self.conditions("", *seen)[0]
        run = Expansion(
            pipe=self,
            settings=settings,
            objective=Objective(AttentionReader(self, layers), method, null_condition, regions),
            latents=draw_noise(shape, generator, self._execution_device),
            style=self.encode(pictures),
            content=None,
            generator=generator,
            callback=callback,
            places=places,
            batch_size=batch_size,
        )
        return self._result(run, pictures, tune_decoder, output_type, return_dict)

    def _check_run(self: Any, settings: Settings, generator: Any) -> None:
        """Check the scheduler, the UNet and the generator, which all runs need."""
        check_generator(generator)
        set_steps(ddim_scheduler(self.scheduler), settings.steps)
        self._check_unet()

    def _latent_shape(self: Any, rows: int, size: tuple[int, int]) -> tuple[int, ...]:
        """[rows, C, h, w] of pictures of `size` pixels."""
        return rows, self.unet.config.in_channels, *(side // self.vae_scale_factor for side in size)

    def _check_labels(
        self: Any, regions: Regions | None, of_style: tuple[int, int], size: tuple[int, int]
    ) -> None:
        """Check that label maps fit pictures of these sizes, (height, width) in pixels."""
        if regions is not None:
            for name, labels, sides in (
                ("style", regions.appearance, of_style),
                ("output", regions.structure, size),
            ):
                label_scale(labels, [side // self.vae_scale_factor for side in sides], name)

    def _result(
        self: Any, run: Run, pictures: Tensor, tune_decoder: int, output_type: str, return_dict: bool
    ) -> Any:
        """Walk the run, and decode its latents by a decoder tuned to the style `pictures`."""
        images, tuning = run.walk(), []
        require_finite(images, "latents", images.dtype)
        if output_type != "latent":
            images, tuning = self._decode_tuned(run, images, pictures, 0 if run.interrupted else tune_decoder)
        self.maybe_free_model_hooks()
        images = self.image_processor.postprocess(images, output_type=output_type)
        losses = torch.tensor(run.losses).view(-1, len(Losses._fields))
        if not return_dict:
            return images, losses
        return AttentionDistillationOutput(images, losses, run.interrupted, torch.tensor(tuning))

    def _decode_tuned(
        self: Any, run: Run, latents: Tensor, pictures: Tensor, iterations: int
    ) -> tuple[Tensor, list[float]]:
        """Pictures of latents, and the losses of the tuning. After Ctrl-C the decoder is stock."""
        if iterations:
            try:
                with tuned_decoder(self, pictures, iterations=iterations) as losses:
                    return self._decode(latents), losses
            except KeyboardInterrupt:
                run.interrupted = True
        return self._decode(latents), []


class AttentionDistillationPipeline(AttentionDistillationMixin, StableDiffusionPipeline):
    """Distil the attention of a style with Stable Diffusion.

    `from_pipe` makes one of any pipeline of Stable Diffusion or SDXL, `embedded` makes one on the small
    model of this package. `__call__` makes pictures, `expand` makes textures.

    Example:
        >>> from qalign import AttentionDistillationPipeline
        >>> pipe = AttentionDistillationPipeline.from_pipe(pipe)
        >>> image = pipe(appearance, structure, num_inference_steps=200).images[0]
        >>> image.size
        (32, 32)
    """


class AttentionDistillationXLPipeline(XLConditions, AttentionDistillationMixin, StableDiffusionXLPipeline):
    """Distil attention with Stable Diffusion XL. `AttentionDistillationPipeline.from_pipe` makes one."""


def _styles(style: Any, regions: Regions | None) -> list[Tensor]:
    styles = to_tensors(style, "style")
    if regions is not None and len(styles) != 1:
        raise ValueError(f"regions: expected one style with them, got {len(styles)}")
    return styles


def _labelled_size(regions: Regions, of_style: tuple[int, int]) -> tuple[int | None, int | None]:
    """(height, width) in pixels of an output whose labels are as fine as the style's."""
    labels, own = regions.appearance, regions.structure
    if not isinstance(labels, Tensor) or not isinstance(own, Tensor):
        return None, None
    return own.shape[0] * of_style[0] // labels.shape[0], own.shape[1] * of_style[1] // labels.shape[1]


def _covering(pictures: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    return torch.stack([cover(picture, size).cpu() for picture in pictures])


def _check(method: Any, regions: Any, tune_decoder: Any) -> None:
    if not isinstance(method, AttentionDistillation):
        raise TypeError(f"method: expected AttentionDistillation(...), got {method!r}")
    if regions is not None and not isinstance(regions, Regions):
        raise TypeError(f"regions: expected Regions(...) or None, got {regions!r}")
    require_count("tune_decoder", tune_decoder)
