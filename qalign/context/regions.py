"""Label maps of the pictures, and the labels of their tokens as bit sets on the grid of any layer."""

import warnings
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
LABEL_MODES = ("1", "L", "P", "I", "I;16")
CENTRE = "nearest-exact"  # takes the label in the centre of a token
CORNER = "nearest"  # takes the label in its upper left corner


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
        boxes: of labels 1, 2, ... in the structure, as `from_boxes` sets them. `picture_labels` then rounds
            them on the grid of each layer, and does not resize the label map.

    Raises:
        ValueError: no label map, or labels of another kind.

    Notes:
        A layer's token takes the label in its centre (torch's "nearest-exact"). `MasaCtrl`, `FreeCustom` and
        `AttentionDistillation` take the label in its upper left corner ("nearest"), as published.
    """

    appearance: Any = None
    structure: Any = None
    background: int | None = None
    boxes: tuple[tuple[float, ...], ...] = ()
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
            ValueError: a picture has colours or cannot be read.
        """
        return cls(
            appearance=read_labels(appearance), structure=read_labels(structure), background=background
        )

    @classmethod
    def from_boxes(cls, boxes: Sequence[Sequence[float]], height: int, width: int) -> "Regions":
        """Make the structure's label map [height, width]: 1, 2, ... in the boxes, and 0 elsewhere.

        0 is the background. The tokens of an overlap belong to all of its boxes; in the label map the last
        box is in front. Every layer rounds the boxes on its own grid: `picture_labels` has the bit sets.

        >>> from qalign import Regions
        >>> Regions.from_boxes([(0.0, 0.0, 0.5, 1.0), (0.75, 0.5, 1.0, 1.0)], 2, 4).structure.tolist()
        [[1, 1, 0, 0], [1, 1, 0, 2]]
        >>> overlapping = Regions.from_boxes([(0.0, 0.0, 1.0, 0.5), (0.5, 0.0, 1.0, 1.0)], 2, 2)
        >>> overlapping.picture_labels("structure", 4, torch.device("cpu")).tolist()
        [[2, 6, -1, 4]]

        Args:
            boxes: (x0, y0, x1, y1) each, as fractions of width and height from the upper left corner. They
                are rounded to cells.
            height, width: of the label map, such as those of the latents.

        Raises:
            ValueError: more than 30 boxes, or a box that is outside or contains no cell.
        """
        if not 0 < len(boxes) <= LARGEST:
            raise ValueError(f"boxes: expected 1 to {LARGEST}, got {len(boxes)}")
        labels = torch.zeros(height, width, dtype=torch.long)
        for box in boxes:
            if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
                expected = "x0 y0 x1 y1 with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1"
                raise ValueError(f"boxes: expected {expected}, got {' '.join(map(str, box))}")
        for number, box in enumerate(boxes, 1):
            cells = labels[_cells(box, (height, width))]
            if not cells.numel():
                expected = f"each to contain a cell of {height} x {width}"
                raise ValueError(f"boxes: expected {expected}, got {' '.join(map(str, box))}")
            cells.fill_(number)
        return cls(structure=labels, background=0, boxes=tuple(map(tuple, boxes)))

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
    def picture_labels(
        self, picture: str, tokens: int, device: torch.device, *, resize: str = CENTRE
    ) -> Tensor:
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
            resize: "nearest-exact" or "nearest", as `labels_of_tokens`.

        Raises:
            ValueError: there is no label map of this picture, or its grid does not fit N.
        """

        def make() -> Tensor:
            if picture == "structure" and self.boxes:
                return _box_bits(self.boxes, token_grid(self.structure.shape, tokens)).to(device)
            return self._bits(self._tokens(picture, tokens, resize)).to(device)

        return self._cached(("labels", picture, tokens, device, resize), make)

    @outside_graphs(1)
    def query_labels(
        self,
        picture: str,
        tokens: int,
        reference_tokens: int,
        device: torch.device,
        *,
        resize: str = CENTRE,
    ) -> Tensor:
        """Return the labels of the output's tokens when it reads `picture`, as bit sets int32 [1, N].

        A token whose label `picture` does not show has all bits. `reference_tokens` is the number of tokens
        of `picture`; the other arguments are those of `picture_labels`.
        """

        def make() -> Tensor:
            own = self._tokens("structure", tokens, resize)
            reference = self._tokens(picture, reference_tokens, resize)
            return torch.where(torch.isin(own, reference), self._bits(own), EVERYTHING).to(device)

        return self._cached(("queries", picture, tokens, reference_tokens, device, resize), make)

    @outside_graphs(1)
    def object_labels(self, picture: str, tokens: int, device: torch.device) -> Tensor:
        """Return the labels of a picture's tokens as bit sets, int32 [1, N], without those of no object.

        A token of the background has no bits. Its label is 0 if the regions name none. Arguments as
        `picture_labels`.
        """

        def make() -> Tensor:
            labels = self._tokens(picture, tokens, CENTRE)
            outside = labels == (self.background or 0)
            return (torch.ones_like(labels) << labels).masked_fill(outside, 0).int().to(device)

        return self._cached(("object", picture, tokens, device), make)

    @outside_graphs(3)
    def subject_labels(
        self,
        picture: str,
        number: int,
        count: int,
        tokens: int,
        device: torch.device,
        *,
        resize: str = CENTRE,
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
            labels = labels_of_tokens(maps[number], tokens, resize)
            return torch.where(labels > 0, EVERYTHING, 0).int().to(device)

        return self._cached(("subject", picture, number, count, tokens, device, resize), make)

    def _cached(self, name: tuple, make: Any) -> Tensor:
        if name not in self._kept:
            with torch.inference_mode(False):
                self._kept[name] = make()
        return self._kept[name]

    def _tokens(self, picture: str, tokens: int, resize: str) -> Tensor:
        """The label of each token, [1, N]."""
        labels = getattr(self, picture)
        if labels is None:
            raise ValueError(f"regions: expected labels of the {picture}, which this method reads, got None")
        if isinstance(labels, tuple):
            expected = f"one label map of the {picture}, because this method reads only one"
            raise ValueError(f"regions: expected {expected}, got {len(labels)}")
        return labels_of_tokens(labels, tokens, resize)

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
        ValueError: the picture has colours, is larger than Pillow trusts, or cannot be read.
    """
    import numpy
    from PIL import Image

    if not Path(path).is_file():
        found = "a folder" if Path(path).is_dir() else "no such file"
        raise ValueError(f"{path}: expected a label map, found {found}")
    expected = f"{path}: expected a label map, one channel or a palette whose values are labels"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                mode = picture.mode
                labels = numpy.array(picture).astype("int64") if mode in LABEL_MODES else None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        most = f"{Image.MAX_IMAGE_PIXELS} pixels"
        raise ValueError(f"{expected}, got a picture of more than {most}") from error
    except Exception as error:  # Pillow's decoders raise any kind
        raise ValueError(f"{expected}, got something that cannot be read as one") from error
    if labels is None:
        raise ValueError(f"{expected}, got a picture of mode {mode}")
    return torch.from_numpy(labels)


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


