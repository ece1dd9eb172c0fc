"""Inputs of the validated ops: shapes, memory layouts and seeded random numbers."""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..testing import matched_queries, random_features, random_integers


class Shape(NamedTuple):
    """Sizes of one case and the memory layout of its features.

    The layout is "contiguous", "transposed", "sliced" or "shared" (the batch has stride 0).
    """

    batch: int
    heads: int
    query_tokens: int
    key_tokens: int
    head_dim: int
    value_dim: int
    layout: str

    def __str__(self) -> str:
        return (
            f"B={self.batch} H={self.heads} N_q={self.query_tokens} N_k={self.key_tokens} "
            f"D={self.head_dim} D_v={self.value_dim} {self.layout}"
        )


SMALL = (
    Shape(1, 2, 33, 70, 40, 40, "transposed"),
    Shape(2, 1, 70, 33, 64, 64, "shared"),
    Shape(1, 2, 17, 65, 160, 160, "contiguous"),
    Shape(2, 2, 40, 40, 80, 48, "sliced"),
    Shape(1, 2, 1, 50, 128, 128, "transposed"),
    Shape(1, 1, 65, 31, 96, 96, "contiguous"),
    Shape(2, 2, 64, 64, 32, 32, "contiguous"),
)
LARGE = (
    Shape(1, 8, 4096, 4096, 40, 40, "transposed"),
    Shape(2, 10, 1000, 1117, 64, 64, "shared"),
    Shape(3, 8, 1024, 1024, 80, 80, "transposed"),
    Shape(1, 24, 1500, 513, 128, 128, "contiguous"),
    Shape(3, 8, 256, 256, 160, 160, "sliced"),
)


class Draw:
    """Random inputs of one shape in one dtype on one device, the same in every run."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device, self.seed = (
            shape,
            dtype,
            device,
            1000 * shape.head_dim + shape.query_tokens,
        )

    def features(self, batch: int, tokens: int, dim: int) -> Tensor:
        """Draw features [batch, H, tokens, dim] in the layout of the shape."""
        self.seed += 1
        draw = partial(random_features, seed=self.seed, dtype=self.dtype, device=self.device)
        heads = self.shape.heads
        match self.shape.layout:
            case "transposed":
                return draw(batch, tokens, heads, dim).transpose(1, 2)
            case "sliced":
                return draw(batch, heads, tokens, dim + 8)[..., 3 : dim + 3]
            case "shared":
                return draw(1, heads, tokens, dim).expand(batch, -1, -1, -1)
            case _:
                return draw(batch, heads, tokens, dim)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        self.seed += 1
        return random_integers(low, high, *shape, seed=self.seed, device=self.device)

    def share(self, settings: Sequence[Any]) -> Sequence[Any]:
        """All settings on a GPU, every second one on the CPU, where the interpreter is slow.

        Two neighbouring shapes together have all settings.
        """
        return settings if self.device.type == "cuda" else settings[SMALL.index(self.shape) % 2 :: 2]

    def labels(self, tokens: int) -> Tensor:
        """Draw bit sets [B, tokens]. Token 0 has an empty one, so it sees nothing and nothing sees it."""
        labels = self.integers(1, 8, self.shape.batch, tokens)
        labels[:, 0] = 0
        return labels

    def counts(self, heads: int, tokens: int) -> Tensor:
        """Draw counts [B, heads, tokens] from 0 to 3."""
        return self.integers(0, 4, self.shape.batch, heads, tokens)

    def rows(self) -> Tensor:
        """Draw a batch index [B] into two rows."""
        return self.integers(0, 2, self.shape.batch)

    def attention(self, key_batch: int | None = None) -> SimpleNamespace:
        """Draw query, key and value."""
        shape, batch = self.shape, self.shape.batch if key_batch is None else key_batch
        return SimpleNamespace(
            query=self.features(shape.batch, shape.query_tokens, shape.head_dim),
            key=self.features(batch, shape.key_tokens, shape.head_dim),
            value=self.features(batch, shape.key_tokens, shape.value_dim),
        )

    def matching(self, refinement: str = "rearranged") -> SimpleNamespace:
        """Draw query, ref_query, ref_key, ref_value and own_key.

        Every query is a noisy copy of one reference token, so that all dtypes have the same match map.
        """
        shape = self.shape
        inputs = SimpleNamespace(
            ref_query=self.features(shape.batch, shape.key_tokens, shape.head_dim),
            ref_key=self.features(shape.batch, shape.key_tokens, shape.head_dim),
            ref_value=self.features(shape.batch, shape.key_tokens, shape.value_dim),
            own_key=self.features(shape.batch, shape.query_tokens, shape.head_dim)
            if refinement == "warped_values"
            else None,
        )
        self.seed += 2
        inputs.query, inputs.index = matched_queries(inputs.ref_query, shape.query_tokens, seed=self.seed)
        return inputs
