"""A transfer between two small seeded pictures, as the tests of the pipeline run it."""

import copy

import torch
import torch.nn.functional as F

from qalign import AppearanceTransferPipeline
from tests.processors.models import pipe_of, quiet

PIXELS = 32  # 16 x 16 latents: the tiny VAE halves once
PROMPT = "a zebra"


def make(family: str = "small"):
    return pipe_of(AppearanceTransferPipeline, family)


def own(pipe):
    """The same with networks that no other test shares."""
    copies = {
        name: copy.deepcopy(part)
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    return quiet(AppearanceTransferPipeline.from_pipe(pipe, **copies))


def pictures(count: int, height: int = PIXELS, width: int = PIXELS, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bilinear")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def transfer(pipe, structures: torch.Tensor | None = None, **options):
    appearance, structure = pictures(1)[0], pictures(1, seed=1) if structures is None else structures
    defaults = {
        "prompt": PROMPT,
        "num_inference_steps": 6,
        "output_type": "latent",
        "adain": "whole",
        "generator": seeded(),
    }
    return pipe(appearance, structure, **{**defaults, **options})


def watch(pipe, monkeypatch) -> list[torch.Tensor]:
    """The samples that the UNet receives from here on."""
    samples, forward = [], pipe.unet.forward

    def record(sample, *args, **kwargs):
        samples.append(sample)
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", record)
    return samples


def trajectory(pipe, **options) -> torch.Tensor:
    """[steps, rows, C, h, w], the latents after each step."""
    latents = []

    def keep(pipe, step, timestep, given):
        latents.append(given["latents"])

    transfer(pipe, callback_on_step_end=keep, **options)
    return torch.stack(latents)
