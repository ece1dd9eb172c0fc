"""Give one or more pictures the appearance of another picture.

Both pictures are inverted into noise and denoised together. In chosen self-attention layers, the output
attends keys and values of the appearance. The default method is Q-Align as in its paper. The model inside
the package knows pictures of 128x128 pixels: `python -m qalign scenes` writes some, and --size 128 scales
your own.

examples:
  python -m qalign transfer --appearance zebra.png --structure horse.png --size 128 --out out.png
  python -m qalign transfer --appearance a.png --structure b.png c.png --out o.png --grid grid.png
  python -m qalign transfer --appearance a.png --structure b.png --method qalign_warp --out o.png
  python -m qalign transfer --appearance a.png --structure b.png --method cross_image --steps 50 --out o.png
  python -m qalign transfer --appearance a.png --structure b.png --refinement topk --topk 4 --out o.png
  python -m qalign transfer --appearance a.png --structure b.png --prompt "a bird" --regions self --out o.png
  python -m qalign transfer --appearance a.png --structure b.png --regions la.png lb.png --out o.png
  python -m qalign transfer --model ./stable-diffusion-v1-5 --dtype float16 --size 512 --steps 100 \\
      --prompt "a photo of a zebra" --noun zebra --adain masked --cache inversions \\
      --appearance zebra.jpg --structure horse.jpg giraffe.jpg --out out.png
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from ._shared import (
    ALIGNED,
    METHODS,
    READ_BY_REFINEMENT,
    REFINEMENTS,
    Files,
    Reading,
    add_model_arguments,
    count,
    fraction,
    given_files,
    load_pipeline,
    method_name,
    number,
    picture_path,
    positive,
    read_label_map,
    read_pictures,
    refinement_of,
    seed,
    size,
    write,
)

OPTION_NEEDS = {"grid": ("matplotlib",)}
SETTINGS: dict[str, dict[str, Any]] = {
    "refinement": {
        "choices": REFINEMENTS,
        "help": "how attention of qalign uses the alignment (default: rearranged, as in the paper)",
    },
    "aligned": {
        "choices": ALIGNED,
        "help": "queries that are aligned (default: output for qalign, both for qalign_warp)",
    },
    "similarity": {
        "choices": ("cosine", "dot"),
        "help": "similarity of the alignment (default: cosine)",
    },
    "heads": {
        "choices": ("joint", "per_head"),
        "help": "one alignment for all heads together, or one for each head (default: joint)",
    },
    "topk": {
        "type": count,
        "metavar": "K",
        "help": "number of best-aligned tokens that a query attends, with --refinement topk",
    },
    "strength": {
        "type": number,
        "metavar": "TAU",
        "help": "weight of the alignment, with --refinement guided or soft",
    },
    "contrast": {
        "type": positive,
        "metavar": "C",
        "help": "contrast of the attention probabilities; 1 is no contrast",
    },
}


def _reads(name: str, *methods: str) -> Reading:
    """The reading of a setting that qalign uses with some refinements, and `methods` always."""
    refinements = READ_BY_REFINEMENT[name]

    def when(options: argparse.Namespace) -> bool:
        return (
            options.method in methods or options.method == "qalign" and refinement_of(options) in refinements
        )

    others = "".join(f", or with --method {method}" for method in methods)
    chosen = "" if refinements == REFINEMENTS else f" --refinement {' or '.join(refinements)}"
    return Reading((name,), when, f"with --method qalign{chosen}{others}")


READINGS = (
    Reading(("refinement",), lambda options: options.method == "qalign", "with --method qalign"),
    _reads("aligned", "qalign_warp"),
    _reads("similarity", "qalign_warp"),
    _reads("heads", "qalign_warp", "seal"),
    _reads("topk", "seal"),
    _reads("strength"),
    _reads("contrast", "cross_image"),
    Reading(
        ("noun",),
        lambda options: options.adain == "masked" or options.regions == ["self"],
        "with --adain masked or --regions self",
    ),
    Reading(
        ("seed",),
        lambda options: options.inversion == "ddpm",
        "with --inversion ddpm (ddim draws no noise)",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_pictures(parser)
    _add_method(parser)
    _add_run(parser)
    add_model_arguments(parser)


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument(
        "--appearance",
        type=Path,
        required=True,
        metavar="A.png",
        help="picture with the colours and textures",
    )
    pictures.add_argument(
        "--structure",
        type=Path,
        required=True,
        nargs="+",
        metavar="B.png",
        help="one or several pictures with the layout; several share one run",
    )
    pictures.add_argument(
        "--out",
        type=picture_path,
        required=True,
        metavar="O.png",
        help="picture to write; O-1.png, O-2.png, ... for several structures",
    )
    pictures.add_argument(
        "--grid",
        type=picture_path,
        metavar="GRID.png",
        help="also draw structure, appearance and output side by side",
    )
    pictures.add_argument(
        "--size",
        type=size,
        metavar="S|WxH",
        help="scale and crop all pictures to this size, multiples of 8 (default: their own)",
    )


def _add_method(parser: argparse.ArgumentParser) -> None:
    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        type=method_name,
        default="qalign",
        metavar="NAME",
        help=f"{', '.join(METHODS)}, or package.module:Class for a method of your own (default: %(default)s)",
    )
    for name, options in SETTINGS.items():
        method.add_argument(f"--{name}", **options)
    method.add_argument(
        "--layers",
        nargs="+",
        metavar="NAME",
        help="self-attention layers: up, names or patterns (default: the method's own)",
    )
    method.add_argument(
        "--regions",
        nargs="+",
        metavar="PNG",
        help="label maps A-labels.png B-labels.png (labels 0 to 30, one channel or a palette), so that each "
        "label takes from the same label; or 'self': object and background by the model's own attention "
        "(default: none)",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("transfer")
    run.add_argument("--prompt", default="", help="what the pictures show")
    run.add_argument(
        "--noun", help="the word of the prompt that names the object, for masks (default: guessed)"
    )
    run.add_argument(
        "--steps", type=count, default=50, metavar="N", help="denoising steps (default: %(default)s)"
    )
    run.add_argument(
        "--skip",
        type=fraction,
        default=0.32,
        metavar="F",
        help="skip this fraction of the steps, the noisiest ones (default: %(default)s)",
    )
    run.add_argument("--inversion", choices=("ddpm", "ddim"), default="ddpm", help="(default: %(default)s)")
    run.add_argument(
        "--adain",
        choices=("masked", "whole", "none"),
        default="none",
        help="AdaIN of the latents to the appearance (default: %(default)s)",
    )
    run.add_argument(
        "--swap-guidance",
        type=number,
        default=3.5,
        metavar="S",
        help="swap guidance scale; 1 is no guidance, and faster (default: %(default)s)",
    )
    run.add_argument(
        "--freeu", action="store_true", help="use FreeU with the settings of Cross-Image attention"
    )
    run.add_argument("--seed", type=seed, default=0, help="seed of the noise (default: %(default)s)")
    run.add_argument("--cache", type=Path, metavar="DIR", help="folder that keeps inversions for later calls")


def files(options: argparse.Namespace) -> Files:
    labels = (
        [] if options.regions in (None, ["self"]) else [("--regions", Path(path)) for path in options.regions]
    )
    return Files(
        reads=given_files(options, "appearance", "structure") + labels,
        writes=[("--out", path) for path in pictures_out(options)] + given_files(options, "grid"),
        folders=given_files(options, "cache"),
    )


def pictures_out(options: argparse.Namespace) -> list[Path]:
    """The path of the picture of each structure."""
    if len(options.structure) == 1:
        return [options.out]
    return [
        options.out.with_stem(f"{options.out.stem}-{number}")
        for number in range(1, len(options.structure) + 1)
    ]


def make_method(options: argparse.Namespace) -> Any:
    """The method with the given settings."""
    from ..methods import TRANSFERS, find_method

    return find_method(options.method, TRANSFERS)(
        **{name: value for name in SETTINGS if (value := getattr(options, name)) is not None}
    )


def make_regions(options: argparse.Namespace, picture: Any) -> Any:
    """None, "self", or the label maps of files, scaled and cut like `picture`."""
    if options.regions is None:
        return None
    if len(options.structure) != 1:
        raise ValueError(f"--regions: expected one --structure, got {len(options.structure)}")
    if options.regions == ["self"]:
        return "self"
    if len(options.regions) != 2:
        expected = "'self', or label maps of the appearance and the structure"
        raise ValueError(f"--regions: expected {expected}, got {' '.join(options.regions)}")
    from ..context.regions import Regions

    appearance, structure = (
        read_label_map(Path(path), picture.size, options.size) for path in options.regions
    )
    return Regions(appearance=appearance, structure=structure)


def run(options: argparse.Namespace) -> int:
    method = make_method(options)
    appearance, *structures = read_pictures([options.appearance, *options.structure], options.size)
    regions = make_regions(options, appearance)
    import torch

    from ..context.layers import picture_size

    pipe = load_pipeline(options)
    if options.model == "embedded" and appearance.size != (picture_size(pipe),) * 2:
        known, got = picture_size(pipe), "x".join(map(str, appearance.size))
        advice = f"--size {known} scales them"
        sys.stderr.write(
            f"transfer: the embedded model knows pictures of {known}x{known}, these are {got}; {advice}\n"
        )
    images = pipe(
        appearance,
        structures,
        options.prompt,
        method=method,
        num_inference_steps=options.steps,
        skip=options.skip,
        inversion=options.inversion,
        adain=None if options.adain == "none" else options.adain,
        swap_guidance_scale=options.swap_guidance,
        noun=options.noun,
        freeu=options.freeu,
        layers=options.layers,
        regions=regions,
        cache=options.cache,
        generator=torch.Generator().manual_seed(options.seed),
    ).images
    for path, image in zip(pictures_out(options), images, strict=True):
        write("picture", image, path)
    if options.grid:
        from ..evaluation.plots import transfer_grid

        rows = [
            {"structure": structure, "appearance": appearance, method.title(): image}
            for structure, image in zip(structures, images)
        ]
        write("grid", transfer_grid(rows), options.grid)
    return 0
