"""The attention shapes of real models, and inputs for them, random or correlated as in similar pictures."""

from typing import NamedTuple

import torch

from qalign_kernels.bench.measure import Inputs, Sizes, draw_inputs, in_processor_layout
from qalign_kernels.bench.ops import MATCHED_FRACTION as UNIQUE_FRACTION

PROCESSOR, CONTIGUOUS = LAYOUTS = ("processor", "contiguous")  # [B, N, H, D] storage, [B, H, N, D] storage
JOINT_OPS = ("similarity_argmax", "similarity_topk", "qalign_attention")
FOLDED_HEAD_DIM = 64  # joint scores of heads in a row are taken in parts of this many channels


class Shape(NamedTuple):
    """One self-attention layer: [batch, heads, tokens, head_dim].

    A `sweep` shape is measured with the main ops only: for plots against tokens, and for one more model.
    """

    name: str
    batch: int
    heads: int
    tokens: int
    head_dim: int
    sweep: bool = False

    @property
    def size(self) -> list[int]:
        return [self.batch, self.heads, self.tokens, self.head_dim]

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.batch, self.heads, self.tokens, self.tokens, self.head_dim, self.head_dim)

    @property
    def scores(self) -> int:
        """Count score elements, E = B·H·N²."""
        return self.sizes.scores

    @property
    def large(self) -> bool:
        """Whether the shape takes too long for a quick look on a CPU."""
        return self.scores * self.head_dim > 4e10


SHAPES = [
    Shape("sd15-mid", 2, 8, 256, 160),
    Shape("sd15-low", 2, 8, 1024, 80),
    Shape("sd15", 2, 8, 4096, 40),
    Shape("sd15-256px", 1, 8, 1024, 40, sweep=True),
    Shape("sd15-384px", 1, 8, 2304, 40, sweep=True),
    Shape("sd15-512px", 1, 8, 4096, 40),
    Shape("sd15-768px", 1, 8, 9216, 40, sweep=True),
    Shape("sd15-1024px", 1, 8, 16384, 40),
    Shape("sdxl-low", 2, 20, 1024, 64),
    Shape("sdxl", 2, 10, 4096, 64),
    Shape("flux", 1, 24, 4096, 128),
    Shape("sd3", 1, 24, 4096, 64, sweep=True),
    Shape("sd21-1024px", 1, 5, 16384, 64, sweep=True),
]
QUICK_SHAPES = ("sd15-mid", "sd15-low", "sd15-256px", "sd15-512px")


def shape_named(name: str) -> Shape:
    """Look up a shape of SHAPES.

    Raises:
        ValueError: no shape has this name.
    """
    found = next((shape for shape in SHAPES if shape.name == name), None)
    if found is None:
        raise ValueError(f"name: expected one of {', '.join(shape.name for shape in SHAPES)}, got {name}")
    return found


def make_inputs(
    shape: Shape,
    correlated: bool,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    asked_fraction: float = UNIQUE_FRACTION,
    layout: str = PROCESSOR,
) -> Inputs:
    """Draw normal features.

    Args:
        correlated: make each query a noisy copy of its match; otherwise matches are by chance.
        asked_fraction: the fraction of reference tokens that are matched, where `correlated`.
        layout: one of LAYOUTS.
    """
    fraction = asked_fraction if correlated else None
    inputs = draw_inputs(shape.sizes, dtype, device, matched_fraction=fraction, seed=seed)
    return in_processor_layout(inputs) if layout == PROCESSOR else inputs


def layouts(op_name: str, shape: Shape) -> tuple[str, ...]:
    """Name the layouts in which an op uses different kernels: joint scores fold the heads in one of them."""
    folds = op_name in JOINT_OPS and shape.head_dim != FOLDED_HEAD_DIM
    folds = folds and shape.heads * shape.head_dim % FOLDED_HEAD_DIM == 0
    return LAYOUTS if folds else (PROCESSOR,)
