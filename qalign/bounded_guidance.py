"""Bounded attention's guidance: latents descend until each subject's attention stays in its region, measured without a map."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from qalign_kernels import label_mass

from .control import attach, find_unet, select_layers
from .distillation import AttentionReader, frozen, gradient
from .inversion import denoise_step
from .layout import BatchLayout
from .methods.attention_distillation import Features
from .methods.bounded import BoundedAttention
from .regions import Regions, labels_of_tokens

_TINY = torch.finfo(torch.float32).tiny
_ALONE = BatchLayout("output", guidance=False)


@dataclass(frozen=True, kw_only=True)
class BoundedGuidance:
    """When and how far latents are guided.

    Args:
        rates: of the descent at the first guided step and at the last, linear between; published are (8, 2) for SD 1.5 and (18, 5) for SDXL.
        until: the fraction of the steps that are guided, 15 of 50.
        iterations: at most so many in each of them.
        enough: the loss below which there are no more.

    Source: Bounded Attention, arXiv 2403.16990.
    Not here: the part of the loss on cross-attention, and the refinement of boxes to masks.
    """

    rates: tuple[float, float] = (8.0, 2.0)
    until: float = 15 / 50
    iterations: int = 5
    enough: float = 0.2

    def rate(self, step: int, total: int) -> float | None:
        """Of a step; None where it is not guided.

        >>> [BoundedGuidance(until=0.3).rate(step, 10) for step in range(4)]
        [8.0, 5.0, 2.0, None]
        """
        guided = round(self.until * total)
        if not 0 <= step < guided:
            return None
        first, last = self.rates
        return first + (last - first) * step / max(guided - 1, 1)

    def loss(self, features: Features, regions: Regions) -> Tensor:
        """How far the subjects' self-attention is from its regions, 0 to 0.5: a float32 scalar, differentiable in queries and keys.

        fg_s = Σ_{heads, i in s} P(i -> s),  bg_s = Σ_{heads, i in background} P(i -> s),  means over layers;
        IoU_s = fg_s / (fg_s + S bg_s),  loss = 0.5 / S Σ_s (1 - IoU_s)²

        P is bounded attention, in which a subject's token sees its subject and the background only: from plain masses m, m_s / (m_s + m_background).

        Args:
            features: of one row, by layer.
            regions: `structure`, the subjects' labels, and `background`, the label that is no subject's.

        Raises:
            ValueError: regions without background, or without subjects.
        """
        if regions.structure is None or regions.background is None:
            raise ValueError("regions: expected Regions(structure=..., background=...), got one of them None")
        subjects = [label for label in regions.structure.unique().tolist() if label != regions.background]
        if not subjects:
            raise ValueError(f"regions: expected a subject beside the background {regions.background}, got none")
        inside, outside = [], []
        for layer in features.values():
            ids = _class_ids(regions.structure, subjects, layer.query.shape[2]).to(layer.query.device)
            mass = label_mass(layer.query, layer.key, ids[None], len(subjects) + 1, scale=layer.scale)  # [1, H, N, 1 + S], background first
            members = F.one_hot(ids.long(), len(subjects) + 1).to(mass)
            own = mass[..., 1:] / (mass[..., 1:] + mass[..., :1]).clamp(min=_TINY)
            inside.append((members[:, 1:] * own).sum((0, 1, 2)))
            outside.append((members[:, :1] * mass[..., 1:]).sum((0, 1, 2)))
        foreground, background = torch.stack(inside).mean(0), torch.stack(outside).mean(0)
        overlap = foreground / (foreground + len(subjects) * background).clamp(min=_TINY)
        return 0.5 * (1 - overlap).square().mean()

    def default_layers(self, names: Sequence[str]) -> list[str]:
        """Published: of SD 1.5 the mid block and the decoder's first with attention, of SDXL six early ones in up_blocks.0."""
        decoder = [name for name in names if name.startswith("up_blocks.")]
        first = [name for name in decoder if name.split(".")[1] == decoder[0].split(".")[1]]
        return first[1:7] if len(first) > 6 else [name for name in names if name.startswith("mid_block.")] + first


def guided_sample(
    pipe: Any,
    latents: Tensor,
    prompt: str,
    regions: Regions,
    *,
    guidance: BoundedGuidance | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    layers: str | Sequence[str] | None = None,
    told: Callable[[int, float], None] = lambda step, loss: None,
) -> Tensor:
    """Clean latents [1, C, h, w] of a prompt, by DDIM under bounded attention, guided at the first steps.

    Before each guided step at most `iterations` times, while the loss is `enough` or more: x <- x - rate · ∂loss/∂x, of the prompt's half.

    >>> latents = guided_sample(pipe, torch.randn(1, 4, 32, 32), "a photo of two birds", Regions(structure=boxes, background=0))

    Args:
        pipe: an `AppearanceTransferPipeline`, whose components are used.
        latents: [1, C, h, w], noise.
        regions: `structure`, the subjects' labels, and `background`.
        guidance: the settings; None is `BoundedGuidance()`.
        guidance_scale: of the prompt against the empty one.
        layers: in which the loss is read, as `attach`; None is `BoundedGuidance.default_layers`. Attention is bounded in all.
        told: called with the step and the loss before each iteration.

    Raises:
        ValueError: a bad argument, named. FloatingPointError: NaN or infinity in predictions or gradients.
    Source: Bounded Attention, arXiv 2403.16990.
    """
    guidance = BoundedGuidance() if guidance is None else guidance
    if latents.ndim != 4 or len(latents) != 1:
        raise ValueError(f"latents: expected [1, C, h, w], got {list(latents.shape)}")
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    with torch.no_grad():
        condition, unconditional = pipe.conditions(prompt, *(side * pipe.vae_scale_factor for side in latents.shape[-2:]))
    everywhere = list(select_layers(find_unet(pipe), "*", BoundedAttention()))
    read = AttentionReader(pipe, guidance.default_layers(everywhere) if layers is None else layers, method=BoundedAttention(), regions=regions)
    others = [name for name in everywhere if name not in read.layers]
    bounded = attach(find_unet(pipe), BoundedAttention(), layout=_ALONE, layers=others, regions=regions) if others else contextlib.nullcontext()
    latents = latents.float()
    with torch.no_grad(), frozen(pipe.unet), bounded, read:
        for step, timestep in enumerate(scheduler.timesteps):
            rate = guidance.rate(step, num_inference_steps)
            for _ in range(0 if rate is None else guidance.iterations):
                with torch.enable_grad():
                    moving = latents.detach().requires_grad_()
                    loss = guidance.loss(read(moving, timestep, condition), regions)
                told(step, loss.item())
                if loss.item() < guidance.enough:
                    break
                latents = latents - rate * gradient(loss, moving)  # type: ignore[operator]
            base, output = (pipe.predict(latents, timestep, each) for each in (unconditional, condition))
            latents = denoise_step(scheduler, base + guidance_scale * (output - base), timestep, latents)
    return latents


def _class_ids(labels: Tensor, subjects: Sequence[int], tokens: int) -> Tensor:
    """int32 [N]: 0 for the background, 1 to S for the subjects, of the label in the middle of each token."""
    found = labels_of_tokens(labels, tokens).flatten()
    return sum((number * (found == label).int() for number, label in enumerate(subjects, 1)), torch.zeros_like(found, dtype=torch.int32))
