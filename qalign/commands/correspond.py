"""Draw which tokens of two pictures match, by the queries (Q-Align) and by queries and keys (Cross-Image).

The command writes correspondences.png with matches as lines between the pictures, and heat_maps.png with
the places where given points look. With --scenes, the pictures are two held-out scenes with known parts.
Lines are then green if they end in the same part, and the fraction of these matches is printed.

examples:
  python -m qalign correspond --scenes 0 --out matches
  python -m qalign correspond --structure b.png --appearance a.png --size 128 --point 40,64 --out matches
  python -m qalign correspond --model ./stable-diffusion-v1-5 --size 512 --layer up_blocks.2 --noise 0.25 \\
      --prompt "a photo of a horse" --structure horse.jpg --appearance zebra.jpg --out matches
"""

import argparse
from pathlib import Path

from ._shared import (
    SIDE,
    Files,
    Reading,
    add_model_arguments,
    count,
    given_files,
    load_pipeline,
    number,
    read_pictures,
    require_pair,
    say,
    seed,
    size,
    write,
)

NEEDS = ("diffusers", "transformers", "PIL", "matplotlib")
READINGS = (Reading(("size",), lambda options: options.scenes is None, "without --scenes"),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument("--structure", type=Path, metavar="B.png", help="picture where the lines begin")
    pictures.add_argument("--appearance", type=Path, metavar="A.png", help="picture where the lines end")
    pictures.add_argument(
        "--scenes",
        type=seed,
        metavar="SEED",
        help="use two held-out scenes in place of --structure and --appearance",
    )
    pictures.add_argument(
        "--size",
        type=size,
        metavar="S|WxH",
        help="scale and crop both pictures to this size, multiples of 8 (default: their own)",
    )
    pictures.add_argument(
        "--out",
        type=Path,
        default=Path("correspond_out"),
        metavar="DIR",
        help="folder for both figures (default: %(default)s)",
    )
    shown = parser.add_argument_group("what is shown")
    shown.add_argument(
        "--point",
        type=point,
        action="append",
        metavar="X,Y",
        help="a point for the heat maps, in pixels of the structure; may be repeated",
    )
    shown.add_argument(
        "--lines", type=count, default=80, metavar="N", help="largest number of lines (default: %(default)s)"
    )
    shown.add_argument(
        "--layer",
        metavar="NAME",
        help=f"a self-attention layer or pattern (default: of the decoder, nearest to {SIDE}x{SIDE} tokens)",
    )
    shown.add_argument(
        "--noise",
        type=number,
        default=0.3,
        metavar="F",
        help="timestep as a fraction of the training timesteps (default: %(default)s)",
    )
    shown.add_argument("--prompt", default="", help="what the pictures show")
    shown.add_argument("--seed", type=seed, default=0, help="seed of the noise (default: %(default)s)")
    add_model_arguments(parser)


def point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a point such as 40,64, got {text!r}") from None
    return x, y


def files(options: argparse.Namespace) -> Files:
    writes = [("--out", options.out / name) for name in ("correspondences.png", "heat_maps.png")]
    return Files(reads=given_files(options, "appearance", "structure"), writes=writes)


def run(options: argparse.Namespace) -> int:
    given = require_pair(options)
    if not 0 < options.noise < 1:
        raise ValueError(f"--noise: expected a fraction between 0 and 1, got {options.noise:g}")
    import torch

    from ..context.layers import picture_size
    from ..evaluation import match_figures
    from ..evaluation.correspondence import compare
    from ..pipelines.pictures import to_tensors

    labels, prompt = None, options.prompt
    if given:
        structure, appearance = to_tensors(
            read_pictures([options.structure, options.appearance], options.size), "pictures"
        )
        pipe = load_pipeline(options)
    else:
        pipe = load_pipeline(options)
        structure, appearance, labels, caption = match_figures.held_out_scenes(
            options.scenes, picture_size(pipe)
        )
        prompt = prompt or caption
    height, width = structure.shape[1:]
    for x, y in options.point or ():
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"--point: expected pixels inside {width}x{height}, got {x:g},{y:g}")
    captures = compare(
        pipe, structure, appearance, prompt, noise=options.noise, layers=options.layer, seed=options.seed
    )
    shown = captures[0] if options.layer else match_figures.choose(captures, SIDE)
    lines, shares = match_figures.draw_lines(shown, structure, appearance, labels, most=options.lines)
    for signal, share in shares.items():
        say(f"{signal}: {share:.1%} of the object's tokens match their own part, in {shown.layer}")
    points = (
        torch.tensor(options.point)
        if options.point
        else match_figures.default_points(shown, structure, labels)
    )
    write("correspondences", lines, options.out / "correspondences.png")
    write(
        "heat maps",
        match_figures.draw_heat_maps(shown, structure, appearance, points, labels),
        options.out / "heat_maps.png",
    )
    return 0
