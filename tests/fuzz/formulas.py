"""Dense float64 formulas of the ops, with rounding bounds: each map of scores is materialised.

Batch rows are taken first, and the segments of a call are put side by side.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.fuzz.rounding import Approx, contrasted, norm_gradient, softmax, unit_vectors


@dataclass(frozen=True, eq=False)
class Attention:
    """Softmax attention over keys [B, H, N_k, D], with everything a segment can add.

    `seen` and `counts` broadcast to the map [B, H, N_q, N_k]. `guide` is added to the logits.
    """

    query: Approx
    key: Approx
    value: Approx
    scale: float | Tensor
    counts: Tensor
    seen: Tensor
    dtype: torch.dtype
    shift: float | Tensor = 0.0
    contrast: float = 1.0
    total: Tensor | None = None
    guide: Approx | None = None

    def __post_init__(self) -> None:
        shape = torch.broadcast_shapes(self._raw().value.shape)
        counts, seen = self.counts.double().expand(shape), self.seen.expand(shape)
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "seen", seen & (counts > 0))

    def _raw(self) -> Approx:
        return self.query @ self.key.mT

    def logits(self) -> Approx:
        found = self._raw().scaled(self.scale).shifted(self.shift)
        return found if self.guide is None else found + self.guide

    def weights(self) -> tuple[Approx, Approx, Approx, Approx]:
        """Softmax p, its log-sum-exp, the weights m_j w_j, and dw/dp."""
        p, lse = softmax(self.logits(), self.counts, self.seen)
        total = self.counts.sum(-1, keepdim=True) if self.total is None else self.total
        w, slope = contrasted(p, self.contrast, total.clamp(min=1))
        return p, lse, w.scaled(self.counts).where(self.seen), slope

    def output(self) -> tuple[Approx, Approx]:
        _, lse, weights, _ = self.weights()
        return (weights.rounded(self.dtype) @ self.value).rounded(self.dtype), lse

    def gradients(self, grad: Approx, grad_lse: Approx | None = None) -> "Gradients":
        """x_j = w'_j g·v_j;  dl_j = P_j (x_j - Σ_k P_k x_k) + P_j dlse  with P = m p."""
        p, _, weights, slope = self.weights()
        rounded = weights.rounded(self.dtype)
        mass = p.scaled(self.counts).where(self.seen)
        x = (grad @ self.value.mT).rounded(self.dtype) * slope  # rounded as the weights are
        mean = _row_sum(mass * x)
        if self.contrast == 1.0:  # also computed as g·output, from the rounded output
            by_output = _row_sum(grad * self.output()[0])
            mean = replace(mean, error=torch.maximum(mean.error, by_output.error))
        logit = mass * (x - mean)
        if grad_lse is not None:
            logit = logit + mass * grad_lse.map(lambda y: y.unsqueeze(-1))
        moved = logit.scaled(self.scale).rounded(self.dtype)
        return Gradients(
            moved @ self.key, moved.mT @ self.query, rounded.mT @ grad, logit.rounded(self.dtype)
        )


@dataclass(frozen=True, eq=False)
class Gradients:
    """Of query, key, value and guide, before they are rounded."""

    query: Approx
    key: Approx
    value: Approx
    guide: Approx


def _row_sum(x: Approx) -> Approx:
    return x.sum(-1).map(lambda y: y.unsqueeze(-1))


def side_by_side(parts: list[Approx], dim: int) -> Approx:
    return Approx(
        torch.cat([part.value for part in parts], dim),
        torch.cat([part.error for part in parts], dim),
        parts[0].unit,
    )


def rows(x: Approx, batch_index: Tensor | None) -> Approx:
    return x if batch_index is None else x[batch_index.long()]


def rows_gradient(grad: Approx, batch_index: Tensor | None, batch: int) -> Approx:
    """Each row of the source has the sum over the query rows that read it."""
    if batch_index is None:
        return grad
    taken = torch.nn.functional.one_hot(batch_index.long(), batch).double().mT
    return Approx(
        torch.einsum("sb,b...->s...", taken, grad.value),
        torch.einsum("sb,b...->s...", taken, grad.error + len(batch_index) * grad.unit * grad.value.abs()),
        grad.unit,
    )


def scores(query: Approx, reference: Approx, similarity: str, joint: bool) -> Approx:
    """S [B, 1 or H, N_q, N_k]."""
    if joint:
        query, reference = (
            x.map(lambda y: y.transpose(1, 2).flatten(2).unsqueeze(1)) for x in (query, reference)
        )
    if similarity == "cosine":
        query, reference = unit_vectors(query), unit_vectors(reference)
    return query @ reference.mT


def features(x: Approx, similarity: str, dtype: torch.dtype) -> Approx:
    """What "guided" and "soft" compare: unit vectors in the dtype of the input, or the features."""
    return unit_vectors(x).rounded(dtype) if similarity == "cosine" else x


def features_gradient(x: Approx, grad: Approx, similarity: str) -> Approx:
    return norm_gradient(x, grad) if similarity == "cosine" else grad


def shared_bits(query_labels: Tensor | None, labels: Tensor | None) -> Tensor:
    """Which query sees which key, [B or 1, 1, N_q, N_k]."""
    if labels is None:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool)
    return ((query_labels.unsqueeze(-1) & labels.unsqueeze(-2)) != 0).unsqueeze(1)


def gather(x: Approx, index: Tensor) -> Approx:
    """x_{index_i}; an exact 0 where the index is -1."""
    taken = index.clamp(min=0).long().expand(-1, x.value.shape[1], -1).unsqueeze(-1)
    return x.map(lambda y: y.take_along_dim(taken, dim=2)).where((index >= 0).unsqueeze(-1))


def gather_gradient(grad: Approx, index: Tensor, tokens: int) -> Approx:
    """Each token has the sum over the queries that took it."""
    taken = (index.unsqueeze(-1) == torch.arange(tokens)).double().mT
    summed = Approx(taken, torch.zeros_like(taken), grad.unit) @ grad
    return summed
