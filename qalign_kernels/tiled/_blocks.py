"""Blocks of heads and query rows whose temporaries stay within a byte budget, and batch rows by index."""

from collections.abc import Iterator

import torch
from torch import Tensor

CPU_BLOCK_BYTES = 8 << 20  # fits in the last-level cache
DEVICE_BLOCK_BYTES = 32 << 20


def accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def on_host(x: Tensor) -> bool:
    """Whether values of `x` can be read without waiting for a device."""
    return x.device.type == "cpu"


def blocks(
    heads: int, queries: int, bytes_per_row: int, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """Slices of heads and of query rows that cover [heads, queries].

    A row costs `bytes_per_row`. Several whole heads go together if they fit.
    """
    budget = CPU_BLOCK_BYTES if device.type == "cpu" else DEVICE_BLOCK_BYTES
    affordable = max(1, budget // bytes_per_row)
    head_step = min(heads, max(1, affordable // queries))
    row_step = -(-queries // -(-queries // affordable))
    for head in range(0, heads, head_step):
        for row in range(0, queries, row_step):
            yield slice(head, min(head + head_step, heads)), slice(row, min(row + row_step, queries))


def batch_row(x: Tensor, row: int, batch_index: Tensor | None) -> Tensor:
    """x[row], or x[batch_index[row]]. It is a view, but with an index on a device it is a copy."""
    if batch_index is None:
        return x[row]
    if on_host(x):
        return x[row_read(batch_index, row, x.shape[0])]
    return x.index_select(0, batch_index[row : row + 1].clamp(0, x.shape[0] - 1))[0]


def row_read(batch_index: Tensor, row: int, rows: int) -> int:
    """The row of `rows` that a batch row reads; the nearest one for an index out of range."""
    return min(max(int(batch_index[row]), 0), rows - 1)
