"""Q-Align: query-query similarity rearranges the reference's keys and values, and attention reads them."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from qalign_kernels import Match, qalign_attention, similarity_argmax
from qalign_kernels.rearrange import take_rows

from ..context.layer_call import Site, take
from ._editing import Card
from ._names import ALIGNED
from .cross_image import CrossImage


@dataclass(frozen=True, kw_only=True)
class QAlign(CrossImage):
    """Transfer appearance by Q-Align, as the paper states it.

    S = similarity(Q_align, Q_app),  π(i) = argmax_j S_ij,
    output rows: contrasted softmax(s Q_out K_app[π]ᵀ) V_app[π]. All other rows are stock attention.

    The paper has three steps, and the defaults are these steps: the output's queries are aligned with the
    appearance's queries, the alignment rearranges keys and values, and attention reads the rearranged keys
    and values. One call of `qalign_kernels.qalign_attention` computes all three.

    The paper's method section is not available to this project. It builds on Cross-Image attention, so the
    layers, the contrast and the structure steps are Cross-Image's. Cosine similarity over all heads is
    inferred. At a structure step the method aligns with the structure and reads it. `QAlignWarp` is this
    library's own variant.

    >>> import torch
    >>> from qalign import BatchLayout, QAlign, Site
    >>> q, k, v = torch.randn(3, 3, 2, 16, 8)  # three rows, two heads, 16 tokens, eight channels
    >>> site = Site(BatchLayout("output", "appearance", "structure"))
    >>> QAlign().attend(q, k, v, site).shape
    torch.Size([3, 2, 16, 8])

    Args:
        aligned: which queries Q_align are: "output", "structure", or "both" for the mean of the two
            similarities. A layout without a structure row aligns the output's.
        similarity: "cosine" or "dot".
        heads: "joint" for one alignment of all heads, "per_head" for one of each.
        refinement: how attention uses the alignment. `qalign_kernels.qalign_attention` lists the readings.
        topk: the number of reference tokens for each query in "topk". A layer with fewer tokens takes all.
        strength: the weight of the alignment in "guided" and "soft".
        contrast: as `CrossImage`. The refinements "none" and "warped_output" do not use it.
        structure_every, structure_until: as `CrossImage`.

    Raises:
        ValueError: `aligned` is none of these.

    Source: Q-Align, arXiv 2508.21090.
    """

    card: ClassVar[Card] = Card(
        "Q-Align",
        "2508.21090",
        "keys and values of the appearance, rearranged by query alignment; contrast",
        "last two decoder blocks",
        "12 to 68 of 68",
        "similarity_argmax, attention (counts, contrast)",
        2.0,
    )

    aligned: str = "output"
    similarity: str = "cosine"
    heads: str = "joint"
    refinement: str = "rearranged"
    topk: int = 8
    strength: float = 20.0

    def __post_init__(self) -> None:
        if self.aligned not in ALIGNED:
            raise ValueError(f"aligned: expected one of {', '.join(ALIGNED)}, got {self.aligned!r}")

    def match(self, q: Tensor, output: Tensor, reference: Tensor, site: Site) -> Match:
        """Return π of the rows `output` in the rows `reference`, and the similarities.

        Both are [rows, 1 or H, N].
        """
        return similarity_argmax(
            self.alignment_query(q, output, site),
            q,
            similarity=self.similarity,
            heads=self.heads,
            query_labels=site.query_labels(q),
            reference_labels=site.key_labels(q, reference),
            batch_index=reference,
        )

    def alignment_query(self, q: Tensor, output: Tensor, site: Site) -> Tensor:
        """Return Q_align [rows, H, N, D].

        With "both", its similarity to any query is the mean of the output's and the structure's.
        """
        own = take(q, output)
        if self.aligned == "output" or "structure" not in site.layout.roles:
            return own
        structure = take(q, site.structure_rows(q))
        if self.aligned == "structure":
            return structure
        return torch.lerp(self._compared(own), self._compared(structure), 0.5).to(q.dtype)

    def _compared(self, q: Tensor) -> Tensor:
        """The queries in float32, divided by their norm for "cosine".

        The norm is over all channels for one alignment of all heads, and over each head's otherwise.
        """
        wide = q.to(torch.promote_types(q.dtype, torch.float32))
        if self.similarity == "dot":
            return wide
        dims = (1, 3) if self.heads == "joint" and self.refinement not in ("guided", "soft") else (3,)
        return wide / torch.linalg.vector_norm(wide, dim=dims, keepdim=True).clamp(min=1e-12)

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        return qalign_attention(
            take(q, output),
            q,
            k,
            v,
            match_query=self.alignment_query(q, output, site),
            similarity=self.similarity,
            heads=self.heads,
            refinement=self.refinement,
            own_key=take(k, output) if self.refinement == "warped_values" else None,
            topk=min(self.topk, k.shape[2]),
            strength=self.strength,
            scale=site.scale,
            contrast=self.contrast,
            query_labels=site.query_labels(q),
            ref_labels=site.key_labels(k, reference),
            batch_index=reference,
        )


@dataclass(frozen=True, kw_only=True)
class QAlignWarp(QAlign):
    """Transfer appearance by Q-Align's alignment and the appearance's own attention: our variant.

    S = (similarity(Q_out, Q_app) + similarity(Q_str, Q_app)) / 2,  π(i) = argmax_j S_ij,
    output rows: O_app[π] with O_app = softmax(s Q_app K_appᵀ) V_app. All other rows are stock attention.

    The paper's part is the alignment of queries with the appearance's queries. Two things are ours: the
    structure's queries take part in the alignment, and a query gets what the appearance's own attention gave
    to the matched token, where the paper attends rearranged keys and values. The appearance row computes
    O_app in any case, so a layer costs the alignment and a gather.

    >>> import torch
    >>> from qalign import BatchLayout, QAlignWarp, Site
    >>> q, k, v = torch.randn(3, 3, 2, 16, 8)
    >>> site = Site(BatchLayout("output", "appearance", "structure"))
    >>> QAlignWarp().attend(q, k, v, site).shape
    torch.Size([3, 2, 16, 8])

    Args:
        aligned, similarity, heads: as `QAlign`; `aligned` is "both" by default.
        structure_every, structure_until: as `CrossImage`.

    The refinement is always "warped_output". It has no attention map of its own, so there is no contrast.

    Source: this library, after Q-Align, arXiv 2508.21090.
    """

    card: ClassVar[Card] = Card(
        "QAlignWarp",
        "this library",
        "the appearance's own attention output at the token aligned by queries",
        "last two decoder blocks",
        "12 to 68 of 68",
        "similarity_argmax, gather",
        0.5,
    )

    aligned: str = "both"
    refinement: str = field(default="warped_output", init=False)
    topk: int = field(default=8, init=False, repr=False)
    strength: float = field(default=20.0, init=False, repr=False)
    contrast: float = field(default=1.0, init=False, repr=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Return the attention output of every row; output rows gather from that of the appearance row.

        The appearance row cannot be shared if labels or a mask restrict what the output reads, or if a bank
        holds the reference. Then `edit` computes its attention output.
        """
        restricted = site.regions is not None or site.mask is not None or site.layout.unread
        if restricted or site.idle:
            return super().attend(q, k, v, site)
        output, reference = site.output_rows(q), site.reference_rows(q)
        index = self.match(q, output, reference, site).index
        return site.merge(q, k, v, lambda attended: take_rows(take(attended, reference), index))
