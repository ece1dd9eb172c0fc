"""SeAl: each query takes the appearance of its most similar keys, if they are similar enough."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qalign_kernels import Segment, attention, rearrange_kv, similarity_topk
from qalign_kernels.qalign_attention import topk_attention

from ..context.layer_call import Site, take
from ._editing import Card, Editing

BLENDS = ("average", "add", "extrapolate", "keys_values")


@dataclass(frozen=True, kw_only=True)
class SeAl(Editing):
    """Blend the appearance into self-attention where a query resembles one of its keys.

    sim_i = max_j cos(q_i, k_app,j),  M_i = [sim_i > τ],  w_i = δ M_i.
    A_app,i is softmax attention over the k most similar appearance keys of query i; for k = 1 it is the value
    of the best key. A_base is the output's own self-attention. The output rows of mid and up blocks become,
    by `blend`:

        "average": (A_base + w A_app) / (1 + w)
        "add": A_base + w A_app
        "extrapolate": A_base + w (A_app - A_base)
        "keys_values": attention to (K_out + w K_app[π]) / (1 + w) and values alike, π the best keys

    >>> import torch
    >>> from qalign import BatchLayout, SeAl, Site
    >>> q, k, v = torch.randn(3, 3, 2, 16, 8)  # three rows, two heads, 16 tokens, eight channels
    >>> site = Site(BatchLayout("output", "appearance", "structure"))
    >>> SeAl().attend(q, k, v, site).shape
    torch.Size([3, 2, 16, 8])

    Args:
        threshold: τ, from the first step to the last. A change needs a clock: `attach` on a pipeline, or
            `control.track`.
        strength: δ, from the first step to the last.
        topk: k.
        heads: "joint" for one similarity of all heads, "per_head" for one of each.
        blend: one of the formulas above.

    Raises:
        ValueError: `blend` is none of these.

    Notes:
        Only the project page and a summary of the paper are available. They state τ = 0.15, k = 1 and δ = 3.
        They do not state the blend, the schedules, the timesteps, or whether heads are merged: these defaults
        are inferred.
        The appearance row runs along here. Its cache of a pass without noise is
        `AppearanceTransferPipeline.noise_free` or `FeatureBank.record_clean`. Delta-Bridge is
        `qalign.sampling.guidance.delta_bridge`, and AnchorAlign is
        `qalign.sampling.anchor_align.anchor_align`. The segmentation model that finds AnchorAlign's boxes is
        not here.

    Source: SeAl (CVPR 2026).
    """

    card: ClassVar[Card] = Card(
        "SeAl",
        "CVPR 2026",
        "own attention blended with the values of the best-matching appearance tokens",
        "mid and up blocks",
        "all",
        "similarity_topk, topk attention",
        1.5,
    )
    reads_labels: ClassVar[tuple[str, ...]] = ("appearance", "structure")

    threshold: tuple[float, float] = (0.15, 0.15)
    strength: tuple[float, float] = (3.0, 3.0)
    topk: int = 1
    heads: str = "joint"
    blend: str = "average"

    def __post_init__(self) -> None:
        if self.blend not in BLENDS:
            raise ValueError(f"blend: expected one of {', '.join(BLENDS)}, got {self.blend!r}")

    def default_layers(self, names: Sequence[str]) -> list[str]:
        """Select all self-attention layers of the mid and up blocks."""
        return [name for name in names if not name.startswith("down_blocks.")]

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        query, query_labels, labels = take(q, output), site.query_labels(q), site.key_labels(k, reference)
        match = similarity_topk(
            query,
            k,
            min(self.topk, k.shape[2]),
            heads=self.heads,
            query_labels=query_labels,
            reference_labels=labels,
            batch_index=reference,
        )
        gate = match.score[..., :1] > self._now(self.threshold, site, q)
        weight = torch.where(gate, self._now(self.strength, site, q), 0.0).to(q.dtype)
        if self.blend == "keys_values":
            matched = rearrange_kv(take(k, reference), take(v, reference), match.index[..., 0])
            key, value = (
                (take(own, output) + weight * other) / (1 + weight) for own, other in zip((k, v), matched)
            )
            segment = Segment(key, value, labels=site.own_labels(output))
            return attention(query, segment, scale=site.scale, query_labels=site.open_labels(q))
        base = site.stock(q, k, v, output)
        infused = topk_attention(query, k, v, match.index, scale=site.scale, batch_index=reference)
        if self.blend == "extrapolate":
            return base + weight * (infused - base)
        total = base + weight * infused
        return total if self.blend == "add" else total / (1 + weight)

    def _now(self, ends: tuple[float, float], site: Site, q: Tensor) -> Tensor:
        """The value of this step between the two ends, or the first end without a clock."""
        progress = (
            torch.zeros((), device=q.device) if site.clock is None else site.clock.progress.to(q.device)
        )
        return ends[0] + (ends[1] - ends[0]) * progress
