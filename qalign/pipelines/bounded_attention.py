"""Bounded attention: several subjects in boxes of one picture, without leakage between them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .._checks import require_count, require_number
from ..context.layers import decoder_layers, latent_size, layer_grid
from ..context.regions import Regions
from ..methods.bounded import BoundedAttention
from ..processors.attach import find_unet, select_layers
from ..sampling.attention_reader import AttentionReader, frozen, gradient
from ..sampling.bounded_guidance import BoundedGuidance
from ..sampling.bounded_masks import MaskRefiner
from ..sampling.denoising import ddim_scheduler, require_finite, set_steps
from ..sampling.object_masks import end_place, word_places
from .arguments import check_generator, check_output, one_prompt
from .base import (
    Condition,
    LatentDiffusion,
    OnStepEnd,
    StepCallback,
    XLConditions,
    concatenate_conditions,
)
from .pictures import MULTIPLE

# in place of the published tagger: conjunctions, cardinals, determiners, prepositions and words of place
FILTER_WORDS = tuple(
    """a above across against all along amid among an and another any around at before behind below beneath
    beside between both but by during each eight every five for four from in inside into left near nine no
    nor of off on one onto or over right seven since six some ten that the these this those three through to
    top bottom toward towards two under underneath until upon via while with within without""".split()
)

UNSEEN = "subjects: guidance cannot move number %s; the box has no cell on the grids of the loss's layers"
_log = logging.getLogger("qalign")


@dataclass
class BoundedAttentionOutput(BaseOutput):
    """Hold the result of bounded attention.

    Attributes:
        images: as `output_type` says: PIL images, an array [1, H, W, 3] or a tensor [1, C, h, w].
        regions: the last masks: `structure` [h, w] of the latents' size, 1 for the first subject and so on,
            0 for the background.
        losses: float32 [iterations, 2], the step and the loss per subject before each iteration of the
            guidance.
        interrupted: whether Ctrl-C or `pipe._interrupt` ended the run early. The image is then the last
            estimate of the clean one.
    """

    images: Any
    regions: Regions
    losses: Tensor
    interrupted: bool = False


class BoundedAttentionMixin(LatentDiffusion):
    """Bounded attention as a mixin before a Stable Diffusion pipeline.

    Attributes:
        default_guidance: the published settings of the family.
    """

    default_guidance = BoundedGuidance()

    @classmethod
    def _kinds(cls) -> tuple[Any, Any]:
        return BoundedAttentionPipeline, BoundedAttentionXLPipeline

    @torch.no_grad()
    def __call__(
        self: Any,
        prompt: str,
        subjects: Sequence[tuple[str, Sequence[float]]],
        *,
        guidance: BoundedGuidance | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        layers: str | Sequence[str] | None = None,
        mask_layers: str | Sequence[str] | None = None,
        filter_words: Sequence[str] = FILTER_WORDS,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> BoundedAttentionOutput:
        """Make a picture with each subject in its box.

        x ← x - rate · ∂loss/∂x

        A guided step repeats this, on the prompt's guidance half. The loss is the sum over the subjects. The
        last iteration is the first whose loss per subject was below `guidance.enough`, or that of number
        `guidance.iterations`. Then a step of DDIM runs with both halves under
        `BoundedAttention` in all layers. After the guided steps, masks that follow the subjects replace the
        boxes.

        Args:
            prompt: one prompt.
            subjects: pairs of words of the prompt and their box (x0, y0, x1, y1), in fractions of width and
                height from the upper left corner. All places of the words count, and their plural in s is
                found too. Subjects may share words, and boxes may overlap: a token sees the keys of all its
                boxes. Every layer rounds the boxes on its own grid.
            guidance: the settings of the guidance. None is `default_guidance`: `BoundedGuidance()`, for
                SDXL with rates (18, 5).
            num_inference_steps: of DDIM.
            guidance_scale: of classifier-free guidance.
            layers: of the loss, as `attach` takes them. None is `BoundedGuidance.default_layers`.
            mask_layers: of the masks, all with the same number of tokens. None is the decoder's among
                `layers`.
            filter_words: words that no query sees, if the prompt has them and no subject does.
            latents: [1, C, h, w], the noise at the start. None draws it.
            height: of the picture in pixels, a multiple of 8. None is the model's own size.
            width: the same across.
            generator: of the noise. None is torch's own.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns the tuple (images, regions).
            callback_on_step_end: called after each step with (pipe, i, timestep, {"latents": latents}),
                float32 [1, C, h, w]. Latents in the returned dict replace them. `pipe._interrupt = True`
                ends the loop.
            callback_on_step_end_tensor_inputs: ("latents",) or ().

        Returns:
            a `BoundedAttentionOutput`.

        Raises:
            TypeError: an argument is of the wrong type; the message names it.
            ValueError: an argument is invalid; the message names it.
            FloatingPointError: latents, predictions or gradients are NaN or infinite.

        Example:
            >>> from qalign import BoundedAttentionPipeline
            >>> pipe = BoundedAttentionPipeline.from_pipe(pipe)
            >>> subjects = [("fox", (0.0, 0.2, 0.5, 1.0)), ("ox", (0.5, 0.2, 1.0, 1.0))]
            >>> result = pipe("a fox by an ox", subjects, num_inference_steps=50)
            >>> result.images[0].size, result.regions.structure.unique().tolist()
            ((32, 32), [0, 1, 2])

        Notes:
            Latents and loss are float32 whatever the dtype of the UNet. Memory is that of a backward pass
            through the UNet down to the last layer of the loss. After Ctrl-C the result is the last
            estimate of the clean picture. The result is deterministic for a given generator. Masks need
            scikit-learn.

        Source: Bounded Attention, arXiv 2403.16990. Deviations: a list of words replaces the tagger of filter
        tokens; a subject's noun is the last place of its words; k-means is scikit-learn's.
        """
        guidance = self.default_guidance if guidance is None else guidance
        prompt = one_prompt(prompt)
        _check(guidance, guidance_scale, subjects, filter_words, latents)
        check_output(output_type, callback_on_step_end_tensor_inputs)
        callback = StepCallback(callback_on_step_end, tuple(callback_on_step_end_tensor_inputs))
        check_generator(generator)
        scheduler = ddim_scheduler(self.scheduler)
        require_count("num_inference_steps", num_inference_steps, 1)
        set_steps(scheduler, num_inference_steps)
        self._check_unet()
        size: tuple[Any, ...] = (height, width)
        if height is None or width is None:
            own = (side * self.vae_scale_factor for side in latent_size(self))
            size = tuple(side if given is None else given for given, side in zip(size, own))
        if any(type(side) is not int or side <= 0 or side % MULTIPLE for side in size):
            raise ValueError(f"height, width: expected multiples of {MULTIPLE}, got {size[0]} x {size[1]}")
        shape = (1, self.unet.config.in_channels, *(side // self.vae_scale_factor for side in size))
        if latents is None:
            latents = randn_tensor(
                shape, generator=generator, device=self._execution_device, dtype=torch.float32
            )
        if latents.shape != shape:
            raise ValueError(f"latents: expected {list(shape)}, got {list(latents.shape)}")
        require_finite(latents, "latents", latents.dtype)
        words, boxes = [word for word, _ in subjects], [box for _, box in subjects]
        method = self._same_tokens(lambda tokenizer: _method(tokenizer, prompt, words, filter_words))
        regions = Regions.from_boxes(boxes, *shape[-2:])
        run = _Run(self, guidance, method, regions, layers, mask_layers, callback)
        latents = run.walk(
            latents.to(self._execution_device, torch.float32),
            scheduler,
            self.conditions(prompt, *size),
            guidance_scale,
        )
        pictures = self._finished(latents, output_type)
        self.maybe_free_model_hooks()
        images = self.image_processor.postprocess(pictures, output_type=output_type)
        result = BoundedAttentionOutput(
            images, run.regions, torch.tensor(run.losses).view(-1, 2), run.interrupted
        )
        both: Any = (images, run.regions)
        return result if return_dict else both


class BoundedAttentionPipeline(BoundedAttentionMixin, StableDiffusionPipeline):
    """Place subjects in boxes with Stable Diffusion.

    `from_pipe` makes one of any pipeline of Stable Diffusion or SDXL, `embedded` makes one on the small
    model of this package.

    Example:
        >>> from qalign import BoundedAttentionPipeline
        >>> pipe = BoundedAttentionPipeline.from_pipe(pipe)
        >>> image = pipe("a fox", [("fox", (0.0, 0.2, 0.5, 1.0))], num_inference_steps=50).images[0]
        >>> image.size
        (32, 32)
    """


class BoundedAttentionXLPipeline(XLConditions, BoundedAttentionMixin, StableDiffusionXLPipeline):
    """Place subjects in boxes with Stable Diffusion XL. `BoundedAttentionPipeline.from_pipe` makes one."""

    default_guidance = BoundedGuidance(rates=(18.0, 5.0))


class _Run:
    """One picture on its way through the timesteps, with its readers, masks and losses."""

    def __init__(
        self,
        pipe: Any,
        guidance: BoundedGuidance,
        method: BoundedAttention,
        boxes: Regions,
        layers: str | Sequence[str] | None,
        mask_layers: str | Sequence[str] | None,
        callback: StepCallback,
    ) -> None:
        self.pipe, self.guidance, self.method, self.callback = pipe, guidance, method, callback
        self.boxes = self.regions = boxes
        chooser: Any = guidance  # has `default_layers`, as a method has
        found = list(select_layers(find_unet(pipe), layers, chooser))
        decoder = decoder_layers(found)
        if mask_layers is None and not decoder:
            expected = "names if `layers` has none of the decoder"
            raise ValueError(f"mask_layers: expected {expected}, got None and layers={layers!r}")
        self.mask_layers = decoder if mask_layers is None else mask_layers
        self.refiner = MaskRefiner(
            boxes, {label: places[-1] for label, places in method.subject_tokens.items()}
        )
        self.read = AttentionReader(
            pipe, found, method=replace(method, optimized=True), regions=boxes, cross=True
        )
        self.predicting = self._reader()
        if guidance.refine_every:
            self._check_grids()
        self.losses: list[tuple[float, float]] = []
        self.interrupted = False

    def _check_grids(self) -> None:
        """Check that the masks' layers have one grid, before they run."""
        model, size = find_unet(self.pipe), self.boxes.structure.shape
        grids = {layer_grid(name, model, size) for name in self.predicting.layers}
        if len(grids) != 1:
            got = ", ".join(map(str, sorted(rows * columns for rows, columns in grids)))
            raise ValueError(f"mask_layers: expected layers of one number of tokens, got {got}")

    def walk(
        self, latents: Tensor, scheduler: DDIMScheduler, conditions: tuple[Condition, Condition], scale: float
    ) -> Tensor:
        """The latents after the last timestep, or the last estimate of the clean ones after an interrupt."""
        pipe, best, total = self.pipe, latents, len(scheduler.timesteps)
        condition, unconditional = conditions
        distilled = pipe._guidance_condition(scale)  # its UNet predicts the guided output by itself
        condition = {**condition, **distilled}
        both = condition if distilled else concatenate_conditions(unconditional, condition)
        pipe._interrupt, pipe._num_timesteps = False, total
        if self.guidance.until > 0 and self.guidance.rate(0, total) is None:
            until = f"until={self.guidance.until:.3g}"
            _log.warning("guidance: it moves nothing, as %s of %d steps leaves no guided step", until, total)
        try:
            with frozen(pipe.unet), pipe.progress_bar(total=total) as bar:
                for step, timestep in enumerate(scheduler.timesteps):
                    latents = self._guide(latents, timestep, condition, step, total, bar)
                    if self.guidance.refines(step, total):
                        self.regions = self.refiner.refine(self.regions)
                        self.predicting = self._reader()
                    output = self._predict(latents, timestep, both)
                    if not distilled:
                        base, output = output.chunk(2)
                        output = base + scale * (output - base)
                    stepped = scheduler.step(output, timestep, latents)
                    latents, best = stepped.prev_sample, stepped.pred_original_sample
                    bar.update()
                    changed = self.callback(pipe, step, timestep, latents)
                    latents = latents if changed is None else changed
                    if pipe.interrupt and step + 1 < total:
                        self.interrupted = True
                        break
        except KeyboardInterrupt:
            self.interrupted = True
        return best if self.interrupted else latents

    def _guide(
        self, latents: Tensor, timestep: Tensor, condition: Condition, step: int, total: int, bar: Any
    ) -> Tensor:
        rate = self.guidance.rate(step, total)
        if rate is None:
            return latents
        with self.read:
            for _ in range(self.guidance.iterations):
                with torch.enable_grad():
                    moving = latents.detach().requires_grad_()
                    own, words = _split(self.read(moving, timestep, condition))
                    if not self.losses and (unseen := self.guidance.unseen(own, self.boxes)):
                        _log.warning(UNSEEN, ", ".join(map(str, unseen)))
                    loss = self.guidance.loss(own, self.boxes, words, self.method)
                mean = loss.item() / len(self.refiner.subjects)
                self.losses.append((step, mean))
                bar.set_postfix(loss=f"{mean:.4g}")
                latents = latents - rate * gradient(loss, moving)
                if mean < self.guidance.enough:
                    break
        return latents

    def _reader(self) -> AttentionReader:
        """A reader of whole steps under the present masks."""
        return AttentionReader(
            self.pipe, self.mask_layers, method=self.method, regions=self.regions, cross=True
        )

    def _predict(self, latents: Tensor, timestep: Tensor, both: Condition) -> Tensor:
        """Predict for the rows of `both`; the maps of the last one, the prompt's, go to the refiner."""
        rows = len(both["encoder_hidden_states"])
        with self.predicting as read:
            output, features = read.predict(latents.expand(rows, -1, -1, -1), timestep, both)
        own, words = _split(features)
        if self.guidance.refine_every:
            self.refiner.add(own, self.regions, words, self.method)
        return output


