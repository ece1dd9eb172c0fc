"""One call of one attention layer: the place where a method acts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qalign_kernels import Segment

from .clock import Clock
from .layout import BatchLayout
from .regions import CENTRE, EVERYTHING, Regions

HIDDEN_BIAS = -1e3  # an additive mask hides a key below this; diffusers writes -1e4


class ForwardPass:
    """One call of the denoiser, and what a method keeps in it for later layers of the same call.

    Attributes:
        size: (height, width) of the latents.
        kept: tensors by names that the method chooses. It is empty when a call begins.
    """

    def __init__(self) -> None:
        self.size = (0, 0)
        self.kept: dict[str, Tensor] = {}

    def begin(self, height: int, width: int) -> None:
        self.size = (height, width)
        self.kept.clear()


class Owner(Protocol):
    """What called the method: a processor or a hook, installed on a layer."""

    layer: str
    forward: ForwardPass | None


@dataclass(frozen=True, eq=False)
class Site:
    """What a method knows besides queries, keys and values [B, H, N, D]: rows, labels, scale and step.

    >>> import torch
    >>> from qalign import BatchLayout, Site
    >>> site = Site(BatchLayout("output", "appearance", "structure"))
    >>> q = torch.zeros(6, 2, 16, 8)  # two guidance halves of three rows
    >>> site.output_rows(q).tolist(), site.reference_rows(q).tolist()
    ([0, 3], [1, 4])

    Methods mostly use `reference` and `own` (segments of keys and values), `query_labels`, `stock` and
    `scale`. Labels are bit sets, int32 [rows or 1, N]: a query sees a key if their sets share a bit.

    Args:
        layout: the roles of the batch's rows.
        scale: the factor of the dot product. None is 1/sqrt(D).
        mask: additive or boolean [B, 1 or H, 1 or N_q, N_k], or None.
        clock: the denoising step, or None outside of a loop.
        owner: the processor or hook that called the method. A method that reads `layer` is compiled once for
            each layer.
        regions: the labels of the pictures' tokens, or None.
    """

    layout: BatchLayout
    scale: float | None = None
    mask: Tensor | None = None
    clock: Clock | None = None
    owner: Owner | None = None
    regions: Regions | None = None

    @property
    def idle(self) -> bool:
        """Whether the method edits nothing in this step.

        In a compiled layer it is always False: the step is not known there, and `merge` selects the rows by
        `clock.active`.
        """
        if self.clock is None or not self.clock.gated or torch.compiler.is_compiling():
            return False
        if self.clock.step is None:
            running = "a pipeline call with the scheduler it had when attached, or control.track(timesteps)"
            raise RuntimeError(f"steps: expected a running clock ({running}), got a call outside of one")
        return self.clock.idle

    @property
    def layer(self) -> str:
        """The name of the layer, or an empty string."""
        return "" if self.owner is None else self.owner.layer

    @property
    def forward(self) -> ForwardPass | None:
        """The present call of the denoiser. `attach` provides it for methods that act in cross-attention."""
        return None if self.owner is None else self.owner.forward

    @property
    def step(self) -> int:
        """The denoising step; 0 without a clock."""
        return 0 if self.clock is None or self.clock.step is None else self.clock.step

    @property
    def position(self) -> Tensor:
        """The denoising step and the number of steps, int64 [2] on the CPU; 0 and 1 without a clock."""
        return torch.tensor([0, 1], device="cpu") if self.clock is None else self.clock.position

    def output_rows(self, q: Tensor) -> Tensor:
        """Return the rows that the method edits, int32."""
        return self.layout.index("output", q.shape[0], q.device)

    def reference_rows(self, q: Tensor) -> Tensor:
        """Return the row that each output row reads in this step, int32.

        It is the appearance, or the structure in a structure step.
        """
        appearance = self.layout.index("appearance", q.shape[0], q.device)
        if self.clock is None or "structure" not in self.layout.roles:
            return appearance
        return torch.where(self.clock.from_structure.to(q.device), self.structure_rows(q), appearance)

    def conditional(self, rows: Tensor, q: Tensor) -> Tensor:
        """Select those of `rows`, one for each output row, in the conditional guidance half.

        Without guidance these are all.
        """
        return rows.chunk(self.layout.parts(q.shape[0]))[-1]

    def unconditional(self, rows: Tensor, q: Tensor) -> Tensor:
        """Select the rest of `rows`. Without guidance there is none."""
        return rows[: len(rows) - len(self.conditional(rows, q))]

    def structure_rows(self, q: Tensor) -> Tensor:
        """Return the structure row of each output row, int32."""
        return self.layout.index("structure", q.shape[0], q.device)

    def companion_rows(self, q: Tensor) -> list[Tensor]:
        """Return, for each output of the layout, its row beside each output row, int32.

        Two rows are beside each other if they have the same guidance half and image.
        """
        return self.layout.companions(q.shape[0], q.device)

    def references(self, q: Tensor) -> list[Tensor]:
        """Return, for each appearance of an output, the row that each output row reads, int32."""
        return self.layout.references(q.shape[0], q.device)

    def reference(
        self,
        k: Tensor,
        v: Tensor,
        rows: Tensor,
        *,
        logit_scale: float = 1.0,
        logit_shift: float = 0.0,
        resize: str = CENTRE,
    ) -> Segment:
        """Return the keys and values of `rows`, one for each output row, with their tokens' labels.

        `resize` is that of `Regions.picture_labels`, here and in the methods below.
        """
        return Segment(
            k,
            v,
            labels=self.key_labels(k, rows, resize=resize),
            logit_scale=logit_scale,
            logit_shift=logit_shift,
            batch_index=rows,
        )

    def own(self, k: Tensor, v: Tensor, rows: Tensor, labels: Tensor | None = None) -> Segment:
        """Return the keys and values of `rows` with `labels` [1, N]. None lets every query see them."""
        return Segment(k, v, labels=self._visible(rows, labels), batch_index=rows)

    def query_labels(self, q: Tensor, *, resize: str = CENTRE) -> Tensor | None:
        """Return the labels [1, N] of the output rows' queries, or None if nothing is hidden from them."""
        regions, tokens = self.regions, q.shape[2]
        if regions is not None:
            return self._by_step(
                lambda picture: regions.query_labels(picture, tokens, tokens, q.device, resize=resize)
            )
        return self.open_labels(q)

    def open_labels(self, q: Tensor) -> Tensor | None:
        """Return labels [1, N] of queries that see every key with any bit, or None if nothing is hidden."""
        hides = self.mask is not None or self.regions is not None
        return q.new_full((1, q.shape[2]), EVERYTHING, dtype=torch.int32) if hides else None

    def subject_labels(
        self, k: Tensor, rows: Tensor, picture: str, number: int, count: int, *, resize: str = CENTRE
    ) -> Tensor | None:
        """Return labels of the keys of `rows`, the `number`-th of `count` pictures, that show its subject.

        A token whose region is 0 has no bits. The result is None if nothing hides a token.
        """
        regions = self.regions
        if regions is None:
            return self._visible(rows, None)
        labels = regions.subject_labels(picture, number, count, k.shape[2], k.device, resize=resize)
        return self._visible(rows, labels)

    def object_labels(self, x: Tensor, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the labels of the output's tokens and of the tokens of `rows`, the appearance.

        A token of no object has no bits. Both are None if nothing hides a token.
        """
        if self.regions is None:
            return self.open_labels(x), self._visible(rows, None)
        find, tokens = self.regions.object_labels, x.shape[2]
        keys = find("appearance", tokens, x.device)
        return find("structure", tokens, x.device), self._visible(rows, keys)

    def key_labels(self, k: Tensor, rows: Tensor, *, resize: str = CENTRE) -> Tensor | None:
        """Return the labels [len(rows) or 1, N] of the reference's keys. A masked token has no bits."""
        regions = self.regions
        if regions is None:
            return self._visible(rows, None)
        labels = self._by_step(
            lambda picture: regions.picture_labels(picture, k.shape[2], k.device, resize=resize)
        )
        return self._visible(rows, labels)

    def own_labels(self, rows: Tensor) -> Tensor | None:
        """Return labels [len(rows), N] that hide the masked tokens of `rows`, or None without a mask."""
        return self._visible(rows, None)

    def _visible(self, rows: Tensor, labels: Tensor | None) -> Tensor | None:
        """`labels` without the tokens of `rows` that the attention mask hides."""
        if self.mask is None:
            return labels
        if self.mask.shape[1] != 1 or self.mask.shape[2] != 1:
            expected = "a key mask [B, 1, N] on an edited layer"
            got = f"{list(self.mask.shape)} after preparation"
            raise ValueError(f"attention_mask: expected {expected}, got {got}")
        mask = self.mask.index_select(0, rows)[:, 0, 0]
        visible = mask if mask.dtype == torch.bool else mask > HIDDEN_BIAS
        return torch.where(visible, EVERYTHING if labels is None else labels, 0).int()

    def _by_step(self, labels: Callable[[str], Tensor]) -> Tensor:
        """The labels of the appearance, or of the structure in a structure step."""
        if self.clock is None or "structure" not in self.layout.roles:
            return labels("appearance")
        structure = labels("structure")
        return torch.where(self.clock.from_structure.to(structure.device), structure, labels("appearance"))

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the stock attention output of every row."""
        return self._stock(q, k, v, self.mask)

    def merge(self, q: Tensor, k: Tensor, v: Tensor, edited: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
        """Return `edited` [rows, H, N, D] in the output rows and stock attention in the others.

        `edited` may be a function of the result with the other rows filled in.
        """
        output = self._long_index("output", q)
        if self._selects_in_the_graph:
            plain = self.plain(q, k, v)
            edited = edited(plain) if callable(edited) else edited
            return self._where_active(plain, output, edited)
        merged, others = torch.empty_like(q), self._long_index("other", q)
        if others.numel():
            merged.index_copy_(0, others, self.stock(q, k, v, others))
        return merged.index_copy_(0, output, edited(merged) if callable(edited) else edited)

    def stock(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        """Return the stock attention output of `rows` alone."""
        mask = None if self.mask is None else self.mask.index_select(0, rows)
        return self._stock(take(q, rows), take(k, rows), take(v, rows), mask)

    def replace(self, hidden: Tensor, edited: Tensor) -> Tensor:
        """Return features [B, ...] with `edited` [rows, ...] in the output rows, in steps that edit."""
        output = self._long_index("output", hidden)
        if self._selects_in_the_graph:
            return self._where_active(hidden, output, edited)
        return hidden.index_copy(0, output, edited)

    @property
    def _selects_in_the_graph(self) -> bool:
        """Whether a compiled layer computes both results and selects one by the step."""
        return self.clock is not None and self.clock.gated and torch.compiler.is_compiling()

    def _where_active(self, plain: Tensor, output: Tensor, edited: Tensor) -> Tensor:
        assert self.clock is not None
        active = self.clock.active.to(plain.device)
        return plain.index_copy(0, output, torch.where(active, edited, plain.index_select(0, output)))

    def _long_index(self, role: str, q: Tensor) -> Tensor:
        return self.layout.index(role, q.shape[0], q.device, torch.int64)

    def _stock(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=self.scale
        )


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Select rows of [B, H, N, D], such as the queries of `site.output_rows(q)`.

    >>> import torch
    >>> from qalign import take
    >>> take(torch.zeros(3, 2, 16, 8), torch.tensor([0, 2])).shape
    torch.Size([2, 2, 16, 8])

    Tokens stay outside heads in memory, as projections leave them, so that stock attention sums in the same
    order.
    """
    return x.transpose(1, 2).index_select(0, rows).transpose(1, 2)
