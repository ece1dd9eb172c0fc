"""What the fuzzer asks of a call: to run it, its float64 formula, its gradients, and what a NaN reaches."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.rounding import Approx, exact

Grads = dict[str, Approx]


@dataclass
class Call:
    """One call. `leaves` are its float tensors by name, `others` every other tensor."""

    dtype: torch.dtype
    leaves: dict[str, Tensor]
    others: dict[str, Tensor | None] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    learned: tuple[str, ...] = ()  # the leaves that have a gradient
    hits: dict[str, Tensor] = field(default_factory=dict)  # where the leaves are NaN or infinite

    def run(self, leaves: dict[str, Tensor], backend: str) -> list[Tensor]:
        """The float results, and integer results after them."""
        raise NotImplementedError

    def truth(self, results: list[Tensor], backend: str) -> list[Approx]:
        """What the float results are, with their bounds."""
        raise NotImplementedError

    def gradients(self, grads: list[Approx], backend: str) -> Grads:
        raise NotImplementedError

    def reached(self, hits: dict[str, Tensor], results: list[Tensor], backend: str) -> list[Tensor]:
        """The elements of the float results that read an element of `hits`."""
        raise NotImplementedError

    def has_gradient(self, backend: str) -> bool:
        return bool(self.learned) and backend != "triton"

    def lost(self, reached: Tensor) -> Tensor:
        """The elements among those reached by a NaN that must be NaN."""
        return reached

    def exact(self, name: str) -> Approx:
        """A leaf without NaN and infinities, which are checked by `reached`."""
        return exact(self.leaves[name].where(self.leaves[name].isfinite(), 0))

    @property
    def scale(self) -> float:
        given = self.settings.get("scale")
        return self.leaves["query"].shape[-1] ** -0.5 if given is None else given


def sees_hit(hits: dict[str, Tensor], query: str, key: str, value: str | None, seen: Tensor) -> Tensor:
    """[B, H, N_q, D_v or 1]: rows whose query or a seen key is hit, and the channels of hit values."""
    bad_key = hits[key].any(-1).double().unsqueeze(-1)
    bad_row = (seen.double() @ bad_key > 0) | (hits[query].any(-1, keepdim=True) & seen.any(-1, keepdim=True))
    return bad_row if value is None else bad_row | (seen.double() @ hits[value].double() > 0)


def rows_of(more: dict[str, Any], x: Tensor) -> Any:
    given = more.get("batch_index")
    return slice(None) if given is None else given.long()
