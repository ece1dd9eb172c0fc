"""Compare all methods of appearance transfer on one pair of pictures.

The command writes one grid, with time, peak memory and leakage at each picture, and prints these figures as
a table. Leakage needs part labels: those of --scenes, or the files SEED-labels.png beside pictures that
`scenes` wrote. Each time is one run.

examples:
  python -m qalign compare --scenes 0 --out compare.png
  python -m qalign compare --appearance scenes/0001.png --structure scenes/0003.png --out compare.png
  python -m qalign compare --model ./stable-diffusion-v1-5 --size 512 --steps 50 --out compare.png \\
      --prompt "a photo of a zebra" --appearance zebra.jpg --structure horse.jpg
"""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ._shared import (
    COMPARED,
    METHODS,
    Files,
    Reading,
    add_model_arguments,
    count,
    given_files,
    load_pipeline,
    method_name,
    picture_path,
    read_pictures,
    require_pair,
    say,
    seed,
    size,
    title_of,
    write,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation.method_comparison import Compared

NEEDS = ("diffusers", "transformers", "PIL", "matplotlib", "psutil")
READINGS = (Reading(("size",), lambda options: options.scenes is None, "without --scenes"),)
HEAD = ("method", "time s", "peak MiB", "own part ↑", "on background ↓", "colour error ↓")
LEGEND = """\
own part, on background: object attention in its own part, and on background; - if unknown
colour error: of the parts, relative to the untouched structure; ↑ more is better, ↓ less is better"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument(
        "--appearance", type=Path, metavar="A.png", help="picture with the colours and textures"
    )
    pictures.add_argument("--structure", type=Path, metavar="B.png", help="picture with the layout")
    pictures.add_argument(
        "--scenes",
        type=seed,
        metavar="SEED",
        help="use two held-out scenes in place of --appearance and --structure",
    )
    pictures.add_argument(
        "--size",
        type=size,
        metavar="S|WxH",
        help="scale and crop both pictures to this size, multiples of 8 (default: their own)",
    )
    pictures.add_argument(
        "--out",
        type=picture_path,
        default=Path("compare.png"),
        metavar="GRID.png",
        help="grid to write (default: %(default)s)",
    )
    run = parser.add_argument_group("transfer")
    run.add_argument(
        "--method",
        nargs="+",
        type=method_name,
        metavar="NAME",
        help=f"methods to compare: {', '.join(METHODS)}, or package.module:Class for your own (default: all)",
    )
    run.add_argument("--prompt", default="", help="what the pictures show")
    run.add_argument(
        "--steps", type=count, default=20, metavar="N", help="denoising steps (default: %(default)s)"
    )
    run.add_argument("--seed", type=seed, default=0, help="seed of the noise (default: %(default)s)")
    add_model_arguments(parser)


def files(options: argparse.Namespace) -> Files:
    return Files(reads=given_files(options, "appearance", "structure"), writes=given_files(options, "out"))


def run(options: argparse.Namespace) -> int:
    given = require_pair(options)
    from ..context.layers import picture_size
    from ..evaluation.match_figures import held_out_scenes
    from ..evaluation.method_comparison import compare_methods
    from ..evaluation.plots import comparison_grid
    from ..methods import TRANSFERS, find_method
    from ..pipelines.pictures import to_tensors

    prompt, labels = options.prompt, None
    if given:
        structure, appearance = to_tensors(
            read_pictures([options.structure, options.appearance], options.size), "pictures"
        )
        labels = labels_beside(options.appearance, options.structure, structure)
        pipe = load_pipeline(options)
    else:
        pipe = load_pipeline(options)
        structure, appearance, (of_structure, of_appearance), caption = held_out_scenes(
            options.scenes, picture_size(pipe)
        )
        labels, prompt = (of_appearance, of_structure), prompt or caption
    pipe.set_progress_bar_config(disable=True)
    names = options.method or [*COMPARED, *(name for name in METHODS if name not in COMPARED)]
    methods = {name: find_method(name, TRANSFERS)() for name in names}
    compared = compare_methods(
        pipe,
        appearance,
        structure,
        prompt,
        labels=labels,
        methods=methods,
        num_inference_steps=options.steps,
        seed=options.seed,
        callback=_announce,
    )
    for line in table(compared):
        say(line)
    titles = {"structure": structure, "appearance": appearance} | {
        caption_of(name, each): each.picture for name, each in compared.items()
    }
    write(
        "grid",
        comparison_grid(titles, title="The structure of the first picture with the appearance of the second"),
        options.out,
    )
    return 0


def labels_beside(appearance: Path, structure: Path, picture: "Tensor") -> "tuple[Tensor, Tensor] | None":
    """The label maps that `scenes` wrote beside both pictures, or None if they do not fit."""
    from ..context.regions import read_labels

    beside = [path.with_name(f"{path.stem}-labels.png") for path in (appearance, structure)]
    if not all(path.is_file() for path in beside):
        return None
    first, second = (read_labels(path) for path in beside)
    return (first, second) if first.shape == second.shape == picture.shape[1:] else None


def table(compared: "dict[str, Compared]") -> list[str]:
    lines = ["".join([f"{HEAD[0]:<24}", *(f"{title:>16}" for title in HEAD[1:])])]
    for name, each in compared.items():
        cells = (
            f"{each.time_s:.2f}",
            f"{each.peak_mib:.0f}",
            *map(_figure, (each.own_part_mass, each.object_background_leakage, each.colour_ratio)),
        )
        lines.append("".join([f"{title_of(name):<24}", *(f"{cell:>16}" for cell in cells)]))
    return [*lines, *LEGEND.splitlines()]


def caption_of(name: str, each: "Compared") -> str:
    lines = [title_of(name), f"{each.time_s:.1f} s, {each.peak_mib:.0f} MiB"]
    if not math.isnan(each.colour_ratio):
        lines.append(f"own part {_figure(each.own_part_mass)}, colour error {_figure(each.colour_ratio)}")
    return "\n".join(lines)


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _announce(name: str) -> None:
    sys.stderr.write(f"compare: {title_of(name)}\n")
