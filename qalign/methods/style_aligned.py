"""StyleAligned: all pictures of a batch share the style of the reference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from qalign_kernels import Segment, attention

from ..context.adain import token_adain
from ..context.layer_call import Site, take
from ._editing import Card, Editing, Hook


@dataclass(frozen=True, kw_only=True)
class StyleAligned(Editing):
    """Align the style of all outputs by shared self-attention; the reference is the appearance row.

    output rows: softmax([s Q̂ K̂_outᵀ, a s Q̂ K_refᵀ + b]) [V_out; V_ref]. Q̂ and K̂_out have the mean and
    the standard deviation that each channel has over the reference's tokens. By default in every
    self-attention layer. The reference's row is stock, because its shared keys are its own keys twice.

    Group norms are shared too: every group norm of the UNet takes an output row's mean and variance over the
    tokens of the output and of its reference together.

    >>> import torch
    >>> from qalign import BatchLayout, Site, StyleAligned
    >>> q, k, v = torch.randn(3, 3, 2, 16, 8)  # three rows, two heads, 16 tokens, eight channels
    >>> site = Site(BatchLayout("output", "appearance", "structure"))
    >>> StyleAligned().attend(q, k, v, site).shape
    torch.Size([3, 2, 16, 8])

    Args:
        share_attention: whether the reference's keys and values are attended. False leaves the statistics:
            each output attends its own tokens. `full_attention_share` does not read it.
        adain_queries, adain_keys, adain_values: whether these take the reference's statistics.
        shared_score_scale: a.
        shared_score_shift: b, as if the reference's keys were there e^b times. For an inverted real picture
            the authors take b = ln 2, and for a famous picture a = 0.5.
        full_attention_share: every output attends all outputs, and the appearance if the layout has one,
            without statistics, a and b. In the published form the reference attends the others too: give
            every row the role "output".
        share_group_norm: whether group norms are shared, independent of `attach(layers=...)` and `level`.
            None is the published choice: yes on Stable Diffusion, no on SDXL. On SDXL the authors share them
            only for a real picture, as `real()` does.
        level: 0 shares in all layers, 1 in none, where group norms alone are shared. In between,
            ⌊level · L⌋ evenly spaced layers of L are not shared; above one half, ⌊(1 - level) · L⌋ evenly
            spaced layers are shared.

    Raises:
        ValueError: `level` is no fraction.

    Notes:
        The published code shares layer norms too. This changes nothing, because their statistics are of one
        token. Latents of an inverted reference, which replace its row after every step, are not here.

    Source: StyleAligned, arXiv 2312.02133.
    """

    card: ClassVar[Card] = Card(
        "StyleAligned",
        "2312.02133",
        "own and reference keys in one softmax; reference statistics for queries and keys",
        "all",
        "all",
        "token_adain, attention (segments)",
        2.0,
    )
    reads_labels: ClassVar[tuple[str, ...]] = ("appearance", "structure")

    share_attention: bool = True
    adain_queries: bool = True
    adain_keys: bool = True
    adain_values: bool = False
    shared_score_scale: float = 1.0
    shared_score_shift: float = 0.0
    full_attention_share: bool = False
    share_group_norm: bool | None = None
    level: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 1:
            raise ValueError(f"level: expected a fraction of 0 to 1, got {self.level!r}")

    @classmethod
    def real(cls) -> "StyleAligned":
        """Make the settings for an inverted photograph: b = ln 2 and shared group norms."""
        return cls(shared_score_shift=math.log(2), share_group_norm=True)

    def hooks(self, model: nn.Module) -> dict[str, Hook]:
        shared = not _is_sdxl(model) if self.share_group_norm is None else self.share_group_norm
        return {
            name: _share_norm
            for name, module in model.named_modules()
            if shared and isinstance(module, nn.GroupNorm)
        }

    @property
    def may_edit_no_layer(self) -> bool:
        return self.level > 0.5

    def default_layers(self, names: Sequence[str]) -> list[str]:
        """Select all layers except those that `level` leaves out."""
        few = math.floor((1 - self.level if self.level > 0.5 else self.level) * len(names))
        marked = {name for place, name in enumerate(names) if few and place % (len(names) // few) == 0}
        return [name for name in names if (name in marked) == (self.level > 0.5)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if not self.full_attention_share or site.idle:
            return super().attend(q, k, v, site)
        segments = [site.own(k, v, rows) for rows in site.companion_rows(q)]
        if "appearance" in site.layout.roles:
            segments.append(site.reference(k, v, site.reference_rows(q)))
        query = take(q, site.output_rows(q))
        return site.merge(
            q, k, v, attention(query, segments, scale=site.scale, query_labels=site.query_labels(q))
        )

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        query, key, value = (
            token_adain(take(x, output), take(x, reference)) if wanted else take(x, output)
            for x, wanted in ((q, self.adain_queries), (k, self.adain_keys), (v, self.adain_values))
        )
        own = Segment(key, value, labels=site.own_labels(output))
        if not self.share_attention:
            return attention(query, own, scale=site.scale, query_labels=site.open_labels(q))
        shared = site.reference(
            k, v, reference, logit_scale=self.shared_score_scale, logit_shift=self.shared_score_shift
        )
        return attention(query, [own, shared], scale=site.scale, query_labels=site.query_labels(q))


def _share_norm(norm: nn.Module, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """The group norm of x [B, C, h, w] or [B, C, N], with shared statistics in the output rows.

    y is the stock group norm. The shared statistics are of output and reference together.
    """
    reference = site.reference_rows(x) if "appearance" in site.layout.roles else site.companion_rows(x)[0]
    both = torch.cat([x.index_select(0, rows) for rows in (site.output_rows(x), reference)], dim=2)
    return site.replace(y, norm.forward(both)[:, :, : x.shape[2]])


def _is_sdxl(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "addition_embed_type", None) == "text_time"
