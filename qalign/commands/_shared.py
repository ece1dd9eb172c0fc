"""Shared by the commands: options, pictures to read, files to write, and the model."""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qalign_kernels._choices import REFINEMENTS
from qalign_kernels._command_line import (
    Parser,
    Reading,
    add_command,
    count,
    fraction,
    main,
    number,
    positive,
    require_device,
    seed,
    whole,
)
from qalign_kernels._files import Files, replacing

from ..methods._names import ALIGNED, TRANSFERS

__all__ = [
    "ALIGNED", "REFINEMENTS",
    "Files", "Parser", "Reading", "add_command", "count", "fraction", "main", "number", "positive",
    "replacing", "require_device", "seed", "whole",
]  # fmt: skip

MULTIPLE = 8  # pixels
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
DTYPES = ("float32", "float16", "bfloat16")
COMPARED = {  # the methods that demo, leakage and compare show side by side
    "cross_image": "Cross-Image",
    "qalign": "Q-Align",
    "qalign_warp": "QAlignWarp",
}
SIDE = 16  # demo and correspond show the layer nearest to 16 x 16 tokens
DEFAULT_REFINEMENT = "rearranged"
READ_BY_REFINEMENT = {  # the refinements of qalign that use each setting
    "aligned": REFINEMENTS,
    "similarity": REFINEMENTS,
    "heads": ("rearranged", "topk", "warped_values", "warped_output", "none"),
    "topk": ("topk",),
    "strength": ("guided", "soft"),
    "contrast": ("rearranged", "guided", "topk", "warped_values", "soft"),
}
METHODS = tuple(TRANSFERS)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="embedded",
        metavar="NAME",
        help="'embedded' (the small model inside the package, for pictures of 128x128), a folder with a "
        "Stable Diffusion (XL) model, or the id of one on the Hugging Face Hub (default: %(default)s)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="dtype of the networks; latents are always float32 (default: %(default)s)",
    )
    group.add_argument(
        "--device", metavar="NAME", help="cuda, mps or cpu (default: the first of these that is available)"
    )
    group.add_argument(
        "--offload",
        action="store_true",
        help="keep only the running network on the device, to save memory",
    )


def method_name(text: str) -> str:
    """A method's name, or package.module:Class for a method outside this package, which is imported later."""
    if text not in METHODS and ":" not in text:
        raise argparse.ArgumentTypeError(
            f"expected package.module:Class or one of {', '.join(METHODS)}, got {text!r}"
        )
    return text


def title_of(method: str) -> str:
    """The title of a method, such as "Q-Align", by its name in `METHODS` or as package.module:Class."""
    from ..methods import find_method

    return find_method(method).title()


def refinement_of(options: argparse.Namespace) -> str:
    """The refinement of qalign in this call."""
    return options.refinement or DEFAULT_REFINEMENT


def size(text: str) -> tuple[int, int]:
    """Read "S" or "WxH" as (width, height), each a multiple of 8."""
    sides = [int(side) if side.isdecimal() else 0 for side in text.lower().split("x")]
    if len(sides) not in (1, 2) or min(sides) <= 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 512 or 512x768, got {text!r}")
    width, height = sides[0], sides[-1]
    if width % MULTIPLE or height % MULTIPLE:
        raise argparse.ArgumentTypeError(
            f"expected multiples of {MULTIPLE}, got {width}x{height}; the nearest is {nearest(width, height)}"
        )
    return width, height


def nearest(width: int, height: int) -> str:
    return "x".join(str(max(round(side / MULTIPLE), 1) * MULTIPLE) for side in (width, height))


def picture_path(text: str) -> Path:
    """The path of a picture to write."""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"expected a file that ends in {', '.join(SUFFIXES)}, got {text!r}")
    return path


