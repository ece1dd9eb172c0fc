"""Bounded attention on the embedded model: two creatures in boxes at unusual places.

It compares the untouched model, masks alone, and guidance.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from qalign_kernels import _command_line
from qalign_kernels._files import Files, replacing

from . import method_report
from .method_report import MethodReport

LAYOUTS = {
    "above": ((0.25, 0.03, 0.75, 0.47), (0.25, 0.53, 0.75, 0.97)),
    "falling": ((0.03, 0.03, 0.48, 0.48), (0.52, 0.52, 0.97, 0.97)),
    "rising": ((0.52, 0.03, 0.97, 0.48), (0.03, 0.52, 0.48, 0.97)),
    "one large": ((0.03, 0.03, 0.66, 0.6), (0.7, 0.66, 0.97, 0.97)),
}
PROMPTS = {
    "quadruped": "a photo of two quadrupeds",
    "bird": "a photo of two birds",
    "fish": "a photo of two fish",
}
REFERENCES = 8  # held-out scenes of the same plan, which classify the tokens of a picture
OCCUPIED = 0.25  # the part of a box that must be creature
TIMESTEPS = (201, 401)  # of the denoising error
FIGURES = {
    "time_s": "s",
    "inside": "creature in boxes",
    "covered": "boxes covered",
    "background": "background covered",
    "both": "both occupied",
    "loss_first": "loss, first",
    "loss_last": "last",
    "denoising": "denoising error",
}
RATES = {
    "guided, as published": (8.0, 2.0),
    "guided, rates (50, 12.5)": (50.0, 12.5),
    "guided, rates (200, 50)": (200.0, 50.0),
}
METHODS = ("untouched", "masks alone", *RATES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pictures = "pictures by each method; 12 are every plan in every layout (default: %(default)s)"
    parser.add_argument("--pictures", type=_command_line.count, default=12, help=pictures)
    parser.add_argument(
        "--steps", type=_command_line.count, default=20, help="denoising steps of DDIM (default: %(default)s)"
    )
    parser.add_argument(
        "--guidance",
        type=_command_line.number,
        default=7.5,
        help="scale of classifier-free guidance (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        help="write the report there after every picture; figures that it already has are not measured again",
    )
    parser.add_argument(
        "--sheet",
        type=Path,
        help="draw the pictures of this run with their boxes, a row for each method",
    )


def files(arguments: argparse.Namespace) -> Files:
    return method_report.files(arguments)


def run(arguments: argparse.Namespace) -> int:
    settings = {"steps": arguments.steps, "guidance": arguments.guidance}
    report = MethodReport.open("pictures", settings, arguments.json)
    shown: dict[str, list[Any]] = {name: [] for name in METHODS}
    for number in range(arguments.pictures):
        plan, layout = (
            list(PROMPTS)[number % len(PROMPTS)],
            list(LAYOUTS)[number // len(PROMPTS) % len(LAYOUTS)],
        )
        found = report.methods(number, {"plan": plan, "layout": layout, "seed": number})
        for name in METHODS:
            if name not in found:
                found[name], picture = measure(plan, layout, number, name, **settings)
                shown[name].append((picture, LAYOUTS[layout]))
                report.save()
    if arguments.sheet is not None:
        draw([row for row in shown.values() if row], arguments.sheet)
    report.save(complete=True)
    print(report.table(METHODS, FIGURES))
    return 0


@functools.cache
def pipeline() -> Any:
    from qalign import BoundedAttentionPipeline

    pipe = BoundedAttentionPipeline.embedded()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def measure(
    plan: str, layout: str, seed: int, name: str, *, steps: int, guidance: float
) -> tuple[dict[str, float], Any]:
    """Make one picture by one method, and measure it. All methods get the same noise, prompt and scheduler.

    Shares are of the tokens of the latents. A token is creature where most layers of the decoder say so
    (`qalign.evaluation.picture_metrics.read_parts`). `denoising` is the model's mean squared error on the
    finished picture; it is larger for pictures that are less like the training data.

    Returns:
        The figures and the picture.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from qalign import BoundedGuidance

    pipe, prompt, boxes = pipeline(), PROMPTS[plan], LAYOUTS[layout]
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(seed))
    options: dict[str, Any] = {
        "latents": latents,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "output_type": "pt",
    }
    figures, begun = {}, time.perf_counter()
    if name == "untouched":
        components = pipe.components | {"scheduler": DDIMScheduler.from_config(pipe.scheduler.config)}
        stock = StableDiffusionPipeline(**components, requires_safety_checker=False)
        stock.set_progress_bar_config(disable=True)
        picture = stock(prompt, **options).images[0]
    else:
        rates = (
            {"rates": RATES[name]} if name in RATES else {"rates": (0.0, 0.0), "iterations": 1, "enough": 0.0}
        )
        subject = prompt.split()[-1]
        result = pipe(prompt, [(subject, box) for box in boxes], guidance=BoundedGuidance(**rates), **options)
        picture = result.images[0]
        figures = {"loss_first": result.losses[0, 1].item(), "loss_last": result.losses[-1, 1].item()}
    figures["time_s"] = time.perf_counter() - begun
    return figures | shares(creature(picture, plan), boxes) | {
        "denoising": denoising(picture, prompt)
    }, picture


