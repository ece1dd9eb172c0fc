"""Which part of a picture each token shows: label maps of appearance and structure, as bit sets on any layer's grid."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import token_grid

LARGEST = 30  # of a label: the sign bit of an int32 is not used
EVERYTHING = -1  # the set of all labels


@dataclass(frozen=True, eq=False, kw_only=True)
class Regions:
    """Label maps of the two pictures that meet: an output's token sees the reference's tokens of its own label, and no others.

    The output has the structure's layout, so its tokens have the structure's labels. A token whose label the reference does not show sees all
    of the reference.

    >>> with attach(pipe, QAlign(), regions=Regions(appearance=one, structure=other)):
    ...     images = pipe([prompt] * 3, latents=latents).images

    Args:
        appearance, structure: whole numbers of 0 to 30, [h, w] of the picture or of its latents: a tensor, an array, or nested lists. None
            where a method reads no such row. A list of such maps, one for each appearance of the output or for each output of the layout,
            is for the methods that ask where the subject of every picture is (0: not there): `FreeCustom` and `ConsiStory`.
        background: a label whose tokens see everything and are seen by all; None: there is none such.
    """

    appearance: Any = None
    structure: Any = None
    background: int | None = None
    _kept: dict[tuple, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.appearance is None and self.structure is None:
            raise ValueError(
                "regions: expected labels of the appearance, of the structure or of both, got none"
            )
        for name in ("appearance", "structure"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _label_maps(getattr(self, name), name))

    @classmethod
    def open(
        cls, appearance: str | Path, structure: str | Path, *, background: int | None = None
    ) -> "Regions":
        """From two pictures of one channel or with a palette, whose values are the labels."""
        return cls(
            appearance=read_labels(appearance), structure=read_labels(structure), background=background
        )

    @classmethod
    def from_boxes(cls, boxes: Sequence[Sequence[float]], height: int, width: int) -> "Regions":
        """Of the structure, [height, width]: 1, 2, ... in the boxes, the last one in front, and 0, the background, elsewhere.

        >>> Regions.from_boxes([(0.0, 0.0, 0.5, 1.0), (0.75, 0.5, 1.0, 1.0)], 2, 4).structure.tolist()
        [[1, 1, 0, 0], [1, 1, 0, 2]]

        Args:
            boxes: (x0, y0, x1, y1) each, fractions of the width and height from the upper left corner, rounded to cells.
            height, width: such as those of the latents.

        Raises:
            ValueError: a box outside of the picture, without a cell, or all of it behind others; more than 30 of them.
        """
        if not 0 < len(boxes) <= LARGEST:
            raise ValueError(f"boxes: expected 1 to {LARGEST}, got {len(boxes)}")
        labels = torch.zeros(height, width, dtype=torch.long)
        for number, box in enumerate(boxes, 1):
            if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
                raise ValueError(
                    f"boxes: expected x0 y0 x1 y1 with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, got {' '.join(map(str, box))}"
                )
            left, right = (round(x * width) for x in box[::2])
            upper, lower = (round(y * height) for y in box[1::2])
            labels[upper:lower, left:right] = number
        hidden = [box for number, box in enumerate(boxes, 1) if not (labels == number).any()]
        if hidden:
            raise ValueError(
                f"boxes: expected each to keep a cell of {height} x {width} in front, got {' '.join(map(str, hidden[0]))}"
            )
        return cls(structure=labels, background=0)

    def window(self, rows: slice, columns: slice, space: Sequence[int]) -> "Regions":
        """The same with the output's labels cut to a window of its latents.

        Args:
            rows, columns: of the window.
            space: (height, width) of all latents.

        Raises:
            ValueError: as `label_scale`.
        """
        scale = label_scale(self.structure, space, "structure")
        cut = self.structure[
            scale * rows.start : scale * rows.stop, scale * columns.start : scale * columns.stop
        ]
        return Regions(appearance=self.appearance, structure=cut, background=self.background)

    def keys(self, picture: str, tokens: int, device: torch.device) -> Tensor:
        """Bit sets int32 [1, N] of a picture's tokens: "appearance" or "structure"."""
        return self._cached(
            ("keys", picture, tokens, device), lambda: self._bits(self._tokens(picture, tokens)).to(device)
        )

    def queries(self, picture: str, tokens: int, reference_tokens: int, device: torch.device) -> Tensor:
        """Bit sets int32 [1, N] of the output's tokens where it reads `picture`."""

        def make() -> Tensor:
            own, reference = self._tokens("structure", tokens), self._tokens(picture, reference_tokens)
            return torch.where(torch.isin(own, reference), self._bits(own), EVERYTHING).to(device)

        return self._cached(("queries", picture, tokens, reference_tokens, device), make)

    def subject(self, picture: str, number: int, count: int, tokens: int, device: torch.device) -> Tensor:
        """Bit sets int32 [1, N] of the `number`-th of `count` pictures' tokens: all bits where it shows a label other than 0, else none."""

        def make() -> Tensor:
            maps = getattr(self, picture)
            maps = maps if isinstance(maps, tuple) else (maps,)
            if maps[0] is None or len(maps) != count:
                got = "None" if maps[0] is None else len(maps)
                raise ValueError(
                    f"regions: expected {count} label maps of the {picture}, one for each row that has this role, got {got}"
                )
            return torch.where(labels_of_tokens(maps[number], tokens) > 0, EVERYTHING, 0).int().to(device)

        return self._cached(("subject", picture, number, count, tokens, device), make)

    def _cached(self, name: tuple, make: Any) -> Tensor:
        if name not in self._kept:
            with torch.inference_mode(False):
                self._kept[name] = make()
        return self._kept[name]

    def _tokens(self, picture: str, tokens: int) -> Tensor:
        """The label in the middle of each token, [1, N]."""
        labels = getattr(self, picture)
        if labels is None:
            raise ValueError(f"regions: expected labels of the {picture}, which this method reads, got None")
        if isinstance(labels, tuple):
            raise ValueError(
                f"regions: expected one label map of the {picture}, for this method reads no more, got {len(labels)}"
            )
        return labels_of_tokens(labels, tokens)

    def _bits(self, labels: Tensor) -> Tensor:
        bits = torch.ones_like(labels, dtype=torch.int32) << labels.int()
        return (
            bits
            if self.background is None
            else torch.where(labels == self.background, EVERYTHING, bits).int()
        )


