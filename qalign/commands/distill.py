"""Give a picture the textures and colours of a style picture, by attention distillation.

The latents move until self-attention gives the result that it would give with the style's keys and values.
The mode "optimise" moves clean latents. The mode "sample" draws a picture from a prompt and moves its
latents at every step. Without --content, the picture is new. --mask gives label maps of style and output,
with one channel or a palette: each label then takes from the same label, and a new picture has the size of
its label map. Ctrl-C stops and writes the picture so far.

examples:
  python -m qalign distill --style A.png --content B.png --size 128 --steps 100 --out O.png
  python -m qalign distill --style scenes/0001.png --content scenes/0003.png --out O.png \\
      --mask scenes/0001-labels.png scenes/0003-labels.png
  python -m qalign distill --style A.png --content B.png --size 128 --tune-decoder --out O.png
  python -m qalign distill --style A.png --mask A-labels.png O-labels.png --steps 300 --out O.png
  python -m qalign distill --style A.png B.png --mode sample --size 128 --prompt "a bird" --out O.png
  python -m qalign distill --model ./stable-diffusion-v1-5 --size 512 --style A.jpg --content B.jpg \\
      --content-weight 0.25 --out O.png
"""

import argparse
from pathlib import Path

from ._distillation import add_run_arguments, read_regions, report, run_settings
from ._shared import (
    Files,
    Reading,
    add_model_arguments,
    given_files,
    load_pipeline,
    number,
    picture_path,
    read_pictures,
    size,
)

MODES = ("optimise", "sample")


def _optimised(options: argparse.Namespace) -> bool:
    return options.mode == "optimise"


READINGS = (
    Reading(("prompt", "no_adain"), lambda options: options.mode == "sample", "with --mode sample"),
    Reading(
        ("guidance",),
        lambda options: options.mode == "sample" and options.prompt != "",
        "with --mode sample and a --prompt",
    ),
    Reading(("content_weight",), lambda options: options.content is not None, "with --content"),
    Reading(
        ("from_noise",),
        lambda options: _optimised(options) and options.content is not None,
        "with --mode optimise and --content",
    ),
    Reading(("anneal",), _optimised, "with --mode optimise"),
    Reading(
        ("seed",),
        lambda options: not _optimised(options) or options.content is None or options.from_noise,
        "with --mode sample, with --from-noise or without --content (nothing else draws noise)",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument(
        "--style",
        "--appearance",
        type=Path,
        required=True,
        nargs="+",
        metavar="A.png",
        help="style: one or several pictures with the textures and colours",
    )
    pictures.add_argument(
        "--content",
        type=Path,
        metavar="B.png",
        help="picture with the content (default: none, for a new picture)",
    )
    pictures.add_argument(
        "--mask",
        type=Path,
        nargs=2,
        metavar=("A-labels.png", "O-labels.png"),
        help="label maps of style and output",
    )
    pictures.add_argument("--out", type=picture_path, required=True, metavar="O.png", help="picture to write")
    pictures.add_argument(
        "--size",
        type=size,
        metavar="S|WxH",
        help="scale and crop all pictures to this size, multiples of 8 (default: their own)",
    )
    add_run_arguments(parser)
    _add_mode(parser)
    add_model_arguments(parser)


def _add_mode(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("mode")
    run.add_argument("--mode", choices=MODES, default="optimise", help="default: %(default)s")
    run.add_argument("--prompt", default="", help="prompt of --mode sample")
    run.add_argument(
        "--guidance",
        type=number,
        default=7.5,
        metavar="S",
        help="classifier-free guidance scale of --mode sample (default: %(default)s)",
    )
    run.add_argument(
        "--content-weight",
        type=number,
        default=0.2,
        metavar="L",
        help="weight of the loss that keeps the content's queries (default: %(default)s)",
    )
    run.add_argument(
        "--no-adain", action="store_true", help="without AdaIN of the latents to the style, in --mode sample"
    )
    run.add_argument(
        "--from-noise", action="store_true", help="start --mode optimise from noise, not from the content"
    )
    run.add_argument(
        "--anneal",
        action="store_true",
        help="let the rate of --mode optimise fall to 0, for a picture with less noise",
    )


def files(options: argparse.Namespace) -> Files:
    return Files(reads=given_files(options, "style", "content", "mask"), writes=given_files(options, "out"))


def run(options: argparse.Namespace) -> int:
    if options.mask and len(options.style) > 1:
        raise ValueError(f"--mask: expected one --style with it, got {len(options.style)}")
    pictures = read_pictures([*options.style, *([options.content] if options.content else [])], options.size)
    from ..methods.attention_distillation import AttentionDistillation
    from ..pipelines import AttentionDistillationPipeline

    regions = None
    if options.mask:
        regions = read_regions(
            options.mask,
            pictures[0].size,
            pictures[-1].size if options.content else None,
            options.size,
            options.size,
        )
    pipe = AttentionDistillationPipeline.from_pipe(load_pipeline(options))
    result = pipe(
        pictures[: len(options.style)],
        pictures[-1] if options.content else None,
        options.prompt,
        mode=options.mode,
        method=AttentionDistillation(content_weight=options.content_weight),
        guidance_scale=options.guidance,
        adain=not options.no_adain,
        initial="noise" if options.from_noise else "content",
        anneal=options.anneal,
        regions=regions,
        **run_settings(options),
    )
    return report(result, options.out)
