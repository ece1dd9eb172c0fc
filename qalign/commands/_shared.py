"""What the commands share: pictures in, files out, and the model."""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import replacing

MULTIPLE = 8  # pixels
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
DTYPES = ("float32", "float16", "bfloat16")
COMPARED = {"cross_image": "Cross-Image", "qalign": "Q-Align"}  # by demo and leakage
REFINEMENTS = ("rearranged", "guided", "topk", "warped_values", "warped_output", "soft", "none")  # of qalign
ALIGNED = ("both", "output", "structure")  # of qalign
METHODS = {
    **COMPARED,
    "eye_for_an_eye": "Eye-for-an-eye",
    "masactrl": "MasaCtrl",
    "style_aligned": "StyleAligned",
    "visual_style": "Visual style prompting",
    "style_id": "StyleID",
    "z_star": "Z-STAR",
    "ctrl_x": "Ctrl-X",
    "seal": "SeAl",
    "reference_only": "Reference-only",
    "free_custom": "FreeCustom",
    "dream_matcher": "DreamMatcher",
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="embedded",
        metavar="NAME",
        help="'embedded': the small one inside the package, for pictures of 128x128; a folder with a Stable Diffusion (XL) model in diffusers' "
        "form; or the id of one on the Hugging Face Hub (default: %(default)s)",
    )
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the networks; latents are float32 always (default: %(default)s)")
    group.add_argument("--device", metavar="NAME", help="cuda, mps or cpu (default: the first of these that is there)")
    group.add_argument("--offload", action="store_true", help="keep only the network that runs on the device, for little memory")


def whole(text: str) -> int:
    """A number from 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """A number from 1."""
    if whole(text) == 0:
        raise argparse.ArgumentTypeError("expected a number above zero, got 0")
    return int(text)


def size(text: str) -> tuple[int, int]:
    """(width, height) of "S" or "WxH", each a multiple of 8."""
    sides = [int(side) if side.isdigit() else 0 for side in text.lower().split("x")]
    if len(sides) not in (1, 2) or min(sides) <= 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 512 or 512x768, got {text!r}")
    width, height = sides[0], sides[-1]
    if width % MULTIPLE or height % MULTIPLE:
        raise argparse.ArgumentTypeError(f"expected multiples of {MULTIPLE}, got {width}x{height}; the nearest is {nearest(width, height)}")
    return width, height


def nearest(width: int, height: int) -> str:
    return "x".join(str(max(round(side / MULTIPLE), 1) * MULTIPLE) for side in (width, height))


def picture_path(text: str) -> Path:
    """A file to write a picture to, judged before any work is done."""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file that ends in {', '.join(SUFFIXES)}, got {text!r}")
    return path


def folder_path(text: str) -> Path:
    """A folder to write to, which need not exist."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got the file {text!r}")
    return path


def read_pictures(paths: Sequence[Path], wanted: tuple[int, int] | None) -> list[Any]:
    """RGB pictures of one size: their own, or `wanted` (width, height), for which they are scaled and their middle is cut out."""
    pictures = [_read_picture(path, wanted) for path in paths]
    for path, picture in zip(paths, pictures):
        if picture.size != pictures[0].size:
            first, other = (f"{picture.width}x{picture.height}" for picture in (pictures[0], picture))
            raise ValueError(f"{path}: expected the size of {paths[0]}, {first}, got {other}; --size {first} makes them equal")
    return pictures


def _read_picture(path: Path, wanted: tuple[int, int] | None) -> Any:
    from PIL import Image, ImageOps

    if not path.is_file():
        raise ValueError(f"{path}: expected a picture, found {'a folder' if path.is_dir() else 'no such file'}")
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: expected a picture (PNG, JPEG, WebP, ...), got something that cannot be read as one") from error
    if wanted is not None:
        return ImageOps.fit(picture, wanted, Image.Resampling.LANCZOS)
    _check_sides(path, *picture.size)
    return picture


def _check_sides(path: Path, width: int, height: int) -> None:
    if width % MULTIPLE or height % MULTIPLE:
        near = nearest(width, height)
        raise ValueError(f"{path}: expected sides that are multiples of {MULTIPLE}, got {width}x{height}; --size {near} is the nearest")


def read_label_map(path: Path, size: tuple[int, int] | None, wanted: tuple[int, int] | None) -> Any:
    """The labels [h, w] of a picture of `size` (width, height), scaled and cut as `read_pictures` does for `wanted`, to the nearest label.

    Without `size` they are of a picture that is still to be made.
    """
    from PIL import Image, ImageOps

    from ..regions import read_labels

    if not path.is_file():
        raise ValueError(f"{path}: expected a label map, found {'a folder' if path.is_dir() else 'no such file'}")
    labels = read_labels(path)
    if wanted is not None:
        import torch
        from numpy import asarray

        fitted = ImageOps.fit(Image.fromarray(labels.int().numpy()), wanted, Image.Resampling.NEAREST)
        labels = torch.from_numpy(asarray(fitted).astype("int64"))
    if size is None:
        _check_sides(path, labels.shape[1], labels.shape[0])
    elif labels.shape != (size[1], size[0]):
        raise ValueError(f"{path}: expected labels of its picture's {size[0]}x{size[1]} pixels, got {labels.shape[1]}x{labels.shape[0]}")
    return labels


def load_pipeline(options: argparse.Namespace) -> Any:
    """The appearance transfer pipeline that `add_model_arguments` describes, on its device."""
    import torch

    from ..pipelines import AppearanceTransferPipeline

    dtype = getattr(torch, options.dtype)
    device = options.device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if options.model == "embedded":
        pipe = load_embedded(dtype)
    else:
        pipe = AppearanceTransferPipeline.from_pipe(_load_stock(options.model, dtype))
    if options.offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def load_embedded(dtype: Any) -> Any:
    """The pipeline on the small model inside the package, loaded without the bars that large ones need."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from ..pipelines import AppearanceTransferPipeline

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    try:
        return AppearanceTransferPipeline.embedded(dtype)
    finally:
        for library in (diffusers_logging, transformers_logging):
            library.enable_progress_bar()


def _load_stock(model: str, dtype: Any) -> Any:
    from diffusers import DiffusionPipeline

    name = model.rstrip("/").split("/")[-1]
    got = f"{model!r}; `hf download {model if model.count('/') == 1 else 'NAMESPACE/MODEL'} --local-dir {name}` fetches one where there is a network"
    wanted = "--model: expected 'embedded', a folder with a model_index.json, or the id of a model on the Hugging Face Hub (and a network)"
    if Path(model).exists() and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"{wanted}, got a path without one, {got}")
    try:
        return DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    except Exception as error:  # of the hub's client, of requests, of the loader: each has its own family
        reason = textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")
        raise ValueError(f"{wanted}, got {got} ({reason})") from error


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
