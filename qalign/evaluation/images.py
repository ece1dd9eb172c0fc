"""Pictures and label maps as PIL images. Needs Pillow and numpy, but not matplotlib."""

import colorsys
from typing import Any

import numpy
from PIL import Image
from torch import Tensor

Picture = Tensor | Image.Image  # a tensor is [3, H, W] in [0, 1]

PALETTE = (
    *((176, 208, 236), (205, 178, 132), (58, 122, 186), (92, 138, 66)),  # background: muted
    *((232, 93, 47), (247, 197, 66), (139, 78, 166), (60, 64, 72)),
    *((214, 64, 112), (46, 184, 172), (250, 244, 230), (0, 0, 0)),
)


def to_image(picture: Tensor) -> Image.Image:
    """Convert [3, H, W] in [0, 1] to a PIL image; each channel is rounded to the nearest byte."""
    return Image.fromarray((to_array(picture) * 255).round().astype("uint8"))


def to_array(picture: Picture) -> Any:
    """Convert a picture to float32 [H, W, 3] in [0, 1]."""
    if isinstance(picture, Image.Image):
        return numpy.asarray(picture.convert("RGB"), dtype="float32") / 255
    return picture.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()


def label_picture(labels: Tensor) -> Image.Image:
    """Make a picture with a palette, whose pixel values are the labels [H, W] themselves."""
    picture = Image.fromarray(labels.byte().numpy())
    picture.putpalette([channel for colour in palette(int(labels.max()) + 1) for channel in colour])
    return picture


def palette(count: int) -> list[tuple[int, int, int]]:
    """Colours of the labels 0, 1, ...: those of the parts of scenes, then hues a golden section apart."""
    more = [colorsys.hsv_to_rgb(0.618 * number % 1, 0.6, 0.9) for number in range(count - len(PALETTE))]
    return [*PALETTE, *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in more)][:count]
