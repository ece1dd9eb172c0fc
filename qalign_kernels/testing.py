"""The error budget: how far from the float64 truth an implementation may be, from one rule, the same everywhere.

budget = error of plain PyTorch in the same precision + slack,  slack = (eps(dtype) + sqrt(reduction) · eps(float32)) · max|truth|

Errors are largest absolute differences. `reduction` is the longest sum behind an output element.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
    return (
        difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()
        if difference.numel()
        else 0.0
    )


def error_budget(same_precision: Tensor, truth: Tensor, reduction: int) -> float:
    """The error of `same_precision` (plain PyTorch in the dtype under test) plus the slack of the module's rule."""
    eps = torch.finfo(same_precision.dtype).eps + reduction**0.5 * torch.finfo(torch.float32).eps
    finite = truth[truth.isfinite()]
    return worst_error(same_precision, truth) + eps * (finite.abs().max().item() if finite.numel() else 0.0)


def judge(actual: Tensor, same_precision: Tensor, truth: Tensor, reduction: int) -> Verdict:
    """Hold `actual` against the truth under the budget, which must be finite."""
    error, budget = worst_error(actual, truth), error_budget(same_precision, truth, reduction)
    return Verdict(error, budget, error <= budget < float("inf"))


def judge_formula(
    actual: Tensor, formula: Callable[..., Tensor], *tensors: Tensor, reduction: int
) -> Verdict:
    """Hold `actual` against `formula` of the tensors: in float64 it is the truth, as it stands the yardstick."""
    truth = formula(*(x.double() if x.is_floating_point() else x for x in tensors))
    return judge(actual, formula(*tensors), truth, reduction)


def judge_exact(actual: Tensor, truth: Tensor) -> Verdict:
    """Hold integers and copies against the truth: no error is allowed."""
    error = worst_error(actual, truth)
    return Verdict(error, 0.0, error == 0)


def judge_match(
    index: Tensor,
    score: Tensor,
    same_precision: Tensor,
    truth: Tensor,
    reduction: int,
    *,
    packed: bool = False,
) -> Verdict:
    """Hold a match by its scores against score tables [B, G, N_q, N_k], the truth and plain PyTorch's.

    error = max(|score - best|, regret / 2), regret = |best - truth at index|: two scores that are each off by the budget may change
    places, no further ones, so an index whose margin is clear must be right. `packed` scores have lost seven mantissa bits.

    index, score: [B, G, N_q] or, most similar first, [B, G, N_q, k]; an index out of range or chosen twice is infinitely wrong.
    """
    if index.dim() == 3:
        index, score = index.unsqueeze(-1), score.unsqueeze(-1)
    budget = error_budget(same_precision, truth, reduction)
    finite = truth[truth.isfinite()]
    if packed and finite.numel():
        budget += 2**-15 * finite.abs().max().item()
    columns, chosen = truth.shape[-1], index.sort(-1).values.long()
    twice = (chosen[..., 1:] == chosen[..., :-1]) & (chosen[..., 1:] >= 0)
    if index.shape[:3] != truth.shape[:3] or index.min() < -1 or index.max() >= columns or twice.any():
        return Verdict(float("inf"), budget, False)
    best = truth.sort(-1, descending=True).values[..., : index.shape[-1]]
    at_index = truth.gather(-1, index.clamp(min=0).long()).masked_fill(index < 0, float("-inf"))
    error = max(worst_error(score, best), worst_error(at_index, best) / 2)
    return Verdict(error, budget, error <= budget < float("inf"))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, uninitialised tensors hold NaN, or the largest integer, so that no element is right by accident."""
    deterministic: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*determinis.*")
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
        torch.set_deterministic_debug_mode("warn")
        deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            deterministic.fill_uninitialized_memory = fill


def random_features(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Normal numbers, the same on every device: drawn on the CPU in float32, then rounded and moved."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


def random_integers(
    low: int, high: int, *shape: int, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """int32 in [low, high), the same on every device."""
    return torch.randint(
        low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32
    ).to(device)


def matched_queries(
    reference: Tensor, tokens: int, *, seed: int, noise: float = 0.25
) -> tuple[Tensor, Tensor]:
    """Noisy copies [B_r, H, tokens, D] of random reference tokens, and which: int32 [B_r, 1, tokens]. Each has one clear match."""
    batch, heads, ref_tokens, head_dim = reference.shape
    index = random_integers(0, ref_tokens, batch, 1, tokens, seed=seed, device=reference.device)
    matched = reference.take_along_dim(index.long().unsqueeze(-1), dim=2)
    disturbance = random_features(batch, heads, tokens, head_dim, seed=seed + 1, device=reference.device)
    return (matched + noise * disturbance).to(reference.dtype), index
