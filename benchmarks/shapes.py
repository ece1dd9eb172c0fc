"""The attention shapes of real models, and inputs for them: random, or correlated as the features of two similar pictures are."""

from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """One self-attention layer: [batch, heads, tokens, head_dim]. `sweep`: only the main ops, for plots against tokens and for one more model."""

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
    def scores(self) -> int:
        """Score elements E = B·H·N²."""
        return self.batch * self.heads * self.tokens**2

    @property
    def large(self) -> bool:
        """Too long for a quick look on a CPU."""
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
UNIQUE_FRACTION = 0.55
NUM_LABELS = 4


class Inputs(NamedTuple):
    """Everything an op may want: features [B, H, N, D], a match map [B, 1, N] and its counts, class ids and bit-set labels [B, N]:
    `bit_sets` of NUM_LABELS equal regions, `half_sets` of two."""

    query: Tensor
    ref_query: Tensor
    key: Tensor
    value: Tensor
    match_map: Tensor
    counts: Tensor
    bit_sets: Tensor
    half_sets: Tensor
    classes: Tensor


def make_inputs(shape: Shape, correlated: bool, dtype: torch.dtype, device: str, seed: int = 0, asked_fraction: float = UNIQUE_FRACTION) -> Inputs:
    """Normal features; `correlated` makes each query a noisy copy of its match among `asked_fraction` of the reference tokens, else matches
    are by chance."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.batch, shape.heads, shape.tokens, shape.head_dim)
    query, ref_query, key, value = (torch.randn(size, generator=generator, device=device) for _ in range(4))
    index = torch.randint(shape.tokens, (shape.batch, 1, shape.tokens), generator=generator, device=device)
    if correlated:
        index = torch.stack([_map(shape.tokens, asked_fraction, generator, device) for _ in range(shape.batch)]).unsqueeze(1)
        rows = index.unsqueeze(-1).expand(-1, shape.heads, -1, shape.head_dim)
        query = ref_query.gather(2, rows) + 0.5 * query
    counts = torch.zeros_like(index).scatter_add_(2, index, torch.ones_like(index))
    classes = torch.arange(shape.tokens, device=device).mul(NUM_LABELS).div(shape.tokens, rounding_mode="floor").expand(shape.batch, -1)
    query, ref_query, key, value = (x.to(dtype) for x in (query, ref_query, key, value))
    bit_sets, half_sets = ((1 << ids).int() for ids in (classes, classes.mul(2).div(NUM_LABELS, rounding_mode="floor")))
    return Inputs(query, ref_query, key, value, index.int(), counts.int(), bit_sets, half_sets, classes.int().contiguous())


def _map(tokens: int, fraction: float, generator: torch.Generator, device: str) -> Tensor:
    """A match map onto exactly this fraction of the reference tokens."""
    unique = max(1, round(fraction * tokens))
    chosen = torch.randperm(tokens, generator=generator, device=device)[:unique]
    repeated = chosen[torch.randint(unique, (tokens - unique,), generator=generator, device=device)]
    return torch.cat((chosen, repeated))[torch.randperm(tokens, generator=generator, device=device)]


def unique_fraction(index: Tensor) -> float:
    """Distinct reference tokens per query token, U/N, averaged over the maps [B, G, N]."""
    return sum(row.unique().numel() / row.numel() for row in index.flatten(0, 1)) / index.shape[:2].numel()
