"""Draw a picture with each subject in a box of its own, by bounded attention: subjects see neither each other nor each other's words.

In the first steps the latents are moved until the subjects' attention lies in their boxes; later masks that follow the subjects take the boxes'
place. A box is x0 y0 x1 y1, fractions of the width and height from the upper left corner; the last one is in front. Ctrl-C writes what there is.

examples:
  python -m qalign bound --prompt "a photo of two birds" --box bird 0.05 0.3 0.45 0.9 --box bird 0.55 0.3 0.95 0.9 --out O.png
  python -m qalign bound --prompt "a photo of two fish" --box fish 0.3 0.05 0.7 0.45 --box fish 0.3 0.55 0.7 0.95 --labels-out L.png --out O.png
  python -m qalign bound --model ./stable-diffusion-xl-base-1.0 --dtype float16 --prompt "a red cat and a grey dog on a sofa" \\
      --box "red cat" 0.05 0.3 0.45 0.9 --box "grey dog" 0.55 0.3 0.95 0.9 --out O.png
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

EMBEDDED_RATES = (
    100.0,
    25.0,
)  # those of Stable Diffusion hardly move the small model's latents (python -m benchmarks bounded)

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
        help="words of the prompt (their plural in s will do), and where what they name belongs; once for each subject",
    )
    pictures.add_argument("--out", type=picture_path, required=True, metavar="O.png", help="where to")
    pictures.add_argument(
        "--labels-out",
        type=label_path,
        metavar="L.png",
        help="also the subjects' masks in the end: 1 the first, 0 none",
    )
    pictures.add_argument(
        "--size", type=size, metavar="S|WxH", help="in pixels, multiples of 8 (default: the model's own)"
    )

    run = parser.add_argument_group("guidance")
    run.add_argument("--steps", type=count, default=50, metavar="N", help="of DDIM (default: %(default)s)")
    run.add_argument(
        "--guidance", type=number, default=7.5, metavar="S", help="of the prompt (default: %(default)s)"
    )
    run.add_argument(
        "--rates",
        type=number,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="of the descent in the first guided step and the last (default: as published, of the embedded model "
        f"{EMBEDDED_RATES[0]:g} {EMBEDDED_RATES[1]:g}); larger ones obey more and look worse",
    )
    run.add_argument(
        "--iterations",
        type=whole,
        metavar="M",
        help="at most, in each guided step; 0: masks alone (default: 5, as published)",
    )
    run.add_argument(
        "--layers",
        nargs="+",
        metavar="NAME",
        help="in which the loss is read: names, patterns (default: as published)",
    )
    run.add_argument("--keep-boxes", action="store_true", help="do not let masks take the boxes' place")
    run.add_argument("--seed", type=seed, default=0, help="of the noise (default: %(default)s)")
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