def creature(picture: torch.Tensor, plan: str) -> torch.Tensor:
    """Find where a picture [3, S, S] shows a creature of a plan, bool [32, 32]."""
    from qalign.embedded.scenes import BACKGROUNDS
    from qalign.evaluation.picture_metrics import read_parts

    read = read_parts(pipeline(), picture[None], references(plan), PROMPTS[plan], seed=0)
    sides = {layer: int(found.shape[1] ** 0.5) for layer, found in read.items()}
    maps = [
        (found >= len(BACKGROUNDS)).float().view(1, 1, sides[layer], sides[layer])
        for layer, found in read.items()
    ]
    return torch.cat([F.interpolate(each, (32, 32), mode="bilinear") for each in maps]).mean((0, 1)) > 0.5


@functools.cache
def references(plan: str) -> Any:
    from qalign.embedded.scenes import held_out_seed, render

    seeds = [held_out_seed(number) for number in range(12 * REFERENCES)]
    return render([seed for seed, found in zip(seeds, render(seeds, 16).plans) if found == plan][:REFERENCES])


def shares(mask: torch.Tensor, boxes: Any) -> dict[str, float]:
    """Measure which parts of the boxes and of the background are creature, from its mask [h, w].

    `inside` is the part of the creature that is in the boxes. `both` is 1 where both boxes are occupied.
    """
    from qalign import Regions

    labels = Regions.from_boxes(boxes, *mask.shape).structure
    filled = [mask[labels == number].float().mean().item() for number in range(1, len(boxes) + 1)]
    return {
        "inside": (mask & (labels > 0)).sum().item() / max(mask.sum().item(), 1),
        "covered": sum(filled) / len(filled),
        "background": mask[labels == 0].float().mean().item(),
        "both": float(min(filled) >= OCCUPIED),
    }


def denoising(picture: torch.Tensor, prompt: str) -> float:
    """Measure the mean squared error of the predicted velocity for a noised picture, over `TIMESTEPS`."""
    pipe = pipeline()
    clean, condition = pipe.encode(picture[None]), pipe.conditions(prompt, *picture.shape[-2:])[0]
    noise, errors = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)), []
    for timestep in torch.tensor(TIMESTEPS):
        wanted = pipe.scheduler.get_velocity(clean, noise, timestep[None])
        errors.append(
            (
                pipe.predict(pipe.scheduler.add_noise(clean, noise, timestep[None]), timestep, condition)
                - wanted
            )
            .square()
            .mean()
            .item()
        )
    return sum(errors) / len(errors)


def draw(rows: Any, path: Path) -> None:
    from PIL import Image, ImageDraw

    from qalign.evaluation.images import to_image

    sheet = Image.new("RGB", (max(map(len, rows)) * 132, len(rows) * 132), "white")
    for y, row in enumerate(rows):
        for x, (picture, boxes) in enumerate(row):
            tile = to_image(picture)
            for box in boxes:
                ImageDraw.Draw(tile).rectangle([round(side * tile.width) for side in box], outline="white")
            sheet.paste(tile, (x * 132, y * 132))
    with replacing(path) as unfinished:
        sheet.save(unfinished, format="png")
