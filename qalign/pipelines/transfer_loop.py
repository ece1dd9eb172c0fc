"""The denoising loop of an appearance transfer: rows [outputs, appearance, structures]."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..context.adain import adain as adain_latents
from ..processors.attach import Control
from ..sampling.attention_maps import MOST_TOKENS, MapCollector
from ..sampling.denoising import denoise_step
from ..sampling.guidance import swap_guided
from ..sampling.object_masks import object_masks
from .base import Condition, StepCallback


@dataclass(frozen=True)
class Blend:
    """Set AdaIN of the outputs' latents.

    Attributes:
        kind: "masked" or "whole".
        start: the fraction of the steps at which it begins.
        noun: the places of the object's noun among the tokens of the prompt; empty without masks.
    """

    kind: str
    start: float
    noun: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TransferLoop:
    """Denoise outputs, appearance and structures together.

    Attributes:
        pipe: the pipeline.
        scheduler: set to the timesteps of the inversion.
        timesteps: int64 [T], those that run.
        noises: [T, B, C, h, w]; None where denoising is deterministic.
        eta: the weight of the noises.
        outputs: the number of output rows.
        condition: the prompt's, for one row.
        scales: float32 [T], the scale of swap guidance at each step; None leaves out the rows without the
            edit.
        blend: AdaIN; None is none.
        change: the method's `change_clean`; None changes nothing.
    """

    pipe: Any
    scheduler: DDIMScheduler
    timesteps: Tensor
    noises: Tensor | None
    eta: float
    outputs: int
    condition: Condition
    scales: Tensor | None
    blend: Blend | None
    change: Callable[[Tensor, Tensor, int], Tensor] | None

    def run(
        self, latents: Tensor, control: Control | None, callback: StepCallback
    ) -> tuple[Tensor, Tensor | None]:
        """The clean latents of all rows, and the masks of appearance and structures if any were made."""
        pipe, timesteps, masks = self.pipe, self.timesteps, None
        pipe._num_timesteps = len(timesteps)
        with control or contextlib.nullcontext(), pipe.progress_bar(total=len(timesteps)) as bar:
            for step, timestep in enumerate(timesteps if control is None else control.track(timesteps)):
                if pipe.interrupt:
                    break
                blend = self._blend_at(step)
                if blend is not None and blend.kind == "masked" and masks is None:
                    with self._collector(latents) as collector:
                        output = self._predict(latents, timestep, step)
                    masks = object_masks(collector.maps(), blend.noun)
                else:
                    output = self._predict(latents, timestep, step)
                latents = self._step(output, timestep, latents, step)
                if blend is not None:
                    latents = self._adain(latents, masks)
                changed = callback(pipe, step, timestep, latents)
                latents = latents if changed is None else changed
                bar.update()
        return latents, masks

    def _blend_at(self, step: int) -> Blend | None:
        begun = self.blend is not None and step / len(self.timesteps) >= self.blend.start
        return self.blend if begun else None

    def _predict(self, latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        """The UNet's output for every row, with swap guidance in the output rows."""
        n = self.outputs
        if self.scales is None:
            return self.pipe.predict(latents, timestep, self.condition)
        edited, plain, others = self.pipe.predict(
            torch.cat([latents[:n], latents]), timestep, self.condition
        ).split([n, n, n + 1])
        return torch.cat([swap_guided(plain, edited, self.scales[step]), others])

    def _step(self, output: Tensor, timestep: Tensor, latents: Tensor, step: int) -> Tensor:
        noise = None if self.noises is None else self.noises[step]
        change = self._change_at(timestep)
        return denoise_step(
            self.scheduler, output, timestep, latents, noise=noise, eta=self.eta, change=change
        )

    def _change_at(self, timestep: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The method's change of the outputs' clean estimate, as a function of the estimates of all rows."""
        change, n = self.change, self.outputs
        if change is None:
            return None
        number = int(timestep)
        return lambda clean: torch.cat([change(clean[:n], clean[n : n + 1], number), clean[n:]])

    def _collector(self, latents: Tensor) -> MapCollector:
        """A collector for appearance and structures, on the latents' own grid if the UNet attends there."""
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
