"""Label maps of the pictures, and the labels of their tokens as bit sets on the grid of any layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import token_grid
from .outside_graphs import enlist, outside_graphs

LARGEST = 30  # the largest label: an int32 has 31 bits besides the sign bit
EVERYTHING = -1  # the set of all labels


@dataclass(frozen=True, eq=False, kw_only=True)
class Regions:
    """Label maps of the pictures: a token of the output sees only the reference's tokens with its own label.

    The output has the structure's layout, so its tokens have the structure's labels. A token whose label is
    missing in the reference sees all of the reference.

    >>> import torch
    >>> from qalign import QAlign, Regions, attach
    >>> halves = torch.arange(16).repeat(16, 1) // 8  # left 0, right 1
    >>> with attach(pipe, QAlign(), regions=Regions(appearance=halves, structure=halves)):
    ...     images = pipe([prompt] * 3, latents=latents, guidance_scale=1, num_inference_steps=2).images
    >>> len(images)
    3

    Args:
        appearance, structure: integers from 0 to 30, [h, w] of the picture or of its latents, as a tensor, an
            array or nested lists. None if the method reads no such row. `FreeCustom` and `ConsiStory` take a
            list of maps, one for each appearance or output; there, 0 means that a token does not show the
            subject.
        background: a label whose tokens see everything and are seen by all tokens. None is no such label.

    Raises:
        ValueError: no label map, or labels of another kind.
    """

    appearance: Any = None
    structure: Any = None
    background: int | None = None
    number: int = field(default=0, init=False, repr=False)  # by which compiled graphs find the labels
    _kept: dict[tuple, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", enlist(self))
        if self.appearance is None and self.structure is None:
            raise ValueError(
                "regions: expected labels of the appearance, of the structure or of both, got none"
            )
        for name in ("appearance", "structure"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _label_maps(getattr(self, name), name))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, number=enlist(self))  # a copy is another object

    @classmethod
    def open(
        cls, appearance: str | Path, structure: str | Path, *, background: int | None = None
    ) -> "Regions":
        """Read both label maps from pictures with one channel or a palette, whose values are the labels.

        Raises:
            ValueError: a picture has colours.
        """
        return cls(
            appearance=read_labels(appearance), structure=read_labels(structure), background=background
        )

    @classmethod
    def from_boxes(cls, boxes: Sequence[Sequence[float]], height: int, width: int) -> "Regions":
        """Make the structure's label map [height, width]: 1, 2, ... in the boxes, and 0 elsewhere.

        Where boxes overlap, the last one is in front. 0 is the background.

        >>> from qalign import Regions
        >>> Regions.from_boxes([(0.0, 0.0, 0.5, 1.0), (0.75, 0.5, 1.0, 1.0)], 2, 4).structure.tolist()
        [[1, 1, 0, 0], [1, 1, 0, 2]]

        Args:
            boxes: (x0, y0, x1, y1) each, as fractions of width and height from the upper left corner. They
                are rounded to cells.
            height, width: of the label map, such as those of the latents.

        Raises:
            ValueError: more than 30 boxes, or a box that is outside, contains no cell, or is hidden by
                others.
        """
        if not 0 < len(boxes) <= LARGEST:
            raise ValueError(f"boxes: expected 1 to {LARGEST}, got {len(boxes)}")
        labels = torch.zeros(height, width, dtype=torch.long)
        for number, box in enumerate(boxes, 1):
            if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
                expected = "x0 y0 x1 y1 with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1"
                raise ValueError(f"boxes: expected {expected}, got {' '.join(map(str, box))}")
            left, right = (round(x * width) for x in box[::2])
            upper, lower = (round(y * height) for y in box[1::2])
            labels[upper:lower, left:right] = number
        hidden = [box for number, box in enumerate(boxes, 1) if not (labels == number).any()]
        if hidden:
            expected = f"each to keep a cell of {height} x {width} in front"
            raise ValueError(f"boxes: expected {expected}, got {' '.join(map(str, hidden[0]))}")
        return cls(structure=labels, background=0)

    def window(self, rows: slice, columns: slice, space: Sequence[int]) -> "Regions":
        """Return the regions of a window: the structure's labels are cut, the appearance's stay.

        Args:
            rows, columns: the window in latents.
            space: (height, width) of all latents.

        Raises:
            ValueError: as `label_scale`.
        """
        scale = label_scale(self.structure, space, "structure")
        cut = self.structure[
            scale * rows.start : scale * rows.stop, scale * columns.start : scale * columns.stop
        ]
        return Regions(appearance=self.appearance, structure=cut, background=self.background)

    @outside_graphs(1)
    def picture_labels(self, picture: str, tokens: int, device: torch.device) -> Tensor:
        """Return the labels of a picture's tokens as bit sets, int32 [1, N].

        >>> import torch
        >>> from qalign import Regions
        >>> regions = Regions(appearance=[[0, 1], [2, 2]])
        >>> regions.picture_labels("appearance", 4, torch.device("cpu")).tolist()
        [[1, 2, 4, 4]]

        Args:
            picture: "appearance" or "structure".
            tokens: N, the number of tokens of the layer.
            device: of the result.

        Raises:
            ValueError: there is no label map of this picture, or its grid does not fit N.
        """
        return self._cached(
            ("labels", picture, tokens, device), lambda: self._bits(self._tokens(picture, tokens)).to(device)
        )

    @outside_graphs(1)
    def query_labels(self, picture: str, tokens: int, reference_tokens: int, device: torch.device) -> Tensor:
        """Return the labels of the output's tokens when it reads `picture`, as bit sets int32 [1, N].

        A token whose label `picture` does not show has all bits. `reference_tokens` is the number of tokens
        of `picture`; the other arguments are those of `picture_labels`.
        """

        def make() -> Tensor:
            own, reference = self._tokens("structure", tokens), self._tokens(picture, reference_tokens)
            return torch.where(torch.isin(own, reference), self._bits(own), EVERYTHING).to(device)

        return self._cached(("queries", picture, tokens, reference_tokens, device), make)

    @outside_graphs(3)
    def subject_labels(
        self, picture: str, number: int, count: int, tokens: int, device: torch.device
    ) -> Tensor:
        """Return bit sets int32 [1, N] for the subject of the `number`-th of `count` pictures.

        A token with a label other than 0 has all bits, and a token with label 0 has none.
        """

        def make() -> Tensor:
            maps = getattr(self, picture)
            maps = maps if isinstance(maps, tuple) else (maps,)
            if maps[0] is None or len(maps) != count:
                got = "None" if maps[0] is None else len(maps)
                expected = f"{count} label maps of the {picture}, one for each row that has this role"
                raise ValueError(f"regions: expected {expected}, got {got}")
            return torch.where(labels_of_tokens(maps[number], tokens) > 0, EVERYTHING, 0).int().to(device)

        return self._cached(("subject", picture, number, count, tokens, device), make)

    def _cached(self, name: tuple, make: Any) -> Tensor:
        if name not in self._kept:
            with torch.inference_mode(False):
                self._kept[name] = make()
        return self._kept[name]

    def _tokens(self, picture: str, tokens: int) -> Tensor:
        """The label in the centre of each token, [1, N]."""
        labels = getattr(self, picture)
        if labels is None:
            raise ValueError(f"regions: expected labels of the {picture}, which this method reads, got None")
        if isinstance(labels, tuple):
            expected = f"one label map of the {picture}, because this method reads only one"
            raise ValueError(f"regions: expected {expected}, got {len(labels)}")
        return labels_of_tokens(labels, tokens)

    def _bits(self, labels: Tensor) -> Tensor:
        bits = torch.ones_like(labels, dtype=torch.int32) << labels.int()
        return (
            bits
            if self.background is None
            else torch.where(labels == self.background, EVERYTHING, bits).int()
        )


def read_labels(path: str | Path) -> Tensor:
    """Read a label map [h, w] from a picture with one channel or a palette.

    Raises:
        ValueError: the picture has colours.
    """
    import numpy
    from PIL import Image

    with Image.open(path) as picture:
        if picture.mode not in ("1", "L", "P", "I", "I;16"):
            expected = "a label map, one channel or a palette whose values are labels"
            raise ValueError(f"{path}: expected {expected}, got a picture of mode {picture.mode}")
        return torch.from_numpy(numpy.array(picture).astype("int64"))


def label_scale(labels: Any, space: Sequence[int], name: str) -> int:
    """Return the number of labels along one side of a latent: 1, or more for a label map of the pixels.

    Args:
        labels: a label map [h, w].
        space: (height, width) of the latents.
        name: of the picture, for the message.

    Raises:
        ValueError: `labels` is not one label map, or its sides are not the same multiple of `space`.
    """
    got = "None" if labels is None else f"{len(labels)} of them"
    if isinstance(labels, Tensor):
        height, width = labels.shape
        scale = height // space[0]
        if scale and (height, width) == (scale * space[0], scale * space[1]):
            return scale
        got = f"{height} x {width}"
    expected = f"a label map of the {name} of {space[0]} x {space[1]} latents, or of its pixels"
    raise ValueError(f"regions: expected {expected}, got {got}")


def labels_of_tokens(labels: Tensor, tokens: int) -> Tensor:
    """Return the label in the centre of each token, int64 [1, N], of a label map [h, w]."""
    grid = token_grid(labels.shape, tokens)
    return F.interpolate(labels[None, None].float(), grid, mode="nearest-exact").flatten(1).long()


def _label_maps(labels: Any, name: str) -> Tensor | tuple[Tensor, ...]:
    """One label map, or a tuple of the label maps in a list."""
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
