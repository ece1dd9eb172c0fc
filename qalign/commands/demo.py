"""Show Q-Align in a few minutes: its cost on photographs, and its effect on pictures with known parts.

The first part is one denoising step over two photographs, by networks with the geometry of Stable Diffusion
1.5 and random weights: without edits, with Q-Align by its formula, and with Q-Align as shipped. The second
part is appearance transfer between scenes, on the trained model inside the package: by Cross-Image
attention, by Q-Align, and by this library's variant QAlignWarp, with the matches behind them and their
leakage. Nothing is downloaded.

examples:
  python -m qalign demo
  python -m qalign demo --only transfer --pairs 12 --out demo_out
"""

import argparse
import time
from pathlib import Path

from ._demo_step import show_step
from ._demo_transfer import show_transfer
from ._shared import Files, Reading, count, say, seed

NEEDS = ("diffusers", "transformers", "PIL", "accelerate", "matplotlib", "psutil", "skimage")
PARTS = ("step", "transfer")
READINGS = (
    Reading(("size",), lambda options: options.only != "transfer", "without --only transfer"),
    Reading(("pairs",), lambda options: options.only != "step", "without --only step"),
)
INTRODUCTION = """\
This demo shows what Q-Align costs (one denoising step over two photographs) and what it does
(appearance transfer between two scenes, on the small model inside the package).
It takes a few minutes on a CPU, and nothing is downloaded."""
PICTURES = {  # of each part, with what they show
    "step": {"correspondences.png": "matches between the photographs, beside the known truth"},
    "transfer": {
        "transfer.png": "structure, appearance, and the outputs of Cross-Image, Q-Align and QAlignWarp",
        "transfer_matches.png": "matches of the first pair: green lines end in the right part",
        "heat_maps.png": "where three points of the structure look in the appearance",
        "leakage.png": "attention outside the right part, by layer and step: lower is better",
    },
}
NUMBERS = {"step": "demo.json", "transfer": "leakage.json"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_out"),
        metavar="DIR",
        help="folder for pictures and figures (default: %(default)s)",
    )
    parser.add_argument("--only", choices=PARTS, help="run one of the two parts (default: both)")
    parser.add_argument(
        "--size",
        type=side,
        default=512,
        metavar="PIXELS",
        help="side of the photographs, a multiple of 32 (default: %(default)s)",
    )
    parser.add_argument(
        "--pairs",
        type=count,
        default=6,
        metavar="N",
        help="number of scene pairs whose leakage is measured (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="seed of weights, noise and scenes (default: %(default)s)"
    )


def side(text: str) -> int:
    """A picture size: a multiple of 32 pixels, so that the latent grid can be halved twice."""
    value = int(text) if text.isdigit() else 0
    if value < 64 or value % 32:
        raise argparse.ArgumentTypeError(f"expected a multiple of 32 from 64, got {text!r}")
    return value


def parts_of(options: argparse.Namespace) -> list[str]:
    return [part for part in PARTS if options.only in (None, part)]


def files(options: argparse.Namespace) -> Files:
    names = [name for part in parts_of(options) for name in (*PICTURES[part], NUMBERS[part])]
    return Files(writes=[("--out", options.out / name) for name in names])


def run(options: argparse.Namespace) -> int:
    begin = time.perf_counter()
    parts = parts_of(options)
    say(INTRODUCTION)
    if "step" in parts:
        show_step(options.out, options.size, options.seed)
    if "transfer" in parts:
        show_transfer(options.out, options.pairs, options.seed)
    say(f"\nfinished in {time.perf_counter() - begin:.0f} s; look at")
    for part in reversed(parts):
        for name, shows in PICTURES[part].items():
            say(f"  {str(options.out / name):<{len(str(options.out)) + 22}} {shows}")
    return 0
