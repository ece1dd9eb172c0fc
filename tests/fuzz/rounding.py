"""Float64 values with a bound on the rounding error of any implementation that keeps to docs/numerics.md.

The bound of a result follows from the bounds of its parts, operation by operation (running error analysis,
Higham, Accuracy and Stability of Numerical Algorithms, section 3.3). No implementation enters it, so no
implementation can share its defects. `unit` is the epsilon of the dtype in which sums are computed, which is
twice the unit roundoff. That factor of two covers the terms of second order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Approx:
    """A float64 tensor and the bound of |computed - value| for each element."""

    value: Tensor
    error: Tensor
    unit: float

    def __add__(self, other: "Approx") -> "Approx":
        return self._computed(self.value + other.value, self.error + other.error)

    def __sub__(self, other: "Approx") -> "Approx":
        return self._computed(self.value - other.value, self.error + other.error)

    def __mul__(self, other: "Approx") -> "Approx":
        return self._computed(self.value * other.value, self._spread(other, torch.mul))

    def __matmul__(self, other: "Approx") -> "Approx":
        summed = (self.value.shape[-1] + 2) * self.unit * (self.value.abs() @ other.value.abs())
        return Approx(self.value @ other.value, self._spread(other, torch.matmul) + summed, self.unit)

    def _spread(self, other: "Approx", product) -> Tensor:
        """How far a product moves by the errors of its factors."""
        return product(self.value.abs() + self.error, other.error) + product(self.error, other.value.abs())

    def _computed(self, value: Tensor, error: Tensor) -> "Approx":
        return Approx(value, error + self.unit * value.abs(), self.unit)

    def __getitem__(self, index) -> "Approx":
        return self.map(lambda x: x[index])

    @property
    def mT(self) -> "Approx":
        return self.map(lambda x: x.mT)

    def map(self, move) -> "Approx":
        """Move elements, without arithmetic."""
        return Approx(move(self.value), move(self.error), self.unit)

    def scaled(self, factor: float | Tensor) -> "Approx":
        """Multiply by a number that every implementation has in float32 or float64."""
        size = abs(factor)
        return Approx(
            factor * self.value, size * self.error + 3 * self.unit * (size * self.value).abs(), self.unit
        )

    def shifted(self, number: float | Tensor) -> "Approx":
        return Approx(
            self.value + number, self.error + self.unit * (self.value.abs() + abs(number)), self.unit
        )

    def sum(self, dim: int) -> "Approx":
        terms = self.value.shape[dim] + 2
        error = self.error.sum(dim) + terms * self.unit * self.value.abs().sum(dim)
        return Approx(self.value.sum(dim), error, self.unit)

    def rounded(self, dtype: torch.dtype) -> "Approx":
        """Round to `dtype`: a number below the smallest may be lost, one above the largest is infinite."""
        kind = torch.finfo(dtype)
        size = self.value.abs() + self.error
        error = self.error + kind.eps * size + kind.smallest_normal * kind.eps
        error = error.masked_fill(size > kind.max, float("inf"))
        return Approx(self.value, error, self.unit)

    def where(self, condition: Tensor) -> "Approx":
        """Keep what meets the condition; an exact 0 elsewhere."""
        return self.map(lambda x: x.where(condition, 0))


def exact(x: Tensor) -> Approx:
    """What every implementation is given."""
    unit = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    return Approx(x.detach().double(), torch.zeros_like(x, dtype=torch.float64), unit)


def softmax(logits: Approx, counts: Tensor, seen: Tensor) -> tuple[Approx, Approx]:
    """p_j = e^{l_j} / Z and log Z with Z = Σ m_j e^{l_j} over the keys that are seen.

    A row that sees nothing has p = 0 and log Z = -inf. An error e of the exponent is a relative error
    expm1(e) of its power.
    """
    value = logits.value.masked_fill(~seen, float("-inf"))
    lse = (value + counts.log()).logsumexp(-1, keepdim=True)
    size = logits.value.abs().where(seen, 0)
    log_counts = counts.log().abs().where(seen, 0)
    rounding = 4 * logits.unit * (size + size.amax(-1, keepdim=True) + log_counts + 1)
    exponent = logits.error.where(seen, 0) + rounding
    summed = (value.shape[-1] + 4) * logits.unit
    whole = exponent.amax(-1, keepdim=True) + summed
    p = (value - lse.masked_fill(lse == float("-inf"), 0)).exp()
    lse_error = whole + logits.unit * lse.abs().nan_to_num(posinf=0)
    tiny = torch.finfo(torch.float32).smallest_normal
    relative = (exponent + whole).clamp(max=700).expm1()  # p and what is computed lie between 0 and 1
    error = (p * relative).clamp(max=1) + (tiny + p * summed)
    return (
        Approx(p, error.where(seen, 0), logits.unit),
        Approx(lse.squeeze(-1), lse_error.squeeze(-1), logits.unit),
    )


def contrasted(p: Approx, contrast: float, total: Tensor) -> tuple[Approx, Approx]:
    """w = clip(c (p - 1/N) + 1/N, 0, 1) and dw/dp, which is uncertain where w may or may not be clipped."""
    if contrast == 1.0:
        return p, Approx(torch.ones_like(p.value), torch.zeros_like(p.value), p.unit)
    level = 1 / total
    raw = contrast * (p.value - level) + level
    error = contrast * p.error + 4 * p.unit * (contrast * (p.value + level) + level)
    near = (raw.abs() <= error) | ((raw - 1).abs() <= error)
    inside = ((raw > 0) & (raw < 1)).double()
    slope = Approx(contrast * inside, contrast * near, p.unit)
    return Approx(raw.clamp(0, 1), error, p.unit), slope


def unit_vectors(x: Approx, dim: int = -1) -> Approx:
    """x / max(|x|, 1e-12)."""
    norm = x.value.norm(dim=dim, keepdim=True).clamp(min=1e-12)
    relative = x.error.norm(dim=dim, keepdim=True) / norm + (x.value.shape[dim] + 4) * x.unit
    value = x.value / norm
    return Approx(value, x.error / norm + value.abs() * relative, x.unit)


def norm_gradient(x: Approx, grad: Approx) -> Approx:
    """The gradient of `unit_vectors`: (g - u (u·g)) / |x|. A zero row passes it on divided by 1e-12."""
    unit = unit_vectors(x)
    along = (unit * grad).sum(-1).map(lambda y: y.unsqueeze(-1))
    size = x.value.norm(dim=-1, keepdim=True)
    inverse = 1 / size.clamp(min=1e-12)
    relative = (x.value.shape[-1] + 4) * x.unit + x.error.norm(dim=-1, keepdim=True) * inverse
    across = grad - (unit * along).where(size > 1e-12)
    return across * Approx(inverse, inverse * relative, x.unit)
