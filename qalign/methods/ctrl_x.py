"""Ctrl-X: structure by injected queries and keys, appearance by statistics that attention transfers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from qalign_kernels import Segment, attention

from ..context.layer_call import Site, take
from ._editing import Card, Editing, Hook, Project


@dataclass(frozen=True, kw_only=True)
class CtrlX(Editing):
    """Control structure and appearance without training, in the first 0.6 of the steps.

    Appearance layers, before projection. F are the hidden states, and F^h their channels cut by head:

        norm(x) = (x - mean_tokens(x)) / std_tokens(x);  q, k = heads(W norm(F))
        P = softmax(s q_out k_appᵀ);  M = P F_app^h;  S = √max(P (F_app^h)² - M², 0)
        F_out^h <- S norm(F_out^h) + M

    In layers that are structure layers too, q_out is the structure's.

    Structure layers, after projection: queries and keys of the output are the structure's, and values are its
    own. Structure convolutions: the output of a residual block, with its skip connection, is the structure's
    in the output rows: y_out <- y_structure.

    The standard deviation is unbiased, and no eps is added to it, as published. The moments are taken about
    the mean of F_app over tokens, which changes only the rounding.

    >>> import torch
    >>> from qalign import BatchLayout, CtrlX, Site
    >>> q, k, v = torch.randn(3, 3, 2, 16, 8)  # three rows, two heads, 16 tokens, eight channels
    >>> site = Site(BatchLayout("output", "appearance", "structure"))
    >>> CtrlX(structure_layers=("up_blocks",), structure_convolutions=()).attend(q, k, v, site).shape
    torch.Size([3, 2, 16, 8])

    Args:
        structure_layers, appearance_layers: beginnings of layer names. The defaults are the published layers
            of SDXL. On SD 1.5 the decoder begins its attention one block later: choose them yourself.
        structure_convolutions: names of residual blocks, independent of `attach(layers=...)`. () injects
            none. A structure row is needed.

    Notes:
        Published on SDXL with the rows [uncond, structure, appearance, cond], of which only cond is edited:
        `BatchLayout("plain", "structure", "appearance", "output", guidance=False)`. New noise for both
        references at every step and self-recurrence are not here.

    Source: Ctrl-X, arXiv 2406.07540.
    """

    card: ClassVar[Card] = Card(
        "Ctrl-X",
        "2406.07540",
        "queries, keys and features of the structure; statistics of the appearance",
        "encoder and first decoder blocks",
        "first 0.6",
        "attention (moments)",
        2.5,
    )
    reads_labels: ClassVar[tuple[str, ...]] = ("appearance", "structure")
    default_steps: ClassVar[tuple[float, float] | None] = (0.0, 0.6)

    structure_layers: tuple[str, ...] = ("up_blocks.0",)
    appearance_layers: tuple[str, ...] = (
        "down_blocks.1",
        "down_blocks.2",
        "up_blocks.0.attentions.1",
        "up_blocks.0.attentions.2",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
    )
    structure_convolutions: tuple[str, ...] = ("up_blocks.0.resnets.0",)

    def default_layers(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if self.acts_in(name)]

    def acts_in(self, layer: str) -> bool:
        return _among(layer, self.structure_layers + self.appearance_layers)

    def hooks(self, model: nn.Module) -> dict[str, Hook]:
        return dict.fromkeys(self.structure_convolutions, _inject)

    def prepare(self, hidden: Tensor, project: Project, site: Site) -> Tensor:
        """Return the hidden states [B, N, C] with the appearance's statistics in the output rows."""
        if site.idle or not _among(site.layer, self.appearance_layers):
            return hidden
        output, reference = site.output_rows(hidden), site.reference_rows(hidden)
        querying = site.structure_rows(hidden) if _among(site.layer, self.structure_layers) else output
        q, k, _ = project(_normalised(hidden.index_select(0, torch.cat([querying, reference]))))
        query, key = q[: len(querying)], k[len(querying) :]
        cut = hidden.float().unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
        style = take(cut, reference)
        centre = style.mean(-2, keepdim=True)
        powers = torch.cat([style - centre, (style - centre).square()], dim=-1)
        segment = Segment(key.float(), powers, labels=site.key_labels(key, reference))
        moments = attention(query.float(), segment, scale=site.scale, query_labels=site.query_labels(q))
        mean, square = moments.chunk(2, dim=-1)
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        edited = deviation * _normalised(take(cut, output)) + mean + centre
        return site.replace(hidden, edited.transpose(1, 2).flatten(2).to(hidden.dtype))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if _among(site.layer, self.structure_layers):
            return super().attend(q, k, v, site)
        return site.plain(q, k, v)

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        structure = site.structure_rows(q)
        segment = Segment(take(k, structure), take(v, output), labels=site.own_labels(output))
        return attention(take(q, structure), segment, scale=site.scale, query_labels=site.open_labels(q))


def _inject(module: nn.Module, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """The features [B, C, h, w] with the structure's in the output rows."""
    return site.replace(y, y.index_select(0, site.structure_rows(y)))


def _among(name: str, beginnings: Sequence[str]) -> bool:
    return any(name == beginning or name.startswith(f"{beginning}.") for beginning in beginnings)


def _normalised(x: Tensor) -> Tensor:
    """Give each channel mean 0 and unbiased deviation 1 over tokens [..., N, C], in float32 or better.

    A channel without a deviation, as of a single token, becomes 0.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, dim=-2, keepdim=True, correction=min(1, wide.shape[-2] - 1))
    return (wide - mean).div_(variance.sqrt().clamp_(min=torch.finfo(wide.dtype).tiny)).to(x.dtype)
