"""Q-Align: keys and values of the reference, re-aligned by query-query similarity before they are attended."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qalign_kernels import Match, qalign_attention, similarity_argmax
from qalign_kernels.rearrange import take_rows

from ..context.layer_call import Site, take
from ._editing import Card
from .cross_image import CrossImage

ALIGNED = ("both", "output", "structure")


@dataclass(frozen=True, kw_only=True)
class QAlign(CrossImage):
    """Appearance transfer by Q-Align: Cross-Image attention with its keys and values rearranged to follow the output's queries.

    S = similarity(Q_align, Q_app), π(i) = argmax_j S_ij; what is read by π is the refinement's, see `qalign_kernels.qalign_attention`. The
    default, "warped_output", gives each query what the appearance's own attention made of its match, softmax(s Q_app[π] K_appᵀ) V_app; that row
    is computed in any case, so the layer costs the alignment and a gather.

    The paper's method section is not available to this project: it builds on Cross-Image attention, so contrast, structure steps and
    layers are kept from there (each can be switched off), and similarity, heads and refinement are inferred (each can be chosen).
    At a structure step the alignment, too, is with the structure. As far as the paper is known, it aligns Q_out ("output"), which starts as
    Q_str, and refines by attention over rearranged keys and values ("rearranged"). The defaults make the best pictures of the embedded model, by
    part colours and by layout; attention that leaks least is that of "topk" and "none" (CHANGELOG, benchmarks/results).

    Args:
        aligned: whose queries are aligned with the appearance's: "output"; "structure"; or "both", by the sum of the two similarities. Without a
            structure row it is the output.
        similarity, heads, refinement, topk, strength: as `qalign_kernels.qalign_attention`; a layer of fewer tokens takes a smaller k.
        contrast: as `CrossImage`, for the refinements that have a softmax of their own: all but "none" and "warped_output".
        structure_every, structure_until: as `CrossImage`.

    Source: Q-Align, arXiv 2508.21090.
    """

    card: ClassVar[Card] = Card(
        "Q-Align",
        "2508.21090",
        "what appearance made of the token aligned by queries",
        "last two decoder blocks",
        "12 to 68 of 68",
        "similarity_argmax, gather",
        0.5,
    )

    aligned: str = "both"
    similarity: str = "cosine"
    heads: str = "joint"
    refinement: str = "warped_output"
    topk: int = 8
    strength: float = 20.0

    def __post_init__(self) -> None:
        if self.aligned not in ALIGNED:
            raise ValueError(f"aligned: expected one of {', '.join(ALIGNED)}, got {self.aligned!r}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        shared = (
            self.refinement == "warped_output"
            and site.regions is None
            and site.mask is None
            and not site.layout.unread
        )
        if not shared or site.idle:
            return super().attend(q, k, v, site)
        output, reference = site.output_rows(q), site.reference_rows(q)
        index = self.match(q, output, reference, site).index
        return site.merge(q, k, v, lambda attended: take_rows(take(attended, reference), index))

    def match(self, q: Tensor, output: Tensor, reference: Tensor, site: Site) -> Match:
        """π of the rows `output` in the rows `reference`: index [rows, 1 or H, N], and how alike they are."""
        return similarity_argmax(
            self.asking(q, output, site),
            q,
            similarity=self.similarity,
            heads=self.heads,
            query_labels=site.query_labels(q),
            reference_labels=site.key_labels(q, reference),
            batch_index=reference,
        )

    def asking(self, q: Tensor, output: Tensor, site: Site) -> Tensor:
        """Q_align [rows, H, N, D]: its similarity with any query is the mean of those of the queries that are aligned."""
        own = take(q, output)
        if self.aligned == "output" or "structure" not in site.layout.roles:
            return own
        structure = take(q, site.structure_rows(q))
        if self.aligned == "structure":
            return structure
        return torch.lerp(self._compared(own), self._compared(structure), 0.5).to(q.dtype)

    def _compared(self, q: Tensor) -> Tensor:
        """In float32, what the similarity makes of a token: the direction over all channels, or of each head; or the query itself."""
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
            match_query=self.asking(q, output, site),
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
