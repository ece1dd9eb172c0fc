"""Q-Align: keys and values of the reference, re-aligned by query-query similarity before they are attended."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qalign_kernels import qalign_attention

from ..site import Site, take
from ._editing import Card
from .cross_image import CrossImage


@dataclass(frozen=True, kw_only=True)
class QAlign(CrossImage):
    """Appearance transfer by Q-Align: Cross-Image attention with its keys and values rearranged to follow the output's queries.

    The paper's method section is not available to this project: it builds on Cross-Image attention, so contrast, structure steps and
    layers are kept from there (each can be switched off), and similarity, heads and refinement are inferred (each can be chosen).
    At a structure step the alignment, too, is with the structure. The paper's own reading of the refinement is "rearranged"; the default,
    "topk", attends each query's eight best-aligned tokens, because on the embedded model it leaks least (CHANGELOG, benchmarks/results).

    Args:
        similarity, heads, refinement, topk, strength: as `qalign_kernels.qalign_attention`; a layer of fewer tokens takes a smaller k.
        contrast, structure_every, structure_until: as `CrossImage`.

    Source: Q-Align, arXiv 2508.21090.
    """

    card: ClassVar[Card] = Card(
        "Q-Align",
        "2508.21090",
        "K, V <- appearance, aligned by queries",
        "last two decoder blocks",
        "12 to 68 of 68",
        "similarity_topk, topk attention",
        0.5,
    )

    similarity: str = "cosine"
    heads: str = "joint"
    refinement: str = "topk"
    topk: int = 8
    strength: float = 20.0

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        return qalign_attention(
            take(q, output),
            q,
            k,
            v,
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
