"""The published methods: settings, and what they make of queries, keys and values."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..site import Site
from .cross_image import CrossImage
from .qalign import QAlign


class Method(Protocol):
    """Frozen settings with one function on [B, H, N, D] tensors, and what `attach` asks of them."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The attention output of every row of the batch, [B, H, N, D]."""

    def default_layers(self, names: Sequence[str]) -> list[str]:
        """Which of a denoiser's self-attention layers the method edits where the user names none."""

    def takes_structure(self, step: int, total: int) -> bool:
        """Whether keys and values come from the structure at this step."""


__all__ = ["CrossImage", "Method", "QAlign"]
