"""Draw a picture with each subject in a box, by bounded attention.

A subject attends neither the other subjects nor their words. In the first steps, the latents move until the
attention of each subject lies in its box. Later, masks that follow the subjects replace the boxes. A box is
x0 y0 x1 y1, in fractions of width and height from the upper left corner. Boxes may overlap. Ctrl-C stops and
writes the picture so far.

examples:
  python -m qalign bound --prompt "a photo of two birds" --out O.png \\
      --box bird 0.05 0.3 0.45 0.9 --box bird 0.55 0.3 0.95 0.9
  python -m qalign bound --prompt "a photo of two fish" --labels-out L.png --out O.png \\
      --box fish 0.3 0.05 0.7 0.45 --box fish 0.3 0.55 0.7 0.95
  python -m qalign bound --model ./stable-diffusion-xl-base-1.0 --dtype float16 --out O.png \\
      --prompt "a red cat and a grey dog on a sofa" \\
      --box "red cat" 0.05 0.3 0.45 0.9 --box "grey dog" 0.55 0.3 0.95 0.9
"""

import argparse
from typing import Any

from ._shared import (
    Files,
    Reading,
    add_model_arguments,
    count,
    given_files,
    label_path,
    load_pipeline,
    number,
    picture_path,
    say,
    seed,
    size,
    whole,
    write,
)

# The rates for Stable Diffusion hardly move the small model's latents (python -m benchmarks bounded).
EMBEDDED_RATES = (50.0, 12.5)

READINGS = (
    Reading(("rates",), lambda options: options.iterations != 0, "without --iterations 0"),
    Reading(
        ("layers",),
        lambda options: options.iterations != 0 or not options.keep_boxes,
        "without both --iterations 0 and --keep-boxes",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pictures = parser.add_argument_group("picture")
    pictures.add_argument("--prompt", required=True, help="what the picture shows")
    pictures.add_argument(
        "--box",
        nargs=5,
        action="append",
        required=True,
        metavar=("WORDS", "X0", "Y0", "X1", "Y1"),
        help="a subject: words of the prompt (or their singular), then its box; repeat for each subject",
    )
    pictures.add_argument("--out", type=picture_path, required=True, metavar="O.png", help="picture to write")
    pictures.add_argument(
        "--labels-out",
        type=label_path,
        metavar="L.png",
        help="also write the final masks of the subjects as labels: 1 for the first, 0 for none",
    )
    pictures.add_argument(
        "--size", type=size, metavar="S|WxH", help="size in pixels, multiples of 8 (default: the model's own)"
    )

    run = parser.add_argument_group("guidance")
    run.add_argument(
        "--steps", type=count, default=50, metavar="N", help="denoising steps of DDIM (default: %(default)s)"
    )
    run.add_argument(
        "--guidance",
        type=number,
        default=7.5,
        metavar="S",
        help="classifier-free guidance scale (default: %(default)s)",
    )
    run.add_argument(
        "--rates",
        type=number,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="rates of the descent in the first and last guided step; with larger rates the subjects follow "
        "the boxes more, and the picture looks worse (default: as published; for the embedded model "
        f"{EMBEDDED_RATES[0]:g} {EMBEDDED_RATES[1]:g})",
    )
    run.add_argument(
        "--iterations",
        type=whole,
        metavar="M",
        help="largest number of iterations in a guided step; 0 uses masks alone (default: 5, as published)",
    )
    run.add_argument(
        "--layers",
        nargs="+",
        metavar="NAME",
        help="layers of the loss: names or patterns (default: as published)",
    )
    run.add_argument("--keep-boxes", action="store_true", help="keep the boxes; do not replace them by masks")
    run.add_argument("--seed", type=seed, default=0, help="seed of the noise (default: %(default)s)")
    add_model_arguments(parser)


def files(options: argparse.Namespace) -> Files:
    return Files(writes=given_files(options, "out", "labels_out"))


def subjects_of(options: argparse.Namespace) -> list[tuple[str, tuple[float, ...]]]:
    subjects = []
    for words, *box in options.box:
        try:
            subjects.append((words, tuple(map(float, box))))
        except ValueError:
            raise ValueError(f"--box: expected WORDS X0 Y0 X1 Y1, got {words} {' '.join(box)}") from None
    return subjects


def run(options: argparse.Namespace) -> int:
    subjects = subjects_of(options)
    from dataclasses import replace

    import torch

    from ..pipelines import BoundedAttentionPipeline

    pipe = BoundedAttentionPipeline.from_pipe(load_pipeline(options))
    changed: dict[str, Any] = {}
    if options.rates or options.model == "embedded":
        changed["rates"] = tuple(options.rates or EMBEDDED_RATES)
    if options.iterations is not None:
        changed["iterations"] = options.iterations
    if options.keep_boxes:
        changed["refine_every"] = 0
    width, height = options.size or (None, None)
    result = pipe(
        options.prompt,
        subjects,
        guidance=replace(pipe.default_guidance, **changed),
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        layers=options.layers,
        height=height,
        width=width,
        generator=torch.Generator().manual_seed(options.seed),
    )
    write("picture", result.images[0], options.out)
    if options.labels_out:
        from ..evaluation.images import label_picture

        scaled = torch.nn.functional.interpolate(
            result.regions.structure[None, None].float(), result.images[0].size[::-1], mode="nearest-exact"
        )
        write("masks", label_picture(scaled[0, 0]), options.labels_out)
    if len(result.losses):
        first, last = result.losses[0, 1].item(), result.losses[-1, 1].item()
        say(f"loss: {first:.4g} to {last:.4g} in {len(result.losses)} readings")
    if result.interrupted:
        say("interrupted: the picture is the last estimate")
    return 130 if result.interrupted else 0
