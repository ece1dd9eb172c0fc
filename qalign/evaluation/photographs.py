"""Two photographs whose true correspondence is known: the two views of a stereo pair.

The pictures come with scikit-image, so nothing is downloaded.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CROPS_APART = 120  # pixels between the two crops


@dataclass(frozen=True, eq=False)
class StereoPair:
    """Two photographs of one scene, and the true shift between them.

    Attributes:
        structure, appearance: [3, S, S] in [0, 1].
        shift: [S', S'], in pixels of the photographs: how far each point of the structure photograph lies
            further to the right in the appearance photograph. It is infinite where it was not measured.
    """

    structure: Tensor
    appearance: Tensor
    shift: Tensor

    @property
    def size(self) -> int:
        return self.structure.shape[-1]


@dataclass(frozen=True, eq=False)
class Truth:
    """The true correspondence of the tokens of a square grid.

    Attributes:
        position: [N, 2] token centres in pixels (x, y), the same in both photographs.
        target: [N, 2] the same points of the scene in the appearance photograph.
        known: bool [N], False where the scene point is outside the photograph or was not measured.
        pitch: pixels from token to token.
    """

    position: Tensor
    target: Tensor
    known: Tensor
    pitch: float

    def error(self, index: Tensor) -> Tensor:
        """The distance in pixels between matched tokens and true positions, for the known tokens."""
        return (self.position[index.long()] - self.target).norm(dim=-1)[self.known]

    def chance(self) -> Tensor:
        """The errors of random matches, 64 for each known token."""
        drawn = torch.randint(
            len(self.position), (64, len(self.position)), generator=torch.Generator().manual_seed(0)
        )
        return torch.cat([self.error(index) for index in drawn])


def load_pair(size: int) -> StereoPair:
    """Load the stereo photographs of scikit-image (Middlebury 2014, motorcycle) as two squares.

    The two crops lie 120 pixels apart. This is further than any point shifts between the views, so the true
    match of a token is never the token in the same place.
    """
    import skimage
    from PIL import Image

    folder = Path(skimage.__file__).parent / "data"
    disparity = _array(folder / "motorcycle_disp.npz")
    side, width = disparity.shape
    middle = (width - side) // 2

    def picture(name: str, left: int) -> Tensor:
        with Image.open(folder / name) as image:
            resized = (
                image.convert("RGB")
                .crop((left, 0, left + side, side))
                .resize((size, size), Image.Resampling.BICUBIC)
            )
        return (
            torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
            .reshape(size, size, 3)
            .permute(2, 0, 1)
            / 255
        )

    left, right = middle + CROPS_APART // 2, middle - CROPS_APART // 2
    shift = (CROPS_APART - disparity[:, left : left + side]) * (size / side)
    return StereoPair(picture("motorcycle_left.png", left), picture("motorcycle_right.png", right), shift)


def _array(path: Path) -> Tensor:
    import numpy

    with numpy.load(path) as arrays:
        return torch.from_numpy(arrays[arrays.files[0]].astype("float32"))


def grid_truth(pair: StereoPair, tokens: int) -> Truth:
    """The true correspondence at the centres of a square grid of `tokens` tokens."""
    side = round(tokens**0.5)
    pitch = pair.size / side
    centre = (torch.arange(side) + 0.5) * pitch
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    position = torch.stack([x, y], -1).reshape(-1, 2)
    pixel = (centre * (pair.shift.shape[0] / pair.size)).long()
    shift = pair.shift[pixel][:, pixel].reshape(-1)
    target = position + torch.stack([shift.nan_to_num(posinf=0, neginf=0), torch.zeros_like(shift)], -1)
    return Truth(position, target, shift.isfinite() & (0 <= target[:, 0]) & (target[:, 0] < pair.size), pitch)
