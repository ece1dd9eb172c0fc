"""Runs of attention distillation: their settings, and the three ways of latents through the timesteps."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .._checks import require_count, require_number
from ..context.adain import adain as adain_latents
from ..context.regions import Regions
from ..methods.attention_distillation import AttentionDistillation, Losses
from ..sampling.attention_reader import AttentionReader, descend, frozen
from ..sampling.denoising import ddim_scheduler, set_steps
from .base import Condition, StepCallback

NO_DEVIATION = 1e-12  # added to the variance: like 1e-6 added to the deviation, where that is 0


class Settings(NamedTuple):
    """Steps of the schedule, iterations of the descent at each step, and the learning rate of Adam."""

    steps: int
    iterations: int
    learning_rate: float


MODES = {"optimise": Settings(200, 1, 0.05), "sample": Settings(50, 2, 0.015)}  # as published
TEXTURE = Settings(50, 3, 0.05)


def choose_settings(
    published: Settings, steps: int | None, iterations: int | None, learning_rate: float | None
) -> Settings:
    """The published settings, except for those that are given."""
    settings = Settings(
        published.steps if steps is None else steps,
        published.iterations if iterations is None else iterations,
        published.learning_rate if learning_rate is None else learning_rate,
    )
    require_count("num_inference_steps", settings.steps, 1)
    require_count("iterations", settings.iterations)
    require_number("learning_rate", settings.learning_rate)
    if not settings.learning_rate > 0:
        raise ValueError(f"learning_rate: expected a number above 0, got {learning_rate!r}")
    return settings


def draw_noise(shape: Sequence[int], generator: torch.Generator | None, device: torch.device) -> Tensor:
    return randn_tensor(tuple(shape), generator=generator, device=device, dtype=torch.float32)


@dataclass(frozen=True, eq=False)
class Objective:
    """The losses of latents, without a prompt.

    Attributes:
        reader: reads the self-attention of the pipeline, inside its `with` block.
        method: the losses and their weights.
        null_condition: the condition of the empty prompt, for one row.
        regions: labels of style and output, or None.
    """

    reader: AttentionReader
    method: AttentionDistillation
    null_condition: Condition
    regions: Regions | None

    def at(self, timestep: Tensor, style: Tensor, content: Tensor | None) -> Callable[..., Losses]:
        """The losses as a function of latents. The features of style and content are read once, now."""
        condition = self.null_condition
        targets: list[Any] = [
            None if each is None else self.reader(each, timestep, condition) for each in (style, content)
        ]

        def losses(latents: Tensor, *, regions: Regions | Sequence[Regions] | None = self.regions) -> Losses:
            return self.method.loss(self.reader(latents, timestep, condition), *targets, regions=regions)

        return losses


@dataclass(eq=False, kw_only=True)
class Run(ABC):
    """Latents on their way through the timesteps.

    Attributes:
        pipe: the pipeline.
        settings: steps, iterations and learning rate.
        objective: the losses.
        latents: float32 [n, C, h, w]. They begin as the start and change with each step.
        style: float32 [S, C, h', w'], the clean latents of the styles.
        content: float32 [n, C, h, w]; None keeps nothing.
        generator: of the noise.
        callback: called after each step.
        scheduler: DDIM, set to the steps of `settings`.
        best: what an interrupted run returns.
        losses: (total, distillation, content) before each iteration.
        interrupted: whether something ended the run early.
    """

    pipe: Any
    settings: Settings
    objective: Objective
    latents: Tensor
    style: Tensor
    content: Tensor | None
    generator: torch.Generator | None
    callback: StepCallback
    scheduler: DDIMScheduler = field(init=False)
    best: Tensor = field(init=False)
    losses: list[tuple[float, ...]] = field(init=False, default_factory=list)
    interrupted: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.best = self.latents
        self.scheduler = ddim_scheduler(self.pipe.scheduler)
        set_steps(self.scheduler, self.settings.steps)

    @abstractmethod
    def step(self, timestep: Tensor) -> None:
        """Move `latents` and `best` by one timestep."""

    def walk(self) -> Tensor:
        """The latents after the last timestep, or the best ones if something ended the run early."""
        pipe, timesteps = self.pipe, self.scheduler.timesteps
        pipe._interrupt, pipe._num_timesteps = False, len(timesteps)
        try:
            with frozen(pipe.unet), self.objective.reader, pipe.progress_bar(total=len(timesteps)) as bar:
                for number, timestep in enumerate(timesteps):
                    self.step(timestep)
                    if self.losses:
                        bar.set_postfix(loss=f"{self.losses[-1][0]:.4g}")
                    bar.update()
                    changed = self.callback(pipe, number, timestep, self.latents.detach().clone())
                    if changed is not None:
                        self.latents.data.copy_(changed)  # in place: they are an optimiser's
                    if pipe.interrupt and number + 1 < len(timesteps):
                        self.interrupted = True
                        break
        except KeyboardInterrupt:
            self.interrupted = True
        return self.best if self.interrupted else self.latents.detach()

    def _descend(self, latents: Tensor, adam: torch.optim.Adam, loss: Callable[[Tensor], Losses]) -> float:
        """One iteration; the total loss before it."""
        losses = torch.stack(descend(latents, adam, loss)).tolist()
        self.losses.append(tuple(losses))
        return losses[0]

    def _adam(self, latents: Tensor) -> torch.optim.Adam:
        return torch.optim.Adam([latents], lr=self.settings.learning_rate)


@dataclass(eq=False, kw_only=True)
class Optimisation(Run):
    """Clean latents with one Adam for all steps; the best are those of the lowest loss."""

    anneal: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        self.latents = self.latents.detach().clone().requires_grad_()
        self._optimiser, self._lowest = self._adam(self.latents), float("inf")
        self._rate = torch.optim.lr_scheduler.LinearLR(
            self._optimiser,
            1.0,
            end_factor=0.0 if self.anneal else 1.0,
            total_iters=max(self.settings.steps * self.settings.iterations, 1),
        )

    def step(self, timestep: Tensor) -> None:
        loss = self.objective.at(timestep, self.style, self.content)
        for _ in range(self.settings.iterations):
            before = self.latents.detach().clone()
            total = self._descend(self.latents, self._optimiser, loss)
            self._rate.step()
            if total < self._lowest:
                self.best, self._lowest = before, total


class _Denoising(Run):
    """Steps of DDIM, with a new Adam after each; the best is the last estimate of the clean latents."""

    def _is_refined(self, timestep: Tensor) -> bool:
        return bool(timestep < self.scheduler.config.num_train_timesteps - 1)

    def _refine(self, latents: Tensor, loss: Callable[[Tensor], Losses]) -> Tensor:
        """The latents after the iterations of a new Adam."""
        latents = latents.detach().clone().requires_grad_()
        adam = self._adam(latents)
        for _ in range(self.settings.iterations):
            self._descend(latents, adam, loss)
        return latents.detach()

    def _after(self, timestep: Tensor) -> Tensor:
        """The timestep that follows in the schedule, at least 0."""
        return (timestep - self.scheduler.config.num_train_timesteps // self.settings.steps).clamp(min=0)

    def _noised(self, clean: Tensor, timestep: Tensor) -> Tensor:
        """Clean latents with new noise."""
        noise = draw_noise(clean.shape, self.generator, self.style.device)
        return self.scheduler.add_noise(clean, noise, timestep.reshape(1))


@dataclass(eq=False, kw_only=True)
class Sampling(_Denoising):
    """DDIM with a prediction of its own, and AdaIN to the noised style before the descent."""

    predict: Callable[[Tensor, Tensor], Tensor]
    adain: bool

    def step(self, timestep: Tensor) -> None:
        stepped = self.scheduler.step(self.predict(self.latents, timestep), timestep, self.latents)
        self.latents, self.best = stepped.prev_sample, stepped.pred_original_sample
        if not self._is_refined(timestep):
            return
        after = self._after(timestep)
        if self.adain:
            style = self._noised(self.style, after)
            joint = style.transpose(0, 1).flatten(1, 2).unsqueeze(0)  # [1, C, S·h, w]: all styles in one
            self.latents = adain_latents(self.latents, joint, eps=NO_DEVIATION)
        content = None if self.content is None else self._noised(self.content, after)
        loss = self.objective.at(after, self._noised(self.style, after), content)
        self.latents = self._refine(self.latents, loss)


@dataclass(eq=False, kw_only=True)
class Expansion(_Denoising):
    """DDIM without prompt in overlapping windows, whose latents are averaged after each step."""

    places: Sequence[tuple[slice, slice]]
    batch_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._count = torch.zeros_like(self.latents)
        for rows, columns in self.places:
            self._count[:, :, rows, columns] += 1
        space, regions = self.latents.shape[2:], self.objective.regions
        self._parts = None if regions is None else [regions.window(*place, space) for place in self.places]

    def step(self, timestep: Tensor) -> None:
        sums, clean = torch.zeros_like(self.latents), torch.zeros_like(self.latents)
        after = self._after(timestep)
        loss = self.objective.at(after, self._noised(self.style, after), None)
        for begin in range(0, len(self.places), self.batch_size):
            some = slice(begin, begin + self.batch_size)
            views = torch.cat([self.latents[:, :, rows, columns] for rows, columns in self.places[some]])
            output = self.pipe.predict(views, timestep, self.objective.null_condition)
            stepped = self.scheduler.step(output, timestep, views)
            moved = stepped.prev_sample
            if self._is_refined(timestep):
                moved = self._refine(
                    moved, functools.partial(loss, regions=self._parts and self._parts[some])
                )
            for (rows, columns), view, estimate in zip(
                self.places[some], moved, stepped.pred_original_sample
            ):
                sums[:, :, rows, columns] += view
                clean[:, :, rows, columns] += estimate
        self.latents, self.best = sums / self._count, clean / self._count


def windows(
    space: Sequence[int], window: int | Sequence[int], stride: int | None = None
) -> list[tuple[slice, slice]]:
    """Rows and columns of the windows that cover (height, width), row by row.

    The last window of a row or column ends where the space ends.

    Args:
        space: (height, width).
        window: the side of a window, or its (height, width).
        stride: from one window to the next. None is half a window.

    Raises:
        ValueError: `stride` is larger than the window, which leaves gaps, or below 1, or `window` is.
    """
    sides = (window, window) if isinstance(window, int) else tuple(window)
    for side in sides:
        require_count("window", side, 1)
    if stride is not None and (type(stride) is not int or not 1 <= stride <= min(sides)):
        raise ValueError(f"stride: expected 1 to the window's {min(sides)} latents, got {stride!r}")
    rows, columns = (
        [
            slice(start, start + side)
            for start in [*range(0, max(whole - side, 0), stride or max(side // 2, 1)), max(whole - side, 0)]
        ]
        for whole, side in zip(space, sides)
    )
    return [(row, column) for row in rows for column in columns]
