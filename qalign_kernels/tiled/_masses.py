"""One block of query rows against the keys of every segment: the masses, their contrast and their sums.

The mass of a key is m_j p_ij, its probability times its multiplicity. A block holds one score tensor per
segment, so that segments are never concatenated. The channels of a guide are appended to those of query and
key.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._blocks import batch_row, blocks, on_host


class Settings(NamedTuple):
    """The settings of a call of attention that hold for all of its segments."""

    scale: float
    contrast: float
    query_labels: Tensor | None  # int32 [B or 1, N_q]
    guide: Any  # query [B, H, N_q, D_g], key [B, H, N_k, D_g] and strength


class Masses(NamedTuple):
    """The masses of each tile, and the log-sum-exp over all of them."""

    masses: list[Tensor]  # [h, r, U]
    lse: Tensor  # [h, r]


class Part(NamedTuple):
    """What one batch row reads of a segment, in the accumulate dtype."""

    key: Tensor  # [H, U, D + D_g]
    value: Tensor  # [H, U, D_v]
    counts: Tensor | None  # [H, 1, U]
    labels: Tensor | None  # [U]
    kept: Tensor | None  # [U], the tokens taken of the segment; None: all
    scale: float
    shift: float


class Tile(NamedTuple):
    """A block of query rows against the keys of a part."""

    query: Tensor  # [h, r, D + D_g], times scale and strength
    key: Tensor  # [h, U, D + D_g]
    value: Tensor  # [h, U, D_v]
    counts: Tensor | None  # [h, 1, U]
    seen: Tensor | None  # [r, U] by the labels, [h, r, U] beside counts; None: all
    shift: float


def prepare(segment: Any, guide: Any, scale: float, b: int, dtype: torch.dtype) -> Part:
    key, value = (batch_row(x, b, segment.batch_index).to(dtype) for x in (segment.key, segment.value))
    if guide is not None:
        key = torch.cat([key, batch_row(guide.key, b, segment.batch_index).to(dtype)], -1)
    labels = None if segment.labels is None else segment.labels[b if segment.labels.shape[0] > 1 else 0]
    counts = kept = None
    if segment.counts is not None:
        counts = segment.counts[b].clamp(min=0)
        kept = _present(counts) if on_host(counts) else None
        if kept is not None:
            key, value, counts = (x.index_select(1, kept) for x in (key, value, counts))
            labels = None if labels is None else labels.index_select(0, kept)
        counts = counts.to(dtype).unsqueeze(1).expand(key.shape[0], -1, -1)
        key, value = (x.masked_fill((counts == 0).mT, 0) for x in (key, value))
    return Part(key, value, counts, labels, kept, scale * segment.logit_scale, segment.logit_shift)


def _present(counts: Tensor) -> Tensor | None:
    """The tokens [U] that some head counts, at least one; None for all tokens. U is read on the host."""
    kept = (counts != 0).any(0).nonzero().squeeze(1)
    if kept.numel() == counts.shape[1]:
        return None
    return kept if kept.numel() else kept.new_zeros(1)


def total_count(segments: Sequence[Any], b: int, dtype: torch.dtype) -> Tensor:
    """N [H, 1, 1], the number of keys, each times its multiplicity; at least 1."""
    total = segments[0].key.new_zeros(segments[0].key.shape[1], dtype=dtype)
    for segment in segments:
        total += segment.key.shape[2] if segment.counts is None else segment.counts[b].clamp(min=0).sum(-1)
    return total.clamp_(min=1)[:, None, None]


def blocks_of(query: Tensor, parts: Sequence[Part], score_tensors: int) -> Iterator[tuple[slice, slice]]:
    bytes_per_row = score_tensors * parts[0].key.dtype.itemsize * sum(part.key.shape[1] for part in parts)
    return blocks(query.shape[1], query.shape[2], bytes_per_row, query.device)


def tile_of(part: Part, query: Tensor, settings: Settings, b: int, heads: slice, rows: slice) -> Tile:
    query_labels, guide = settings.query_labels, settings.guide
    features = query[b, heads, rows].to(part.key.dtype) * part.scale
    if guide is not None:
        features = torch.cat([features, guide.query[b, heads, rows].to(part.key.dtype) * guide.strength], -1)
    seen = None
    if part.labels is not None and query_labels is not None:
        labels = query_labels[b if query_labels.shape[0] > 1 else 0, rows]
        seen = (labels.unsqueeze(1) & part.labels) != 0
    counts = None if part.counts is None else part.counts[heads]
    if counts is not None:  # a head that counts no key reads nothing, so its queries do not matter
        features = features.masked_fill_((counts == 0).all(-1, keepdim=True), 0)
        seen = None if seen is None else seen & (counts > 0)
    return Tile(features, part.key[heads], part.value[heads], counts, seen, part.shift)


def masses(tiles: Sequence[Tile]) -> Masses:
    mass = []
    for tile in tiles:
        logits = tile.query @ tile.key.mT
        if tile.shift:
            logits.add_(tile.shift)
        if tile.counts is not None:
            logits.add_(tile.counts.log())
        if tile.seen is not None:
            logits.masked_fill_(~tile.seen, float("-inf"))
        mass.append(logits)
    peak = torch.cat([x.amax(-1, keepdim=True) for x in mass], -1).amax(-1, keepdim=True)
    peak.masked_fill_(peak == float("-inf"), 0)
    for x in mass:
        x.sub_(peak).exp_()
    total = sum_of([x.sum(-1, keepdim=True) for x in mass])
    lse = (peak + total.log()).squeeze(-1)
    total.masked_fill_(total == 0, 1)
    for x, tile in zip(mass, tiles):
        x.div_(total)
        if tile.seen is not None:
            x.masked_fill_(~tile.seen, 0)  # also in a row that is NaN
    return Masses(mass, lse)


def unclipped(mass: Tensor, tile: Tile, contrast: float, total: Tensor) -> Tensor:
    """m_j (c (p_ij - 1/N) + 1/N), written over `mass`."""
    return mass.mul_(contrast).add_(multiplicity(tile) * ((1 - contrast) / total))


def clipped(weights: Tensor, tile: Tile, contrast: float) -> Tensor:
    """The weights, clipped in place to [0, m_j]; 0 for a key that is not seen."""
    if tile.counts is None:
        weights.clamp_(0, 1)
    else:
        torch.minimum(weights.clamp_(min=0), tile.counts, out=weights)
    return weights if tile.seen is None or contrast >= 1 else weights.masked_fill_(~tile.seen, 0)


def multiplicity(tile: Tile) -> Tensor:
    """m_j, [H, 1, U] or one number."""
    return tile.key.new_ones(()) if tile.counts is None else tile.counts


def add_batch_row(
    target: Tensor, added: Tensor, b: int, batch_index: Tensor | None, kept: Tensor | None
) -> None:
    """Add [H, U, D] to the row of `target` [B_s, H, N_k, D] that query row b reads."""
    if batch_index is not None and not on_host(target):
        target.index_add_(0, batch_index[b : b + 1].clamp(0, target.shape[0] - 1), added.unsqueeze(0))
        return
    row = batch_row(target, b, batch_index)
    if kept is None:
        row.add_(added)
    else:
        row.index_add_(1, kept, added)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the tensors, written over the first one."""
    total = tensors[0]
    for x in tensors[1:]:
        total = total.add_(x)
    return total
