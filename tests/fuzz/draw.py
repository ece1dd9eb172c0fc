"""Random inputs for the fuzzer: sizes, strides, dtypes, labels, counts, batch rows, ties, zero rows, NaN."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from qalign_kernels import _backends
from qalign_kernels._backends import TRITON_HEAD_DIMS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "transposed", "sliced", "stepped", "shared")
# one value of each class: powers of two and their neighbours meet the borders of tiles
TOKENS = (1, 2, 3, 7, 13, 16, 17, 31, 33, 63, 64, 65, 127, 129)
HEAD_DIMS = (1, 2, 3, 7, 8, 16, 17, 33, 40, 64, 80)
CONTENTS = ("normal", "ties", "zero rows", "small", "large")
BITS = (0, 1, 2, 3, 4, 6, 7, -1, -(2**31))


@dataclass(frozen=True)
class Sizes:
    batch: int
    heads: int
    query_tokens: int
    key_tokens: int
    head_dim: int
    value_dim: int
    ref_batch: int  # differs from `batch` only beside a batch index
    dtype: torch.dtype


def served(backend: str) -> list[torch.dtype]:
    if backend != "triton":
        return list(DTYPES)
    return [x for x in DTYPES if _backends.triton_refusal(torch.empty(1, dtype=x), ()) is None]


def sizes(backend: str) -> st.SearchStrategy[Sizes]:
    triton = backend == "triton"
    tokens = st.sampled_from(TOKENS[:12] if triton else TOKENS)
    head_dims = st.sampled_from(TRITON_HEAD_DIMS[:4] if triton else HEAD_DIMS)
    return st.builds(
        Sizes,
        st.integers(1, 2 if triton else 3),
        st.integers(1, 3),
        tokens,
        tokens,
        head_dims,
        head_dims,
        st.integers(1, 3),
        st.sampled_from(served(backend)),
    )


@dataclass
class Draw:
    """Draws of one example, from hypothesis where shrinking helps and from a seed for the numbers."""

    data: Any
    sizes: Sizes
    numbers: torch.Generator

    def one(self, *choices: Any) -> Any:
        return self.data.draw(st.sampled_from(choices))

    def flag(self) -> bool:
        return self.data.draw(st.booleans())

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.numbers, dtype=torch.int32)

    def features(self, batch: int, tokens: int, dim: int, content: str | None = None) -> Tensor:
        """[batch, H, tokens, dim] in any layout."""
        heads, dtype = self.sizes.heads, self.sizes.dtype
        layout = self.one(*LAYOUTS)
        shape = (1 if layout == "shared" else batch, heads, tokens, dim)
        x = self._content(content or self.one(*CONTENTS), shape).to(dtype)
        match layout:
            case "transposed":
                return x.transpose(1, 2).contiguous().transpose(1, 2)
            case "sliced":
                wide = torch.full((*shape[:3], dim + 5), float("nan"), dtype=dtype)
                wide[..., 3 : dim + 3] = x
                return wide[..., 3 : dim + 3]
            case "stepped":
                wide = torch.full((*shape[:3], 2 * dim), float("nan"), dtype=dtype)
                wide[..., ::2] = x
                return wide[..., ::2]
            case "shared":
                return x.expand(batch, -1, -1, -1)
        return x

    def _content(self, content: str, shape: tuple[int, ...]) -> Tensor:
        if content == "ties":  # small integers: every sum is exact, so equal scores are equal everywhere
            return self.integers(-2, 3, *shape).double()
        x = torch.randn(shape, generator=self.numbers, dtype=torch.float64)
        if content == "zero rows":
            return x * self.integers(0, 2, *shape[:3], 1)
        return x * {"normal": 1.0, "small": 1e-3, "large": 12.0}[content]

    def batch_index(self) -> Tensor | None:
        """Rows of a reference of `ref_batch` rows, which must be `batch` without one."""
        s = self.sizes
        if s.ref_batch != s.batch or self.flag():
            return self.integers(0, s.ref_batch, s.batch)
        return None

    def labels(self, tokens: int) -> Tensor:
        bits = torch.tensor(self.one(BITS, BITS[1:4], (0, 1), (7,)), dtype=torch.int32)
        batch = self.one(1, self.sizes.batch)
        return bits[self.integers(0, len(bits), batch, tokens).long()]

    def counts(self, tokens: int) -> Tensor:
        high = self.one(2, 4, 1, 1000)
        return self.integers(0, high, self.sizes.batch, self.one(1, self.sizes.heads), tokens)

    def scale(self) -> float | None:
        return self.one(None, 0.3, -0.7, 0.0, 1.5)

    def contrast(self) -> float:
        return self.one(1.0, 1.67, 0.6, 3.0)

    def poison(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of `x` with a NaN or infinity in one place, and where it is."""
        place = tuple(int(self.integers(0, size, 1)) for size in x.shape)
        hit = torch.zeros(x.shape, dtype=torch.bool)
        hit[place] = True
        poisoned = x.clone()
        poisoned[place] = self.one(float("nan"), float("nan"), float("inf"), -float("inf"))
        return poisoned, hit


def draws(data: Any, backend: str) -> Draw:
    seed = data.draw(st.integers(0, 2**31))
    return Draw(data, data.draw(sizes(backend)), torch.Generator().manual_seed(seed))