def label_path(text: str) -> Path:
    """The path of a label map to write, as PNG, the one format that keeps labels."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"expected a file that ends in .png, got {text!r}")
    return path


def given_files(options: argparse.Namespace, *names: str) -> list[tuple[str, Path]]:
    """(option, path) for each given option, whose value is a path or a list of paths."""
    found = [(f"--{name.replace('_', '-')}", getattr(options, name)) for name in names]
    lists = [
        (option, value if isinstance(value, list) else [value])
        for option, value in found
        if value is not None
    ]
    return [(option, Path(path)) for option, paths in lists for path in paths]


def require_pair(options: argparse.Namespace) -> bool:
    """Whether --structure and --appearance are given instead of --scenes.

    Raises:
        ValueError: both ways are used, or neither, or one picture is missing.
    """
    given = [getattr(options, name) is not None for name in ("structure", "appearance", "scenes")]
    if given not in ([True, True, False], [False, False, True]):
        raise ValueError("pictures: expected either --structure and --appearance, or --scenes")
    return given[0]


def read_pictures(paths: Sequence[Path], wanted: tuple[int, int] | None) -> list[Any]:
    """Read RGB pictures of one size.

    With `wanted` (width, height), each picture is scaled, and its middle is cut out. Without it, the
    pictures must have one size.
    """
    pictures = [_read_picture(path, wanted) for path in paths]
    for path, picture in zip(paths, pictures):
        if picture.size != pictures[0].size:
            first, other = (f"{picture.width}x{picture.height}" for picture in (pictures[0], picture))
            advice = f"--size {first} makes them equal"
            raise ValueError(f"{path}: expected the size of {paths[0]}, {first}, got {other}; {advice}")
    return pictures


def _read_picture(path: Path, wanted: tuple[int, int] | None) -> Any:
    from PIL import Image, ImageOps

    if not path.is_file():
        raise ValueError(
            f"{path}: expected a picture, found {'a folder' if path.is_dir() else 'no such file'}"
        )
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # Pillow's decoders raise any kind
        raise ValueError(
            f"{path}: expected a picture (PNG, JPEG, WebP, ...), got something that cannot be read as one"
        ) from error
    if wanted is not None:
        return ImageOps.fit(picture, wanted, Image.Resampling.LANCZOS)
    _check_sides(path, *picture.size)
    return picture


def _check_sides(path: Path, width: int, height: int) -> None:
    if width % MULTIPLE or height % MULTIPLE:
        near = nearest(width, height)
        expected, advice = f"sides that are multiples of {MULTIPLE}", f"--size {near} is the nearest"
        raise ValueError(f"{path}: expected {expected}, got {width}x{height}; {advice}")


def read_label_map(path: Path, size: tuple[int, int] | None, wanted: tuple[int, int] | None) -> Any:
    """Read the labels [h, w] of a picture of `size` (width, height).

    With `wanted` they are scaled and cut as in `read_pictures`, to the nearest label. Without `size` they
    belong to a picture that is still to be made.
    """
    from PIL import Image, ImageOps

    from ..context.regions import read_labels

    labels = read_labels(path)
    if wanted is not None:
        import torch
        from numpy import asarray

        fitted = ImageOps.fit(Image.fromarray(labels.int().numpy()), wanted, Image.Resampling.NEAREST)
        labels = torch.from_numpy(asarray(fitted).astype("int64"))
    if size is None:
        _check_sides(path, labels.shape[1], labels.shape[0])
    elif labels.shape != (size[1], size[0]):
        expected, got = f"{size[0]}x{size[1]}", f"{labels.shape[1]}x{labels.shape[0]}"
        raise ValueError(f"{path}: expected labels of its picture's {expected} pixels, got {got}")
    return labels


def load_pipeline(options: argparse.Namespace) -> Any:
    """Load the appearance transfer pipeline that the options of `add_model_arguments` describe."""
    import torch

    from ..pipelines import AppearanceTransferPipeline

    dtype = getattr(torch, options.dtype)
    device = options.device or (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    require_device(device)
    if options.offload and torch.device(device).type == "cpu":
        raise ValueError("--offload: expected a device with a memory of its own, got cpu")
    if options.model == "embedded":
        pipe = AppearanceTransferPipeline.embedded(dtype)
    else:
        pipe = _load_stock(options.model, dtype)
    if options.offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def _load_stock(model: str, dtype: Any) -> Any:
    """Load a model of a folder or of the Hub. Its kind is checked before its weights are read."""
    from diffusers import DiffusionPipeline

    from ..pipelines import AppearanceTransferPipeline

    name = model.rstrip("/").split("/")[-1]
    hub_id = model if model.count("/") == 1 else "NAMESPACE/MODEL"
    got = f"{model!r}; `hf download {hub_id} --local-dir {name}` downloads a model"
    wanted = (
        "--model: expected 'embedded', a folder with a model_index.json, "
        "or the id of a model on the Hugging Face Hub (and a network)"
    )
    if Path(model).exists() and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"{wanted}, got a path without one, {got}")
    try:
        index = json.loads(_index_of(model).read_text(encoding="utf-8"))
        foreign = [name for name in ("unet", "vae", "text_encoder", "tokenizer") if name not in index]
        stock = (
            None
            if foreign
            else DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, use_safetensors=True)
        )
    except Exception as error:  # each library below has its own types
        reason = textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")
        raise ValueError(f"{wanted}, got {got} ({reason})") from error
    try:
        if foreign:
            got = f"{index.get('_class_name')} without {', '.join(foreign)}"
            raise TypeError(f"expected Stable Diffusion or Stable Diffusion XL, got {got}")
        return AppearanceTransferPipeline.from_pipe(stock)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--model: {str(error).removeprefix('pipeline: ')}") from error


def _index_of(model: str) -> Path:
    """The file of a model that lists its parts."""
    if Path(model).exists():
        return Path(model) / "model_index.json"
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, "model_index.json"))


def write(what: str, content: Any, path: Path) -> None:
    """Write text, a PIL image or a figure, and print where."""
    with replacing(path) as temporary:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            (content.savefig if hasattr(content, "savefig") else content.save)(temporary)
    say(f"{what}: {path}")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
