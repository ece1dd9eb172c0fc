"""Make a texture of any size by attention distillation, in overlapping windows of the model's own size.

The time grows with the number of windows, the memory hardly. --mask gives label maps of texture and output,
with one channel or a palette: each label then takes from the same label. Ctrl-C stops and writes the
picture so far.

examples:
  python -m qalign texture --style A.png --size 768x256 --steps 20 --out O.png
  python -m qalign texture --style A.png --mask A-labels.png O-labels.png --steps 20 --out O.png
  python -m qalign texture --model ./stable-diffusion-v1-5 --dtype float16 --style A.jpg --size 2048x1024 \\
      --stride 16 --out O.png
"""

import argparse
from pathlib import Path

from ._distillation import add_run_arguments, read_regions, report, run_settings
from ._shared import (
    Files,
    add_model_arguments,
    count,
    given_files,
    load_pipeline,
    picture_path,
    read_pictures,
    size,
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
        help="one or several pictures of the texture",
    )
    pictures.add_argument(
        "--style-size",
        type=size,
        metavar="S|WxH",
        help="scale and crop the texture to this size, multiples of 8 (default: its own)",
    )
    pictures.add_argument(
        "--size",
        type=size,
        metavar="S|WxH",
        help="size of the output in pixels, multiples of 8 (default: that of O-labels.png)",
    )
    pictures.add_argument(
        "--mask",
        type=Path,
        nargs=2,
        metavar=("A-labels.png", "O-labels.png"),
        help="label maps of texture and output",
    )
    pictures.add_argument("--out", type=picture_path, required=True, metavar="O.png", help="picture to write")
    add_run_arguments(parser)
    windows = parser.add_argument_group("windows")
    windows.add_argument(
        "--window",
        type=count,
        metavar="N",
        help="side of a window in latents (default: the model's own size)",
    )
    windows.add_argument(
        "--stride", type=count, metavar="N", help="distance of windows in latents (default: half a window)"
    )
    windows.add_argument(
        "--batch",
        type=count,
        default=8,
        metavar="N",
        help="number of windows in one call of the network (default: %(default)s)",
    )
    add_model_arguments(parser)


def files(options: argparse.Namespace) -> Files:
    return Files(reads=given_files(options, "style", "mask"), writes=given_files(options, "out"))


def run(options: argparse.Namespace) -> int:
    if options.size is None and options.mask is None:
        raise ValueError("--size: expected the size of the output, or --mask, got neither")
    if options.mask and len(options.style) > 1:
        raise ValueError(f"--mask: expected one --style with it, got {len(options.style)}")
    pictures = read_pictures(options.style, options.style_size)
    regions = (
        read_regions(options.mask, pictures[0].size, options.size, options.style_size, options.size)
        if options.mask
        else None
    )
    from ..pipelines import AttentionDistillationPipeline

    pipe = AttentionDistillationPipeline.from_pipe(load_pipeline(options))
    width, height = options.size or regions.structure.shape[::-1]  # type: ignore[union-attr]
    places = {"window": options.window, "stride": options.stride, "batch_size": options.batch}
    return report(
        pipe.expand(pictures, height, width, regions=regions, **places, **run_settings(options)), options.out
    )
