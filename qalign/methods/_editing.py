"""What most methods share: they edit the output rows, and every other row is stock attention."""

import random
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..denoiser import decoder_layers
from ..site import Site

Hook = Callable[[nn.Module, Tensor, Tensor, Site], Tensor]  # (module, its input, its output, site) -> output


class Card(NamedTuple):
    """A method in a line of `python -m qalign methods`.

    Attributes:
        title: as the field calls it. paper: its arXiv id, or where it was published.
        edits: what becomes of the output rows. layers: by default, on SD 1.5 and SDXL. steps: by default.
        uses: the ops it is made of.
        cost: of an edited layer and output row, in units of the self-attention that it replaces, at large N.
    """

    title: str
    paper: str
    edits: str
    layers: str
    steps: str
    uses: str
    cost: float


class Editing:
    """A method whose `edit` gives the attention output of the output rows.

    Attributes:
        card: what the method is, in a line.
        default_steps: (start, stop) as fractions of the denoising loop where the user names none; None is all of it.
    """

    card: ClassVar[Card]
    default_steps: ClassVar[tuple[float, float] | None] = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.idle:
            return site.plain(q, k, v)
        return site.merge(q, k, v, self.edit(q, k, v, site.output_rows(q), site.reference_rows(q), site))

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        """The attention output of the rows `output`, which read the rows `reference`: [rows, H, N, D]."""
        raise NotImplementedError

    def default_layers(self, names: Sequence[str]) -> list[str]:
        return last_six(names)

    def takes_structure(self, step: int, total: int) -> bool:
        return False


def last_six(names: Sequence[str]) -> list[str]:
    """The last six layers of the decoder: up_blocks.2 and up_blocks.3 of SD 1.5, up_blocks.1 of SDXL."""
    return decoder_layers(names)[-6:]


def uniform(count: int, *key: int | str) -> Tensor:
    """Numbers of [0, 1), float32 [count] on the CPU, that are a function of `key` and `count`."""
    seed = random.Random(repr((*key, count))).getrandbits(62)
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))