def labels_of_tokens(labels: Tensor, tokens: int, resize: str = CENTRE) -> Tensor:
    """Return the label of each token, int64 [1, N], of a label map [h, w].

    `resize` is a mode of `torch.nn.functional.interpolate`: "nearest-exact" takes the label in the centre of
    the token, "nearest" the one in its upper left corner.
    """
    grid = token_grid(labels.shape, tokens)
    return F.interpolate(labels[None, None].float(), grid, mode=resize).flatten(1).long()


def _cells(box: Sequence[float], grid: Sequence[int]) -> tuple[slice, slice]:
    """The rows and columns of a grid (height, width) that a box covers, its sides rounded."""
    (left, right), (upper, lower) = (
        [round(side * n) for side in box[i::2]] for i, n in ((0, grid[1]), (1, grid[0]))
    )
    return slice(upper, lower), slice(left, right)


def _box_bits(boxes: Sequence[Sequence[float]], grid: tuple[int, int]) -> Tensor:
    """Bit sets int32 [1, N] of the boxes that cover each token of a grid. No box is the background."""
    bits = torch.zeros(grid, dtype=torch.int32)
    for label, box in enumerate(boxes, 1):
        bits[_cells(box, grid)] |= 1 << label
    return torch.where(bits == 0, EVERYTHING, bits).int().view(1, -1)


def _label_maps(labels: Any, name: str) -> Tensor | tuple[Tensor, ...]:
    """One label map, or a tuple of the label maps in a list."""
    if isinstance(labels, (list, tuple)) and labels and torch.as_tensor(labels[0]).ndim == 2:
        return tuple(_label_map(each, name) for each in labels)
    return _label_map(labels, name)


def _label_map(labels: Any | Sequence, name: str) -> Tensor:
    labels = torch.as_tensor(labels)
    if labels.ndim != 2 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{name}: expected whole numbers [h, w], got {labels.dtype} {list(labels.shape)}")
    labels = labels.long().cpu().clone()  # the caller's array may change later
    if labels.numel() == 0 or labels.min() < 0 or labels.max() > LARGEST:
        got = f"{labels.min().item()} to {labels.max().item()}" if labels.numel() else "none"
        raise ValueError(f"{name}: expected labels of 0 to {LARGEST}, got {got}")
    return labels
