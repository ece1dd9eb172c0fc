"""Means over pairs of pictures, and their intervals by a paired bootstrap."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 10_000


def resample(
    columns: Mapping[str, Tensor], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Tensor]:
    """Average columns [pairs] over all pairs, and over resamples of the pairs drawn with replacement.

    All columns share the resamples, so a difference of two of the means is a paired difference. NaN is left
    out. A column with figures of fewer than two pairs has NaN for the resamples, because one pair has no
    spread.

    Returns:
        By column, [1 + resamples]: first the mean over all pairs.

    >>> means = resample({"a": torch.tensor([1.0, 2.0, 3.0])}, resamples=100)
    >>> means["a"].shape, means["a"][0].item()
    (torch.Size([101]), 2.0)
    """
    table = torch.stack(list(columns.values()), 1).double()
    pairs = len(table)
    drawn = torch.randint(pairs, (resamples, pairs), generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(drawn.shape, dtype=torch.float64)
    weights = torch.zeros(resamples, pairs, dtype=torch.float64).scatter_add_(1, drawn, ones)
    weights = torch.cat([torch.ones(1, pairs, dtype=torch.float64), weights])
    means = (weights @ table.nan_to_num()) / (weights @ (~table.isnan()).double())
    means[1:, (~table.isnan()).sum(0) < 2] = torch.nan
    return dict(zip(columns, means.unbind(1)))


def estimate(means: Tensor) -> dict[str, Any]:
    """The value and the central 95 % interval of means [1 + resamples], or of something computed from them.

    A value that is not finite is None, and so is an interval.
    """
    bounds = torch.tensor([0.025, 0.975], dtype=means.dtype)
    interval = torch.nanquantile(means[1:], bounds).tolist()
    known = all(map(math.isfinite, interval))
    return {"value": finite(means[0].item()), "interval": interval if known else None}


def finite(number: float) -> float | None:
    """The number, or None where it is NaN or infinite, which JSON cannot hold."""
    return number if math.isfinite(number) else None