def read_labels(path: str | Path) -> Tensor:
    """The label map [h, w] in a picture of one channel or with a palette.

    Raises:
        ValueError: the picture has colours.
    """
    import numpy
    from PIL import Image

    with Image.open(path) as picture:
        if picture.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(
                f"{path}: expected a label map, one channel or a palette whose values are labels, got a picture of mode {picture.mode}"
            )
        return torch.from_numpy(numpy.array(picture).astype("int64"))


def label_scale(labels: Any, space: Sequence[int], name: str) -> int:
    """How many labels of a map there are along each of (height, width) latents: 1, or in one of pixels as many as there are pixels.

    Raises:
        ValueError: there is not one map, or no such whole number.
    """
    if isinstance(labels, Tensor):
        height, width = labels.shape
        scale = height // space[0]
        if scale and (height, width) == (scale * space[0], scale * space[1]):
            return scale
    got = (
        f"{height} x {width}"
        if isinstance(labels, Tensor)
        else "None"
        if labels is None
        else f"{len(labels)} of them"
    )
    raise ValueError(
        f"regions: expected a label map of the {name} of {space[0]} x {space[1]} latents, or of its pixels, got {got}"
    )


def labels_of_tokens(labels: Tensor, tokens: int) -> Tensor:
    """The label in the middle of each token, int64 [1, N], of a label map [h, w]."""
    grid = token_grid(labels.shape, tokens)
    return F.interpolate(labels[None, None].float(), grid, mode="nearest-exact").flatten(1).long()


def _label_maps(labels: Any, name: str) -> Tensor | tuple[Tensor, ...]:
    """One label map, or those of a list or tuple of them."""
    if isinstance(labels, (list, tuple)) and labels and torch.as_tensor(labels[0]).ndim == 2:
        return tuple(_label_map(each, name) for each in labels)
    return _label_map(labels, name)


def _label_map(labels: Any | Sequence, name: str) -> Tensor:
    labels = torch.as_tensor(labels)
    if labels.ndim != 2 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{name}: expected whole numbers [h, w], got {labels.dtype} {list(labels.shape)}")
    labels = labels.long().cpu()
    if labels.numel() == 0 or labels.min() < 0 or labels.max() > LARGEST:
        got = f"{labels.min().item()} to {labels.max().item()}" if labels.numel() else "none"
        raise ValueError(f"{name}: expected labels of 0 to {LARGEST}, got {got}")
    return labels
