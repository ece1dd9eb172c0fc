"""The error budget: how far from the float64 truth an implementation may be, from one rule, the same everywhere.

budget = error of plain PyTorch in the same precision + slack,  slack = (eps(dtype) + sqrt(reduction) · eps(float32)) · max|truth|

Errors are largest absolute differences. `reduction` is the longest sum behind an output element.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """Worst error against the truth, what was allowed, and whether it was kept."""

    error: float
    budget: float
    passed: bool


def worst_error(actual: Tensor, truth: Tensor) -> float:
    """max |actual - truth| in float64, where equal infinities agree and a NaN or a lone infinity is infinitely wrong."""
    actual, truth = actual.double(), truth.double()
    if actual.shape != truth.shape:
        return float("inf")
    difference = (actual - truth).abs().masked_fill(actual == truth, 0)
    return difference.nan_to_num(nan=float("inf")).max().item() if difference.numel() else 0.0


def error_budget(same_precision: Tensor, truth: Tensor, reduction: int) -> float:
    """The error of `same_precision` (plain PyTorch in the dtype under test) plus the slack of the module's rule."""
    eps = torch.finfo(same_precision.dtype).eps + reduction**0.5 * torch.finfo(torch.float32).eps
    finite = truth[truth.isfinite()]
    return worst_error(same_precision, truth) + eps * (finite.abs().max().item() if finite.numel() else 0.0)


def judge(actual: Tensor, same_precision: Tensor, truth: Tensor, reduction: int) -> Verdict:
    """Hold `actual` against the truth under the budget."""
    error, budget = worst_error(actual, truth), error_budget(same_precision, truth, reduction)
    return Verdict(error, budget, error <= budget)
