"""Write sample pictures for the model inside the package, with the part label of every pixel.

Each scene gives SEED.png and SEED-labels.png. The pixel values of the second file are the labels, and a
palette shows them in colours. --sheet also draws up to 24 scenes above their labels, and needs matplotlib.
Scenes with even seeds are for training. Scenes with odd seeds are held out.

examples:
  python -m qalign scenes --count 12 --out scenes
  python -m qalign scenes --count 24 --sheet sheet.png --out scenes
  python -m qalign scenes --count 4 --held-out --seed 100 --size 512 --out large
"""

import argparse
from pathlib import Path
from typing import Any

from ._shared import Files, count, given_files, picture_path, replacing, say, seed, write

NEEDS = ("PIL", "numpy")
OPTION_NEEDS = {"sheet": ("matplotlib",)}
SHEET = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--count", type=count, default=12, metavar="N", help="number of scenes (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="number of the first scene (default: %(default)s)"
    )
    parser.add_argument(
        "--held-out", action="store_true", help="write scenes that the model was not trained on"
    )
    parser.add_argument(
        "--size",
        type=count,
        default=128,
        metavar="PIXELS",
        help="side of the pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("scenes"),
        metavar="DIR",
        help="folder for the pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--sheet", type=picture_path, metavar="SHEET.png", help="also draw the first 24 scenes as one figure"
    )


def files(options: argparse.Namespace) -> Files:
    return Files(writes=given_files(options, "sheet"), folders=[("--out", options.out)])


def run(options: argparse.Namespace) -> int:
    from ..embedded.scenes import PARTS, held_out_seed, render, training_seed
    from ..evaluation.images import label_picture, to_image

    chosen = held_out_seed if options.held_out else training_seed
    seeds = [chosen(options.seed + number) for number in range(options.count)]
    shown: list[tuple[Any, Any, str]] = []
    for place in seeds:
        scene = render([place], options.size)
        for name, picture in (
            (f"{place:04}.png", to_image(scene.image[0])),
            (f"{place:04}-labels.png", label_picture(scene.labels[0])),
        ):
            with replacing(options.out / name) as temporary:
                picture.save(temporary)
        if len(shown) < SHEET:
            shown.append((scene.image[0], scene.labels[0], f"{place}: {scene.captions[0]}"))
    names = f"{seeds[0]:04}.png to {seeds[-1]:04}.png"
    say(f"scenes: {options.count} pictures and their labels in {options.out}, {names}")
    say("labels: " + ", ".join(f"{number} {part}" for number, part in enumerate(PARTS)))
    if options.sheet:
        from ..evaluation.plots import contact_sheet

        title = "Held-out scenes" if options.held_out else "Scenes for training"
        write("contact sheet", contact_sheet(*zip(*shown), names=PARTS, title=title), options.sheet)
    return 0
