"""The place where a method acts: one attention layer in one forward pass."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qalign_kernels import Segment

from .clock import Clock
from .layout import BatchLayout
from .regions import EVERYTHING, Regions

HIDDEN_BIAS = -1e3  # an additive mask hides a key below this; diffusers writes -1e4


class ForwardPass:
    """One call of the denoiser: what is known of it, and what a method keeps for its later layers.

    Attributes:
        size: (height, width) of the latents.
        kept: tensors by names of the method's choice; nothing when a call begins.
    """

    def __init__(self) -> None:
        self.size = (0, 0)
        self.kept: dict[str, Tensor] = {}

    def begin(self, height: int, width: int) -> None:
        self.size = (height, width)
        self.kept.clear()


@dataclass(frozen=True, eq=False)
class Site:
    """What a method knows besides queries, keys and values [B, H, N, D]: rows, labels, scale and step.

    >>> import torch
    >>> from qalign import BatchLayout, Site
    >>> site = Site(BatchLayout("output", "appearance", "structure"))
    >>> q = torch.zeros(6, 2, 16, 8)  # two guidance parts of three rows
    >>> site.output_rows(q).tolist(), site.reference_rows(q).tolist()
    ([0, 3], [1, 4])

    Methods mostly use `reference` and `own` (segments of keys and values), `query_labels`, `stock` and
    `scale`.

    Attributes:
        layout: the roles of the batch's rows.
        scale: of the dot product; None is 1/sqrt(D).
        mask: additive or boolean [B, 1 or H, 1 or N_q, N_k], or None.
        clock: the step, or None where nobody counts steps.
        owner: whatever installed the processor; `owner.layer` is the name of the layer. A method that reads it is compiled once per layer.
        regions: the labels of the pictures' tokens, or None.
    """

    layout: BatchLayout
    scale: float | None = None
    mask: Tensor | None = None
    clock: Clock | None = None
    owner: object = None
    regions: Regions | None = None

    @property
    def idle(self) -> bool:
        """Whether the step is known, on the host, to need no edit. A compiled processor does not ask: it selects by `clock.active`."""
        if self.clock is None or not self.clock.gated or torch.compiler.is_compiling():
            return False
        if self.clock.step is None:
            running = "a pipeline call with the scheduler it had when attached, or control.track(timesteps)"
            raise RuntimeError(f"steps: expected a running clock ({running}), got a call outside of one")
        return self.clock.idle

    @property
    def layer(self) -> str:
        """The name of the layer; empty where nobody gave it one."""
        return getattr(self.owner, "layer", "")

    @property
    def forward(self) -> ForwardPass | None:
        """The present call of the denoiser; None where nobody follows it: `attach` does for methods that act in cross-attention."""
        return getattr(self.owner, "forward", None)

    @property
    def step(self) -> int:
        """The step of the denoising loop; 0 where nobody counts."""
        return 0 if self.clock is None or self.clock.step is None else self.clock.step

    def output_rows(self, q: Tensor) -> Tensor:
        """int32, the rows that the method edits."""
        return self.layout.index("output", q.shape[0], q.device)

    def reference_rows(self, q: Tensor) -> Tensor:
        """int32, the row that each output row reads in this step: its appearance, or its structure where the clock says so."""
        appearance = self.layout.index("appearance", q.shape[0], q.device)
        if self.clock is None or "structure" not in self.layout.roles:
            return appearance
        return torch.where(
            self.clock.from_structure.to(q.device),
            self.layout.index("structure", q.shape[0], q.device),
            appearance,
        )

    def conditional(self, rows: Tensor, q: Tensor) -> Tensor:
        """Those of `rows`, one for each output row, that lie in the conditional guidance part: the positive one, or the only one."""
        return rows.chunk(self.layout.parts(q.shape[0]))[-1]

    def unconditional(self, rows: Tensor, q: Tensor) -> Tensor:
        """The rest of `rows`: none where there is one guidance part."""
        return rows[: len(rows) - len(self.conditional(rows, q))]

    def structure_rows(self, q: Tensor) -> Tensor:
        """int32, the structure of each output row."""
        return self.layout.index("structure", q.shape[0], q.device)

    def companion_rows(self, q: Tensor) -> list[Tensor]:
        """int32, for each output of the layout: the row of it that each output row has in its own guidance part and image."""
        return self.layout.companions(q.shape[0], q.device)

    def references(self, q: Tensor) -> list[Tensor]:
        """int32, for each appearance that an output has, in the layout's order: the row of it that each output row reads."""
        return self.layout.references(q.shape[0], q.device)

    def reference(
        self, k: Tensor, v: Tensor, rows: Tensor, *, logit_scale: float = 1.0, logit_shift: float = 0.0
    ) -> Segment:
        """The reference's keys and values, one of `rows` for each output row, with the labels that their tokens have."""
        return Segment(
            k,
            v,
            labels=self.key_labels(k, rows),
            logit_scale=logit_scale,
            logit_shift=logit_shift,
            batch_index=rows,
        )

    def own(self, k: Tensor, v: Tensor, rows: Tensor, regions: Tensor | None = None) -> Segment:
        """The keys and values of `rows` themselves, seen by all queries or by those that meet `regions`, int32 [1, N]."""
        return Segment(k, v, labels=self._seen(rows, regions), batch_index=rows)

    def query_labels(self, q: Tensor) -> Tensor | None:
        """Bit sets int32 [1, N] of the output rows' tokens; None where everything is seen."""
        regions, tokens = self.regions, q.shape[2]
        if regions is not None:
            return self._by_step(lambda picture: regions.queries(picture, tokens, tokens, q.device))
        return self.open_labels(q)

    def open_labels(self, q: Tensor) -> Tensor | None:
        """Bit sets int32 [1, N] of queries that see every key which has any bits; None where nothing hides a key."""
        hides = self.mask is not None or self.regions is not None
        return q.new_full((1, q.shape[2]), EVERYTHING, dtype=torch.int32) if hides else None

    def subject_labels(self, k: Tensor, rows: Tensor, picture: str, number: int, count: int) -> Tensor | None:
        """As `key_labels`, of the `number`-th of `count` pictures: no bits where its label is 0; None where nothing hides a token."""
        regions = self.regions
        return self._seen(
            rows, None if regions is None else regions.subject(picture, number, count, k.shape[2], k.device)
        )

    def key_labels(self, k: Tensor, rows: Tensor) -> Tensor | None:
        """Bit sets int32 [len(rows) or 1, N] of the reference's tokens: no bits where the attention mask hides them."""
        regions = self.regions
        return self._seen(
            rows,
            None
            if regions is None
            else self._by_step(lambda picture: regions.keys(picture, k.shape[2], k.device)),
        )

    def own_labels(self, rows: Tensor) -> Tensor | None:
        """Bit sets int32 [len(rows), N] of the tokens of `rows` where their own row reads them; None where no mask hides any."""
        return self._seen(rows, None)

    def _seen(self, rows: Tensor, labels: Tensor | None) -> Tensor | None:
        """`labels` without those tokens of `rows` that the attention mask hides."""
        if self.mask is None:
            return labels
        if self.mask.shape[1] != 1 or self.mask.shape[2] != 1:
            raise ValueError(
                f"attention_mask: expected a key mask [B, 1, N] on an edited layer, got {list(self.mask.shape)} after preparation"
            )
        mask = self.mask.index_select(0, rows)[:, 0, 0]
        seen = mask if mask.dtype == torch.bool else mask > HIDDEN_BIAS
        return torch.where(seen, EVERYTHING if labels is None else labels, 0).int()

    def _by_step(self, labels: Callable[[str], Tensor]) -> Tensor:
        """Those of the appearance, or of the structure where this step reads it."""
        if self.clock is None or "structure" not in self.layout.roles:
            return labels("appearance")
        structure = labels("structure")
        return torch.where(self.clock.from_structure.to(structure.device), structure, labels("appearance"))

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stock attention of every row."""
        return self._stock(q, k, v, self.mask)

    def merge(self, q: Tensor, k: Tensor, v: Tensor, edited: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
        """`edited` [rows, H, N, D] in the output rows and stock attention in the others, of which `edited` may also be a function."""
        output = self._index("output", q)
        if self.clock is not None and self.clock.gated and torch.compiler.is_compiling():
            plain = self.plain(q, k, v)
            edited = edited(plain) if callable(edited) else edited
            edited = torch.where(self.clock.active.to(q.device), edited, plain.index_select(0, output))
            return plain.index_copy(0, output, edited)
        merged, others = torch.empty_like(q), self._index("other", q)
        if others.numel():
            merged.index_copy_(0, others, self.stock(q, k, v, others))
        return merged.index_copy_(0, output, edited(merged) if callable(edited) else edited)

    def stock(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        """Stock attention of `rows` alone."""
        mask = None if self.mask is None else self.mask.index_select(0, rows)
        return self._stock(take(q, rows), take(k, rows), take(v, rows), mask)

    def replace(self, hidden: Tensor, edited: Tensor) -> Tensor:
        """Features [B, ...] with `edited` [rows, ...] in the output rows, where the step edits at all."""
        output = self._index("output", hidden)
        if self.clock is not None and self.clock.gated and torch.compiler.is_compiling():
            edited = torch.where(self.clock.active.to(hidden.device), edited, hidden.index_select(0, output))
        return hidden.index_copy(0, output, edited)

    def _index(self, role: str, q: Tensor) -> Tensor:
        return self.layout.index(role, q.shape[0], q.device, torch.int64)

    def _stock(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=self.scale
        )


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of [B, H, N, D], such as the queries of `site.output_rows(q)`.

    >>> import torch
    >>> from qalign import take
    >>> take(torch.zeros(3, 2, 16, 8), torch.tensor([0, 2])).shape
    torch.Size([2, 2, 16, 8])

    Tokens stay outside heads in memory, as projections leave them, for stock attention to sum in the same
    order.
    """
    return x.transpose(1, 2).index_select(0, rows).transpose(1, 2)
