"""MasaCtrl: mutual self-attention, which keeps what a picture shows while its layout changes."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qalign_kernels import attention, label_mass

from ..context.layer_call import Site, take
from ..context.layers import token_grid
from ..context.layout import BatchLayout
from ..context.regions import CORNER, EVERYTHING, Regions
from ._editing import Card, Editing


@dataclass(frozen=True, kw_only=True)
class MasaCtrl(Editing):
    """Edit consistently: the output (target) takes keys and values of the appearance row (source).

    output rows: softmax(s Q_out K_srcᵀ) V_src. With `union`: softmax(s Q_out [K_src; K_out]ᵀ) [V_src; V_out].
    By default from the fifth of 50 steps on, in the last six self-attention layers. These are layers 10 to 15
    of SD 1.4. For SDXL the authors begin at layer 44, 54 or 64 of 70.

    The published mask form attends foreground and background of the source separately, and joins both results
    by the target's mask. For binary masks this is a label on each token:
    `attach(..., regions=Regions(appearance=source_mask, structure=target_mask))`. Label maps are resized to
    each layer by torch's "nearest", as published.

    With token indices, the masks come from the cross-attention of the run, inside `attach` only:
    m is the mean over heads and layers of the attention that conditional rows give to these tokens of their
    prompt, and mask = (m - min m) / (max m - min m) ≥ threshold.
    The layers are those with `map_tokens` tokens that have run in this call of the UNet. The mask is resized
    to each layer by nearest neighbour, and serves both guidance halves. Until the first such layer has run,
    the method has no masks. A constant m is background.

    >>> import torch
    >>> from qalign import BatchLayout, MasaCtrl, Site
    >>> q, k, v = torch.randn(3, 3, 2, 16, 8)  # three rows, two heads, 16 tokens, eight channels
    >>> site = Site(BatchLayout("output", "appearance", "structure"))
    >>> MasaCtrl().attend(q, k, v, site).shape
    torch.Size([3, 2, 16, 8])

    Args:
        union: attend the output's own keys too. The authors' class for it cannot run. This is its formula.
        ref_token_idx, cur_token_idx: the positions of the foreground's words in the prompts of source and
            target. The start token is 0. The authors take (1,) for both. () makes no automatic masks.
        threshold: of the automatic masks.
        map_tokens: the number of tokens of the layers that give the masks: 16² in SD at 512 pixels. The
            smallest layers of SDXL at 1024 pixels have 32².

    Raises:
        ValueError: one of the two token indices alone, or a negative position.

    Notes:
        The published code adds 1 to the logits of unmasked keys, which changes nothing. Where the source has
        no foreground, it attends uniformly; here such a query attends all of the source. Inversion of a real
        source is not here.

    Source: MasaCtrl, arXiv 2304.08465.
    """

    card: ClassVar[Card] = Card(
        "MasaCtrl",
        "2304.08465",
        "keys and values of the source, or of source and output",
        "last six of the decoder",
        "5 to 50 of 50",
        "attention (segments)",
        1.0,
    )
    reads_labels: ClassVar[tuple[str, ...]] = ("appearance", "structure")
    default_steps: ClassVar[tuple[float, float] | None] = (4 / 50, 1.0)

    union: bool = False
    ref_token_idx: Sequence[int] = ()
    cur_token_idx: Sequence[int] = ()
    threshold: float = 0.1
    map_tokens: int = 16 * 16

    def __post_init__(self) -> None:
        for name in ("ref_token_idx", "cur_token_idx"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if bool(self.ref_token_idx) != bool(self.cur_token_idx):
            raise ValueError(f"ref_token_idx, cur_token_idx: expected both or neither, got {self._indices}")
        if min((*self.ref_token_idx, *self.cur_token_idx), default=0) < 0:
            raise ValueError(
                f"ref_token_idx, cur_token_idx: expected places of 0 and more, got {self._indices}"
            )

    @property
    def _indices(self) -> str:
        return f"{self.ref_token_idx} and {self.cur_token_idx}"

    def cross_layers(self, names: Sequence[str]) -> list[str]:
        return list(names) if self.ref_token_idx else []

    def check(
        self,
        size: tuple[int, int],
        grids: Sequence[tuple[int, int]],
        layout: BatchLayout,
        regions: Regions | None,
    ) -> None:
        """Check that either regions or token indices give masks, and that the latents have the map's grid."""
        super().check(size, grids, layout, regions)
        if self.ref_token_idx:
            self._require_no_regions(regions)
            try:
                token_grid(size, self.map_tokens)
            except ValueError:
                expected = f"the tokens of {size[0]} x {size[1]} latents halved some times"
                raise ValueError(f"map_tokens: expected {expected}, got {self.map_tokens}") from None

    def _require_no_regions(self, regions: Regions | None) -> None:
        if regions is not None:
            reason = "because MasaCtrl makes masks from its token indices"
            raise ValueError(f"regions: expected None, {reason}, got Regions")

    def attend_cross(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Return stock attention, and keep how much of it goes to the foreground's words.

        The kept tensor is [2 rows, N]: the conditional rows of the source, then those of the target.
        """
        if (
            self.ref_token_idx
            and site.forward is not None
            and q.shape[2] == self.map_tokens
            and not site.idle
        ):
            sources, targets = (
                site.conditional(rows, q) for rows in (site.reference_rows(q), site.output_rows(q))
            )
            rows = torch.cat([sources, targets])
            make = _columns.__wrapped__ if torch.compiler.is_compiling() else _columns
            columns = make(self.ref_token_idx, self.cur_token_idx, k.shape[2], q.device).repeat_interleave(
                len(targets), 0
            )
            seen = site.own_labels(rows)
            counts = None if seen is None else (seen != 0).int().unsqueeze(1)
            mass = label_mass(take(q, rows), take(k, rows), columns, 1, scale=site.scale, counts=counts)
            site.forward.kept[site.layer] = mass.squeeze(-1).mean(1)
        return site.plain(q, k, v)

    def edit(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, reference: Tensor, site: Site) -> Tensor:
        masks = self._automatic_masks(q, site)
        if masks is None:
            query_labels = site.query_labels(q, resize=CORNER)
            segments = [site.reference(k, v, reference, resize=CORNER)]
        else:
            query_labels, key_labels = masks
            segments = [site.own(k, v, reference, labels=key_labels)]
        if self.union:
            segments.append(site.own(k, v, output))
        return attention(take(q, output), segments, scale=site.scale, query_labels=query_labels)

    def _automatic_masks(self, q: Tensor, site: Site) -> tuple[Tensor, Tensor] | None:
        """Labels [rows, N] of target queries and source keys: 1 is foreground, 2 is background.

        The result is None until a layer has given a map.
        """
        if not self.ref_token_idx or site.forward is None or not site.forward.kept:
            return None
        self._require_no_regions(site.regions)
        mass = torch.stack(list(site.forward.kept.values())).mean(0)
        low, high = mass.aminmax(dim=-1, keepdim=True)
        maps = (
            ((mass - low) / (high - low))
            .unflatten(-1, token_grid(site.forward.size, self.map_tokens))
            .unsqueeze(1)
        )
        sized = F.interpolate(maps, token_grid(site.forward.size, q.shape[2]), mode="nearest").flatten(1)
        source, target = (sized >= self.threshold).chunk(2)
        foreground, background = (
            torch.where(some.any(1, keepdim=True), bit, EVERYTHING)
            for some, bit in ((source, 1), (~source, 2))
        )
        queries, keys = torch.where(target, foreground, background), torch.where(source, 1, 2)
        parts = site.layout.parts(q.shape[0])
        return queries.int().repeat(parts, 1), keys.int().repeat(parts, 1)


@functools.cache
def _columns(source: tuple[int, ...], target: tuple[int, ...], tokens: int, device: torch.device) -> Tensor:
    """int32 [2, T]: 0 for the chosen tokens of each prompt, 1 for the others.

    Raises:
        ValueError: the prompt has no such token.
    """
    if max(*source, *target) >= tokens:
        expected = f"places below the prompt's {tokens}"
        raise ValueError(f"ref_token_idx, cur_token_idx: expected {expected}, got {max(*source, *target)}")
    with torch.inference_mode(False):  # so that autograd can save it
        columns = [[int(place not in chosen) for place in range(tokens)] for chosen in (source, target)]
        return torch.tensor(columns, dtype=torch.int32, device=device)
