"""Sums over the pairs that are seen. What labels hide takes no part, not even as a NaN or an infinity."""

import torch
from torch import Tensor

from ._blocks import on_host


def sum_of_seen(weights: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
    """weights [h, r, U] @ values [h, U, D]. Weights are 0 outside of `seen`: [1 or h, r, U] or None."""
    if seen is None or (on_host(values) and bool(values.isfinite().all())):
        return weights @ values
    # asking a device would wait for it: there, the sums are always those of the finite values and of the rest
    rising, falling = values == float("inf"), values == float("-inf")
    infinite = rising | falling
    total = weights @ values.masked_fill(infinite | values.isnan(), 0)
    above, below = weights > 0, weights < 0
    total.masked_fill_(_meet(above, rising) | _meet(below, falling), float("inf"))
    total.sub_(
        torch.zeros_like(total).masked_fill_(_meet(above, falling) | _meet(below, rising), float("inf"))
    )
    lost = _meet(seen.expand(weights.shape), values.isnan()) | _meet((weights == 0) & seen, infinite)
    return total.masked_fill_(lost, float("nan"))


def add_sum_of_seen(total: Tensor, weights: Tensor, rows: Tensor, seen: Tensor | None) -> None:
    """Add weights [h, U, r] @ rows [h, r, D] to the total of each key. `seen` is as in `sum_of_seen`."""
    if seen is None:
        total.baddbmm_(weights, rows)
    else:
        total.add_(sum_of_seen(weights, rows, seen.mT))


def _meet(left: Tensor, right: Tensor) -> Tensor:
    """Whether left_ij and right_jd are both true for some j."""
    return (left.float() @ right.float()) > 0
