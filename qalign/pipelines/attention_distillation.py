"""Attention distillation: a picture whose self-attention draws from a style, by optimising latents or while sampling them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .._checks import require_count
from ..context.adain import adain as adain_latents
from ..context.regions import Regions, label_scale
from ..methods.attention_distillation import AttentionDistillation, Losses
from ..sampling.attention_reader import AttentionReader, descend, frozen
from ..sampling.decoder_tuning import tuned_decoder
from ..sampling.inversion import set_steps
from .base import Condition, LatentDiffusion, XLConditions, check_output
from .pictures import choose_size, cover, to_tensors

_METHOD = AttentionDistillation()
INITIAL = ("content", "noise")
NO_DEVIATION = 1e-12  # under the root of the variance: as 1e-6 beside the deviation, where that is 0


class Mode(NamedTuple):
    """What a mode takes where the user says nothing, as published."""

    steps: int
    iterations: int
    learning_rate: float


MODES = {"optimise": Mode(200, 1, 0.05), "sample": Mode(50, 2, 0.015)}
TEXTURE = Mode(50, 3, 0.05)


@dataclass
class AttentionDistillationOutput(BaseOutput):
    """What attention distillation made.

    Attributes:
        images: PIL images, an array [n, H, W, 3] or a tensor [n, C, h, w], as `output_type` says.
        losses: float32 [iterations, 3], (total, distillation, content) before each iteration.
        interrupted: whether Ctrl-C or `pipe._interrupt` ended it early; images are then the best there was, decoded by the stock decoder.
        decoder_losses: float32 [tune_decoder], of the decoder before each iteration of its tuning.
    """

    images: Any
    losses: Tensor
    interrupted: bool = False
    decoder_losses: Tensor | None = None


class AttentionDistillationMixin(LatentDiffusion):
    """Attention distillation before a Stable Diffusion pipeline, whose components and conditioning it uses."""

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
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> AttentionDistillationOutput:
        """Give the content, or a new picture, the style's textures and colours.

        >>> image = pipe(style, content).images[0]
        >>> texture = pipe(style, regions=Regions(appearance=its_labels, structure=labels), num_inference_steps=300).images[0]

        "optimise": clean latents descend the loss by one Adam, while the timestep that their features are read at walks down the schedule.
        "sample": after each step of DDIM the latents take the noised style's statistics, and descend the loss by an Adam that is new every time,
        the features of style and content being of noised latents. Features are always read without a prompt and without guidance.

        Args:
            style: one picture or several: PIL, tensor [3, H, W] or array [H, W, 3], floats in [0, 1] or bytes.
            content: what to keep, one output for each; None is one output that keeps nothing.
            prompt: of "sample"'s own steps.
            mode: "optimise" or "sample".
            method: the losses and their weights.
            num_inference_steps: of the schedule; None is 200 ("optimise"), 50 ("sample").
            iterations: of the descent at each step; None is 1, 2.
            learning_rate: of Adam; None is 0.05, 0.015.
            guidance_scale: of "sample"'s prompt against the empty one.
            adain: of "sample": whether the latents take the style's statistics.
            initial: of "optimise": "content", or "noise" as without any.
            anneal: of "optimise": whether the rate falls linearly to 0, which leaves less of Adam's noise in the picture; not published.
            layers: as `attach`; None is the last six of the decoder.
            regions: label maps, `appearance` of the one style, `structure` of the output.
            tune_decoder: iterations that tune the decoder to the styles before it decodes the output; published are 75. See `tuned_decoder`.
            height, width: of the output in pixels, multiples of 8; None is the content's, or else that of its labels at the scale of the
                style's, or else the style's. Styles keep the size of the first.
            generator: of all noise.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False: the tuple (images, losses); type checkers see the output class.
            callback_on_step_end: called with (pipe, i, timestep, {"latents": float32 [n, C, h, w]}) after each step; the latents it returns
                replace them. `pipe._interrupt = True` ends the loop.

        Ctrl-C ends it too: images are then the latents of the lowest loss ("optimise") or the last estimate of the clean ones ("sample"). Latents,
        loss and Adam are float32 whatever the dtype of the UNet.

        Raises:
            TypeError, ValueError: a bad argument, named. FloatingPointError: NaN or infinity in latents, predictions or gradients.
        Source: Attention Distillation, arXiv 2502.20235.
        """
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        if initial not in INITIAL:
            raise ValueError(f"initial: expected one of {', '.join(INITIAL)}, got {initial!r}")
        settings = _settings(MODES[mode], num_inference_steps, iterations, learning_rate)
        _check(method, tune_decoder, output_type, callback_on_step_end_tensor_inputs)
        styles, contents = (
            to_tensors(style, "style"),
            [] if content is None else to_tensors(content, "content"),
        )
        if regions is not None and len(styles) != 1:
            raise ValueError(f"regions: expected one style with them, got {len(styles)}")
        of_style = choose_size(styles[0], None, None, "style")
        if regions is not None and not contents and height is width is None:
            height, width = _labelled_size(regions, of_style)
        size = choose_size((contents or styles)[0], height, width, "content" if contents else "style")
        self._check_labels(regions, of_style, size)
        run = _Run(self, method, settings, _covering(styles, of_style), layers, regions, generator)
        run.content = self.encode(_covering(contents, size)) if contents else None
        shape = (
            max(len(contents), 1),
            self.unet.config.in_channels,
            *(side // self.vae_scale_factor for side in size),
        )
        run.null = self.conditions("", *size)[0]
        run.told = (callback_on_step_end, tuple(callback_on_step_end_tensor_inputs))
        if mode == "optimise":
            latents = run.optimise(
                run.noise(shape) if run.content is None or initial == "noise" else run.content, anneal
            )
        else:
            latents = run.sample(
                run.noise(shape), self._guided(*self.conditions(prompt, *size), guidance_scale), adain
            )
        return self._result(run, latents, tune_decoder, output_type, return_dict)

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
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> AttentionDistillationOutput:
        """A texture of any size: "sample" without prompt and AdaIN, in overlapping windows whose latents are averaged after each step.

        >>> image = pipe.expand(texture, 256, 768).images[0]
        >>> image = pipe.expand(texture, 256, 768, regions=Regions(appearance=its_labels, structure=labels_of_the_output)).images[0]

        Args:
            style: the texture, one picture or several.
            height, width: of the output in pixels, multiples of 8.
            num_inference_steps, iterations, learning_rate: as `__call__`; None is 50, 3 and 0.05.
            window: the side of a window, in latents; None is the model's own size.
            stride: from one window to the next, in latents; None is half a window. As published it is an eighth.
            batch_size: windows in one call of the UNet.
            regions: label maps, `appearance` of the one style, `structure` of the whole output. A window sees the style's tokens of the labels
                in it.

        Other arguments as `__call__`. Memory grows with `batch_size` and hardly with the size. Source: arXiv 2502.20235; windows: MultiDiffusion,
        arXiv 2302.08113.
        """
        settings = _settings(TEXTURE, num_inference_steps, iterations, learning_rate)
        _check(method, tune_decoder, output_type, callback_on_step_end_tensor_inputs)
        styles = to_tensors(style, "style")
        if regions is not None and len(styles) != 1:
            raise ValueError(f"regions: expected one style with them, got {len(styles)}")
        of_style, size = (
            choose_size(styles[0], None, None, "style"),
            choose_size(styles[0], height, width, "style"),
        )
        self._check_labels(regions, of_style, size)
        space = [side // self.vae_scale_factor for side in size]
        window = self.unet.config.sample_size if window is None else window
        places = windows(space, window, max(window // 2, 1) if stride is None else stride)
        run = _Run(self, method, settings, _covering(styles, of_style), layers, regions, generator)
        run.null = self.conditions("", *(min(window * self.vae_scale_factor, side) for side in size))[0]
        run.told = (callback_on_step_end, tuple(callback_on_step_end_tensor_inputs))
        latents = run.expand(run.noise((1, self.unet.config.in_channels, *space)), places, batch_size)
        return self._result(run, latents, tune_decoder, output_type, return_dict)

    def _check_labels(
        self: Any, regions: Regions | None, of_style: tuple[int, int], size: tuple[int, int]
    ) -> None:
        """Label maps fit pictures of these sizes, (height, width) in pixels."""
        if regions is not None:
            for name, labels, sides in (
                ("style", regions.appearance, of_style),
                ("output", regions.structure, size),
            ):
                label_scale(labels, [side // self.vae_scale_factor for side in sides], name)

    def _result(
        self: Any, run: "_Run", latents: Tensor, tune_decoder: int, output_type: str, return_dict: bool
    ) -> AttentionDistillationOutput:
        pictures, tuning = latents, []
        if output_type != "latent":
            pictures, tuning = self._decode_tuned(run, latents, 0 if run.interrupted else tune_decoder)
        self.maybe_free_model_hooks()
        images = self.image_processor.postprocess(pictures, output_type=output_type)
        losses = torch.tensor(run.losses).view(-1, len(Losses._fields))
        if not return_dict:
            return images, losses  # type: ignore[return-value]
        return AttentionDistillationOutput(images, losses, run.interrupted, torch.tensor(tuning))

    def _decode_tuned(self: Any, run: "_Run", latents: Tensor, iterations: int) -> tuple[Tensor, list[float]]:
        """Pictures of latents, and the losses of the tuning; an interrupt while it lasts leaves the stock decoder."""
        if iterations:
            try:
                with tuned_decoder(self, run.pictures, iterations=iterations) as losses:
                    return self._decode(latents), losses
            except KeyboardInterrupt:
                run.interrupted = True
        return self._decode(latents), []


class AttentionDistillationPipeline(AttentionDistillationMixin, StableDiffusionPipeline):
    """Attention distillation on Stable Diffusion. Make it by `from_pipe`, which takes SDXL too, or by `embedded`; call it as it is.

    >>> pipe = AttentionDistillationPipeline.embedded()
    >>> image = pipe(style, content).images[0]
    """


class AttentionDistillationXLPipeline(XLConditions, AttentionDistillationMixin, StableDiffusionXLPipeline):
    """`AttentionDistillationPipeline` on Stable Diffusion XL."""


def windows(space: Sequence[int], window: int, stride: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the windows that cover (height, width), row by row; the last of a row or column ends where the space does.

    Raises:
        ValueError: a stride that leaves gaps, or none.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride: expected 1 to the window's {window} latents, got {stride!r}")
    starts = [[*range(0, max(side - window, 0), stride), max(side - window, 0)] for side in space]
    return [(slice(top, top + window), slice(left, left + window)) for top in starts[0] for left in starts[1]]


class _Run:
    """One run: latents on their way, with what they are drawn to."""

    latents: Tensor
    best: Tensor  # what an interrupt leaves
    content: Tensor | None = None
    null: Condition
    told: tuple[Callable | None, tuple[str, ...]] = (None, ())

    def __init__(
        self,
        pipe: Any,
        method: AttentionDistillation,
        settings: Mode,
        pictures: Tensor,
        layers: str | Sequence[str] | None,
        regions: Regions | None,
        generator: torch.Generator | None,
    ) -> None:
        self.pipe, self.method, self.settings = pipe, method, settings
        self.pictures, self.style = pictures, pipe.encode(pictures)
        self.regions, self.generator = regions, generator
        self.read = AttentionReader(pipe, layers)
        self.scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, clip_sample=False, thresholding=False
        )
        set_steps(self.scheduler, settings.steps)
        self.losses: list[tuple[float, float, float]] = []
        self.interrupted = False

    def noise(self, shape: Sequence[int]) -> Tensor:
        return randn_tensor(
            tuple(shape), generator=self.generator, device=self.style.device, dtype=torch.float32
        )

    def optimise(self, start: Tensor, anneal: bool) -> Tensor:
        """Clean latents, one Adam for all steps; the best are those of the lowest loss."""
        self.latents, self.best = start.detach().clone().requires_grad_(), start
        adam, lowest = self._adam(self.latents), float("inf")
        total = max(self.settings.steps * self.settings.iterations, 1)
        rate = torch.optim.lr_scheduler.LinearLR(
            adam, 1.0, end_factor=0.0 if anneal else 1.0, total_iters=total
        )

        def step(timestep: Tensor) -> None:
            nonlocal lowest
            loss = self._loss(self.style, self.content, timestep)
            for _ in range(self.settings.iterations):
                before = self.latents.detach().clone()
                found = self._descend(self.latents, adam, loss)
                rate.step()
                if found < lowest:
                    self.best, lowest = before, found

        return self._walk(step)

    def sample(self, start: Tensor, predict: Callable[[Tensor, Tensor], Tensor], adain: bool) -> Tensor:
        """Steps of DDIM, each with AdaIN and an Adam of its own; the best is the last estimate of the clean latents."""
        self.latents = self.best = start

        def step(timestep: Tensor) -> None:
            stepped = self.scheduler.step(predict(self.latents, timestep), timestep, self.latents)
            self.latents, self.best, after = (
                stepped.prev_sample,
                stepped.pred_original_sample,
                self._after(timestep),
            )
            if self._is_refined(timestep):
                if adain:
                    rows = (
                        self._noised(self.style, after).transpose(0, 1).flatten(1, 2).unsqueeze(0)
                    )  # [1, C, S·h, w]: the styles' joint statistics
                    self.latents = adain_latents(self.latents, rows, eps=NO_DEVIATION)
                content = None if self.content is None else self._noised(self.content, after)
                self.latents = self._refine(
                    self.latents, self._loss(self._noised(self.style, after), content, after)
                )

        return self._walk(step)

    def expand(self, start: Tensor, places: Sequence[tuple[slice, slice]], batch_size: int) -> Tensor:
        """As `sample`, in windows."""
        self.latents = self.best = start
        count = torch.zeros_like(start)
        parts = (
            None
            if self.regions is None
            else [self.regions.window(rows, columns, start.shape[2:]) for rows, columns in places]
        )
        for rows, columns in places:
            count[:, :, rows, columns] += 1

        def step(timestep: Tensor) -> None:
            after, sums, clean = self._after(timestep), torch.zeros_like(start), torch.zeros_like(start)
            loss = self._loss(self._noised(self.style, after), None, after)
            for begin in range(0, len(places), batch_size):
                some = places[begin : begin + batch_size]
                views = torch.cat([self.latents[:, :, rows, columns] for rows, columns in some])
                stepped = self.scheduler.step(self.pipe.predict(views, timestep, self.null), timestep, views)
                of_labels = functools.partial(loss, regions=parts and parts[begin : begin + batch_size])
                moved = (
                    self._refine(stepped.prev_sample, of_labels)
                    if self._is_refined(timestep)
                    else stepped.prev_sample
                )
                for (rows, columns), view, estimate in zip(some, moved, stepped.pred_original_sample):
                    sums[:, :, rows, columns] += view
                    clean[:, :, rows, columns] += estimate
            self.latents, self.best = sums / count, clean / count

        return self._walk(step)

    def _walk(self, step: Callable[[Tensor], None]) -> Tensor:
        """The latents after the last timestep, or the best where something ended it early."""
        pipe, timesteps, (callback, names) = self.pipe, self.scheduler.timesteps, self.told
        pipe._interrupt, pipe._num_timesteps = False, len(timesteps)
        try:
            with frozen(pipe.unet), self.read, pipe.progress_bar(total=len(timesteps)) as bar:
                for number, timestep in enumerate(timesteps):
                    step(timestep)
                    if self.losses:
                        bar.set_postfix(loss=f"{self.losses[-1][0]:.4g}")
                    bar.update()
                    if callback is not None:
                        returned = (
                            callback(
                                pipe,
                                number,
                                timestep,
                                {name: self.latents.detach().clone() for name in names},
                            )
                            or {}
                        )
                        self.latents.data.copy_(
                            returned.get("latents", self.latents.data)
                        )  # in place: they are an optimiser's
                    if pipe.interrupt and number + 1 < len(timesteps):
                        self.interrupted = True
                        break
        except KeyboardInterrupt:
            self.interrupted = True
        return self.best if self.interrupted else self.latents.detach()

    def _is_refined(self, timestep: Tensor) -> bool:
        return bool(timestep < self.scheduler.config.num_train_timesteps - 1)

    def _loss(self, style: Tensor, content: Tensor | None, timestep: Tensor) -> Callable[..., Losses]:
        """The losses of latents at a timestep, against features that are read now, once; of other `regions` than the run's if given."""
        targets: list[Any] = [
            None if each is None else self.read(each, timestep, self.null) for each in (style, content)
        ]

        def loss(latents: Tensor, *, regions: Regions | Sequence[Regions] | None = self.regions) -> Losses:
            return self.method.loss(self.read(latents, timestep, self.null), *targets, regions=regions)

        return loss

    def _refine(self, latents: Tensor, loss: Callable[[Tensor], Losses]) -> Tensor:
        """After some iterations of an Adam that knows nothing of the steps before."""
        latents = latents.detach().clone().requires_grad_()
        adam = self._adam(latents)
        for _ in range(self.settings.iterations):
            self._descend(latents, adam, loss)
        return latents.detach()

    def _descend(self, latents: Tensor, adam: torch.optim.Adam, loss: Callable[[Tensor], Losses]) -> float:
        losses = torch.stack(descend(latents, adam, loss)).tolist()
        self.losses.append(tuple(losses))
        return losses[0]

    def _adam(self, latents: Tensor) -> torch.optim.Adam:
        return torch.optim.Adam([latents], lr=self.settings.learning_rate)

    def _after(self, timestep: Tensor) -> Tensor:
        """t' of one step of the schedule."""
        return (timestep - self.scheduler.config.num_train_timesteps // self.settings.steps).clamp(min=0)

    def _noised(self, clean: Tensor, timestep: Tensor) -> Tensor:
        """With noise of its own draw."""
        return self.scheduler.add_noise(clean, self.noise(clean.shape), timestep.reshape(1))


def _labelled_size(regions: Regions, of_style: tuple[int, int]) -> tuple[int | None, int | None]:
    """(height, width) in pixels of the output whose labels are as fine as the style's."""
    labels, own = regions.appearance, regions.structure
    if not isinstance(labels, Tensor) or not isinstance(own, Tensor):
        return None, None
    return own.shape[0] * of_style[0] // labels.shape[0], own.shape[1] * of_style[1] // labels.shape[1]


def _covering(pictures: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    return torch.stack([cover(picture, size).cpu() for picture in pictures])


def _settings(
    published: Mode, steps: int | None, iterations: int | None, learning_rate: float | None
) -> Mode:
    given = {"steps": steps, "iterations": iterations, "learning_rate": learning_rate}
    settings = published._replace(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    require_count("num_inference_steps", settings.steps, 1)
    require_count("iterations", settings.iterations)
    if not settings.learning_rate > 0:
        raise ValueError(f"learning_rate: expected a number above 0, got {learning_rate!r}")
    return settings


def _check(method: AttentionDistillation, tune_decoder: int, output_type: str, names: Sequence[str]) -> None:
    if not isinstance(method, AttentionDistillation):
        raise TypeError(f"method: expected AttentionDistillation(...), got {method!r}")
    require_count("tune_decoder", tune_decoder)
    check_output(output_type, names)