def _split(features: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The features of self-attention, and those of cross-attention."""
    cross = {name: layer for name, layer in features.items() if name.endswith("attn2")}
    return {name: layer for name, layer in features.items() if name not in cross}, cross


def _method(
    tokenizer: Any, prompt: str, words: Sequence[str], filter_words: Sequence[str]
) -> BoundedAttention:
    places = {label: _places(tokenizer, prompt, word) for label, word in enumerate(words, 1)}
    filtered = {place for word in filter_words for place in word_places(tokenizer, prompt, word)}
    taken = {place for some in places.values() for place in some}
    return BoundedAttention(
        subject_tokens=places,
        filter_tokens=tuple(sorted(filtered - taken)),
        eos_token=end_place(tokenizer, prompt),
    )


def _places(tokenizer: Any, prompt: str, words: str) -> tuple[int, ...]:
    for form in (words, f"{words}s"):
        if places := word_places(tokenizer, prompt, form):
            return places
    raise ValueError(f"subjects: expected words of the prompt {prompt!r}, got {words!r}")


def _check(guidance: Any, scale: Any, subjects: Any, filter_words: Any, latents: Any) -> None:
    if not isinstance(guidance, BoundedGuidance):
        raise TypeError(f"guidance: expected BoundedGuidance(...) or None, got {guidance!r}")
    require_number("guidance_scale", scale)
    if not _are_subjects(subjects):
        expected = "pairs of a word and its box (x0, y0, x1, y1)"
        raise TypeError(f"subjects: expected {expected}, got {subjects!r}")
    words = isinstance(filter_words, (list, tuple, set, frozenset))
    if not words or not all(isinstance(word, str) for word in filter_words):
        raise TypeError(f"filter_words: expected words, got {filter_words!r}")
    if latents is not None and (not isinstance(latents, Tensor) or not latents.is_floating_point()):
        got = f"{latents.dtype}" if isinstance(latents, Tensor) else repr(latents)
        raise TypeError(f"latents: expected a tensor of floats or None, got {got}")


def _are_subjects(subjects: Any) -> bool:
    try:
        return all(isinstance(word, str) and len(list(map(float, box))) == 4 for word, box in subjects)
    except (TypeError, ValueError):
        return False
