"""What the commands share: pictures in, files out, and the model."""

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
    "Files", "Parser", "Reading", "add_command", "count", "fraction", "main", "number", "positive", "replacing", "require_device", "seed", "whole",
]  # fmt: skip

MULTIPLE = 8  # pixels
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
DTYPES = ("float32", "float16", "bfloat16")
COMPARED = {
    "cross_image": "Cross-Image",
    "qalign": "Q-Align",
    "qalign_warp": "QAlignWarp",
}  # by demo and leakage
SIDE = 16  # of the token grid that demo and correspond show where no layer is named
DEFAULT_REFINEMENT = "rearranged"
READ_BY_REFINEMENT = {  # the settings of qalign, by the refinements that read them
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
        help="'embedded': the small one inside the package, for pictures of 128x128; a folder with a Stable Diffusion (XL) model in diffusers' "
        "form; or the id of one on the Hugging Face Hub (default: %(default)s)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the networks; latents are float32 always (default: %(default)s)",
    )
    group.add_argument(
        "--device", metavar="NAME", help="cuda, mps or cpu (default: the first of these that is there)"
    )
    group.add_argument(
        "--offload",
        action="store_true",
        help="keep only the network that runs on the device, for little memory",
    )


def title_of(method: str) -> str:
    """A method as the field calls it, by its name in `METHODS`."""
    from ..methods import METHODS as KINDS

    return KINDS[method].card.title  # type: ignore[attr-defined]


def refinement_of(options: argparse.Namespace) -> str:
    """That of qalign in this call."""
    return options.refinement or DEFAULT_REFINEMENT


def size(text: str) -> tuple[int, int]:
    """(width, height) of "S" or "WxH", each a multiple of 8."""
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
    """A file to write a picture to."""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"expected a file that ends in {', '.join(SUFFIXES)}, got {text!r}")
    return path


def label_path(text: str) -> Path:
    """A file to write labels to, in the one format that keeps them."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"expected a file that ends in .png, got {text!r}")
    return path


def given_files(options: argparse.Namespace, *names: str) -> list[tuple[str, Path]]:
    """(option, path) of those options that were given, each a path or a list of paths."""
    found = [(f"--{name.replace('_', '-')}", getattr(options, name)) for name in names]
    lists = [
        (option, value if isinstance(value, list) else [value])
        for option, value in found
        if value is not None
    ]
    return [(option, Path(path)) for option, paths in lists for path in paths]


def require_pair(options: argparse.Namespace) -> bool:
    """Whether --structure and --appearance are given, and not --scenes.

    Raises:
        ValueError: both, neither, or a half.
    """
    given = [getattr(options, name) is not None for name in ("structure", "appearance", "scenes")]
    if given not in ([True, True, False], [False, False, True]):
        raise ValueError("pictures: expected either --structure and --appearance, or --scenes")
    return given[0]


def read_pictures(paths: Sequence[Path], wanted: tuple[int, int] | None) -> list[Any]:
    """RGB pictures of one size: their own, or `wanted` (width, height), for which they are scaled and their middle is cut out."""
    pictures = [_read_picture(path, wanted) for path in paths]
    for path, picture in zip(paths, pictures):
        if picture.size != pictures[0].size:
            first, other = (f"{picture.width}x{picture.height}" for picture in (pictures[0], picture))
            raise ValueError(
                f"{path}: expected the size of {paths[0]}, {first}, got {other}; --size {first} makes them equal"
            )
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
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
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
        raise ValueError(
            f"{path}: expected sides that are multiples of {MULTIPLE}, got {width}x{height}; --size {near} is the nearest"
        )


def read_label_map(path: Path, size: tuple[int, int] | None, wanted: tuple[int, int] | None) -> Any:
    """The labels [h, w] of a picture of `size` (width, height), scaled and cut as `read_pictures` does for `wanted`, to the nearest label.

    Without `size` they are of a picture that is still to be made.
    """
    from PIL import Image, ImageOps

    from ..context.regions import read_labels

    if not path.is_file():
        raise ValueError(
            f"{path}: expected a label map, found {'a folder' if path.is_dir() else 'no such file'}"
        )
    labels = read_labels(path)
    if wanted is not None:
        import torch
        from numpy import asarray

        fitted = ImageOps.fit(Image.fromarray(labels.int().numpy()), wanted, Image.Resampling.NEAREST)
        labels = torch.from_numpy(asarray(fitted).astype("int64"))
    if size is None:
        _check_sides(path, labels.shape[1], labels.shape[0])
    elif labels.shape != (size[1], size[0]):
        raise ValueError(
            f"{path}: expected labels of its picture's {size[0]}x{size[1]} pixels, got {labels.shape[1]}x{labels.shape[0]}"
        )
    return labels


def load_pipeline(options: argparse.Namespace) -> Any:
    """The appearance transfer pipeline that `add_model_arguments` describes, on its device."""
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
    """The pipeline on a model of a folder or of the Hub. Its kind is known before its weights are read."""
    from diffusers import DiffusionPipeline

    from ..pipelines import AppearanceTransferPipeline

    name = model.rstrip("/").split("/")[-1]
    got = f"{model!r}; `hf download {model if model.count('/') == 1 else 'NAMESPACE/MODEL'} --local-dir {name}` fetches one where there is a network"
    wanted = "--model: expected 'embedded', a folder with a model_index.json, or the id of a model on the Hugging Face Hub (and a network)"
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
    except Exception as error:  # of the hub's client, of requests, of the loader: each has its own family
        reason = textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")
        raise ValueError(f"{wanted}, got {got} ({reason})") from error
    try:
        if foreign:
            raise TypeError(
                f"expected Stable Diffusion or Stable Diffusion XL, got {index.get('_class_name')} without {', '.join(foreign)}"
            )
        return AppearanceTransferPipeline.from_pipe(stock)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--model: {str(error).removeprefix('pipeline: ')}") from error


def _index_of(model: str) -> Path:
    """The file of a model that names its parts."""
    if Path(model).exists():
        return Path(model) / "model_index.json"
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, "model_index.json"))


def write(what: str, content: Any, path: Path) -> None:
    """Write text, a PIL image or a figure, and say where."""
    with replacing(path) as temporary:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            (content.savefig if hasattr(content, "savefig") else content.save)(temporary)
    say(f"{what}: {path}")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
