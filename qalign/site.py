"""The place where a method acts: one attention layer in one forward pass."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import BatchLayout
from .schedule import Clock

HIDDEN_BIAS = -1e3  # an additive mask hides a key below this; diffusers writes -1e4


@dataclass(frozen=True, eq=False)
class Site:
    """What a method knows besides queries, keys and values [B, H, N, D].

    Attributes:
        layout: the roles of the batch's rows.
        scale: of the dot product; None is 1/sqrt(D).
        mask: additive or boolean [B, 1 or H, 1 or N_q, N_k], or None.
        clock: the step, or None where nobody counts steps.
        owner: whatever installed the processor; `owner.layer` is the name of the layer. A method that reads it is compiled once per layer.
    """

    layout: BatchLayout
    scale: float | None = None
    mask: Tensor | None = None
    clock: Clock | None = None
    owner: object = None

    @property
    def idle(self) -> bool:
        """Whether the step is known, on the host, to need no edit. A compiled processor does not ask: it selects by `clock.active`."""
        if self.clock is None or not self.clock.gated or torch.compiler.is_compiling():
            return False
        if self.clock.step is None:
            running = "a pipeline call with the scheduler it had when attached, or control.track(timesteps)"
            raise RuntimeError(f"steps: expected a running clock ({running}), got a call outside of one")
        return self.clock.idle

    def output_rows(self, q: Tensor) -> Tensor:
        """int32, the rows that the method edits."""
        return self.layout.index("output", q.shape[0], q.device)

    def reference_rows(self, q: Tensor) -> Tensor:
        """int32, the row that each output row reads in this step: its appearance, or its structure where the clock says so."""
        appearance = self.layout.index("appearance", q.shape[0], q.device)
        if self.clock is None or "structure" not in self.layout.roles:
            return appearance
        return torch.where(self.clock.from_structure.to(q.device), self.layout.index("structure", q.shape[0], q.device), appearance)

    def token_labels(self, q: Tensor, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The mask's keys of `rows` as bit sets for queries [1, N_q] and keys [len(rows), N_k]: all bits, or none where hidden."""
        if self.mask is None:
            return None, None
        if self.mask.shape[1] != 1 or self.mask.shape[2] != 1:
            raise ValueError(f"attention_mask: expected a key mask [B, 1, N] on an edited layer, got {list(self.mask.shape)} after preparation")
        mask = self.mask.index_select(0, rows)[:, 0, 0]
        seen = mask if mask.dtype == torch.bool else mask > HIDDEN_BIAS
        return q.new_full((1, q.shape[2]), -1, dtype=torch.int32), -seen.int()

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stock attention of every row."""
        return self._stock(q, k, v, self.mask)

    def merge(self, q: Tensor, k: Tensor, v: Tensor, edited: Tensor) -> Tensor:
        """`edited` [rows, H, N, D] in the output rows and stock attention in the others."""
        output = self._index("output", q)
        if self.clock is not None and self.clock.gated and torch.compiler.is_compiling():
            plain = self.plain(q, k, v)
            edited = torch.where(self.clock.active.to(q.device), edited, plain.index_select(0, output))
            return plain.index_copy(0, output, edited)
        merged = torch.empty_like(q).index_copy_(0, output, edited)
        others = self._index("other", q)
        if others.numel() == 0:
            return merged
        mask = None if self.mask is None else self.mask.index_select(0, others)
        return merged.index_copy_(0, others, self._stock(take(q, others), take(k, others), take(v, others), mask))

    def _index(self, role: str, q: Tensor) -> Tensor:
        return self.layout.index(role, q.shape[0], q.device, torch.int64)

    def _stock(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=self.scale)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of [B, H, N, D] that keeps tokens outside heads in memory, as projections leave them: stock attention then sums in the same order."""
    return x.transpose(1, 2).index_select(0, rows).transpose(1, 2)
