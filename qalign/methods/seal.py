"""SeAl: appearance infused where a query finds it, from each query's best keys alone."""

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
    """Gated infusion of the appearance into self-attention.

    sim_i = max_j cos(q_i, k_app,j), M_i = [sim_i > τ], w_i = δ M_i; A_app,i = softmax attention over the top k appearance keys of query i
    (k = 1: v_app of the best), A_base = the output's own self-attention; the output rows of mid and up blocks become, by `blend`,

        "average": (A_base + w A_app) / (1 + w)          "add": A_base + w A_app
        "extrapolate": A_base + w (A_app - A_base)       "keys_values": attention to (K_out + w K_app[π]) / (1 + w), values alike, π the best keys

    Args:
        threshold: τ, from the first step to the last. strength: δ, likewise. Steps need a clock: `attach` on a pipeline, or `control.track`.
        topk: k.
        heads: "joint", one similarity for all heads, or "per_head".
        blend: as above.

    Source: SeAl (CVPR 2026), of which only the project page and a summary were available: the blend, the schedules, the timesteps and whether heads
    are merged are not published there. τ = 0.15, k = 1 and δ = 3 are; the other defaults are inferred, and all can be chosen.
    Here the appearance row runs along; its cache of a noise-free pass is `AppearanceTransferPipeline.noise_free` or `FeatureBank.record_clean`,
    Delta-Bridge is `qalign.sampling.guidance.delta_bridge`, AnchorAlign `qalign.sampling.anchor_align.anchor_align`.
    Not here: the segmentation model that finds AnchorAlign's boxes.
    """

    card: ClassVar[Card] = Card(
        "SeAl",
        "CVPR 2026",
        "own attention blended with best appearance values",
        "mid and up blocks",
        "all",
        "similarity_topk, topk attention",
        1.5,
    )

    threshold: tuple[float, float] = (0.15, 0.15)
    strength: tuple[float, float] = (3.0, 3.0)
    topk: int = 1
    heads: str = "joint"
    blend: str = "average"

    def __post_init__(self) -> None:
        if self.blend not in BLENDS:
            raise ValueError(f"blend: expected one of {', '.join(BLENDS)}, got {self.blend!r}")

    def default_layers(self, names: Sequence[str]) -> list[str]:
        """All of the mid and up blocks."""
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
            found = rearrange_kv(take(k, reference), take(v, reference), match.index[..., 0])
            key, value = (
                (take(own, output) + weight * other) / (1 + weight) for own, other in zip((k, v), found)
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
        """The value between the ends that this step has; the first where nobody counts steps."""
        progress = (
            torch.zeros((), device=q.device) if site.clock is None else site.clock.progress.to(q.device)
        )
        return ends[0] + (ends[1] - ends[0]) * progress
