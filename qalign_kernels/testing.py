"""The error budget: one rule for how far an implementation may be from the float64 truth.

budget = error of plain PyTorch in the same precision + slack
slack = (eps(dtype) + sqrt(reduction) · eps(float32)) · max|truth|

An error is the largest absolute difference. `reduction` is the length of the longest sum in an output
element.

Plain PyTorch may have the same defect as what is judged, such as a long sum in half precision.
`float64_bounds` puts the effect of rounding the inputs, computed in float64, in its place.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """The largest error, the error budget, and whether the error is within the budget."""

    error: float
    budget: float
    passed: bool


def worst_error(actual: Tensor, truth: Tensor) -> float:
    """Compute max |actual - truth| in float64.

    Equal infinities have no error. A NaN, any other infinity and a wrong shape have an infinite one.
    """
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
    """Compute the budget. `same_precision` is the result of plain PyTorch in the dtype under test."""
    eps = torch.finfo(same_precision.dtype).eps + reduction**0.5 * torch.finfo(torch.float32).eps
    finite = truth[truth.isfinite()]
    return worst_error(same_precision, truth) + eps * (finite.abs().max().item() if finite.numel() else 0.0)


def judge(actual: Tensor, same_precision: Tensor, truth: Tensor, reduction: int) -> Verdict:
    """Compare `actual` with the truth. The budget must be finite."""
    error, budget = worst_error(actual, truth), error_budget(same_precision, truth, reduction)
    return Verdict(error, budget, error <= budget < float("inf"))


def judge_formula(
    actual: Tensor, formula: Callable[..., Tensor], *tensors: Tensor, reduction: int
) -> Verdict:
    """Compare `actual` with `formula(*tensors)`, once in float64 and once in the dtype of the tensors."""
    truth = formula(*map(_in_double, tensors))
    return judge(actual, formula(*tensors), truth, reduction)


class Bound(NamedTuple):
    """A result in float64, and how far another one may be from it."""

    truth: Tensor
    budget: float

    def judge(self, actual: Tensor) -> Verdict:
        error = worst_error(actual, self.truth)
        return Verdict(error, self.budget, error <= self.budget < float("inf"))


def float64_bounds(
    formula: Callable[..., Sequence[Tensor]], *tensors: Tensor, reduction: int, draws: int = 2
) -> list[Bound]:
    """Compute the results of `formula` in float64 and their budgets, with nothing in the dtype under test.

    budget = rounding error + (eps(dtype) + sqrt(reduction) · eps(float32)) · max|truth|

    The rounding error is how far the result moves, in float64, where each element of the inputs is multiplied
    by 1 + eps(dtype) · u with u uniform in [-1, 1]: the largest of some draws.
    """
    eps = max(torch.finfo(x.dtype).eps for x in tensors if x.is_floating_point())
    generator = torch.Generator().manual_seed(0)

    def moved(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        u = 2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1
        return x.double() * (1 + torch.finfo(x.dtype).eps * u.to(x.device))

    truths = formula(*map(_in_double, tensors))
    others = [formula(*map(moved, tensors)) for _ in range(draws)]
    slack = eps + reduction**0.5 * torch.finfo(torch.float32).eps
    return [
        Bound(truth, max(worst_error(x, truth) for x in drawn) + slack * truth.abs().max().item())
        for truth, *drawn in zip(truths, *others, strict=True)
    ]


def _in_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def judge_exact(actual: Tensor, truth: Tensor) -> Verdict:
    """Compare integers or copies with the truth. No error is allowed."""
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
    """Compare a match with all scores: `truth` in float64, `same_precision` in the dtype under test.

    error = max(|score - best|, regret / 2),  regret = |best - truth at index|

    Two scores that each have an error of one budget may change places, so the regret counts half. An index
    with a clear margin must be right.

    Args:
        index: int32 [B, G, N_q], or [B, G, N_q, k] with the most similar first. An index that is out of range
            or appears twice has an infinite error.
        score: the scores at `index`, of the same shape.
        same_precision: [B, G, N_q, N_k], the scores from plain PyTorch.
        truth: [B, G, N_q, N_k], the scores in float64.
        reduction: the number of products in a score.
        packed: the scores have lost seven mantissa bits.
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
    """Fill uninitialised tensors inside the block with NaN, or with the largest integer.

    An element that an op does not write is then always wrong.
    """
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
    """Draw normal numbers on the CPU in float32, then round and move them: every device has the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


def random_integers(
    low: int, high: int, *shape: int, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw int32 numbers in [low, high), the same on every device."""
    return torch.randint(
        low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32
    ).to(device)


def matched_queries(
    reference: Tensor, tokens: int, *, seed: int, noise: float = 0.25
) -> tuple[Tensor, Tensor]:
    """Draw noisy copies of random reference tokens, each with one clear match.

    Returns:
        (queries [B_r, H, tokens, D], index int32 [B_r, 1, tokens] of the copied tokens).
    """
    batch, heads, ref_tokens, head_dim = reference.shape
    index = random_integers(0, ref_tokens, batch, 1, tokens, seed=seed, device=reference.device)
    matched = reference.take_along_dim(index.long().unsqueeze(-1), dim=2)
    disturbance = random_features(batch, heads, tokens, head_dim, seed=seed + 1, device=reference.device)
    return (matched + noise * disturbance).to(reference.dtype), index
