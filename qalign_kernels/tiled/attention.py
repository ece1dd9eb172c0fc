"""attention and its gradient by blocks of heads and query rows.

1. On the CPU, queries of one label set go together with the keys that they see, so that no labels remain
   (`_labels.py`).
2. Torch's fused attention serves a call that needs nothing more (`_fused.py`).
3. Otherwise each batch row is prepared once: its keys and values in the accumulate dtype, on the CPU only
   keys with a multiplicity. Blocks of its query rows then meet all keys (`_masses.py`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._blocks import accumulate_dtype
from ._fused import fused, fused_backward, fused_serves, has_lse
from ._labels import Group, group_queries, rows_read
from ._masses import (
    Part,
    Settings,
    Tile,
    add_batch_row,
    blocks_of,
    clipped,
    masses,
    multiplicity,
    prepare,
    sum_of,
    tile_of,
    total_count,
    unclipped,
)
from ._seen import add_sum_of_seen, sum_of_seen


class _Seen(NamedTuple):
    """The keys of a segment that a group of queries sees, and which segment it is."""

    position: int
    segment: Any  # without labels


class _GroupCall(NamedTuple):
    """A call as one group of queries makes it."""

    rows: list[Any]  # the segments as the group's batch rows read them
    seen: list[_Seen]  # of each segment of which the group sees a key
    guide: Any

    def segments(self) -> list[Any]:
        return [seen.segment for seen in self.seen]


class _Given(NamedTuple):
    """What a gradient is computed from; output and log-sum-exp are None where the call did not keep them."""

    grad_output: Tensor
    grad_lse: Tensor | None
    output: Tensor | None
    lse: Tensor | None

    def of(self, group: Group) -> "_Given":
        others = (None if x is None else group.of(x) for x in self[1:])
        return _Given(group.of(self.grad_output), *others)


class _Sums(NamedTuple):
    """The gradients of one batch row of a segment, in the accumulate dtype."""

    key: Tensor  # [H, U, D + D_g]
    value: Tensor  # [H, U, D_v]


class _Row(NamedTuple):
    """One batch row: what it reads of each segment, how many keys that is, and the gradients of these."""

    batch: int
    parts: list[Part]
    total: Tensor
    sums: list[_Sums]


def attention(
    query: Tensor,
    segments: Sequence[Any],
    *,
    scale: float,
    contrast: float,
    query_labels: Tensor | None,
    guide: Any,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    settings = Settings(scale, contrast, query_labels, guide)
    groups = group_queries(query_labels, [s.labels for s in segments], query.shape[0])
    if groups is None:
        return _attend(query, segments, segments, settings, need_lse)
    output = query.new_empty((*query.shape[:3], segments[0].value.shape[3]))
    lse = query.new_empty(query.shape[:3], dtype=accumulate_dtype(query)) if need_lse else None
    for group in groups:
        call, part = _of_group(group, segments, guide), group.of(query)
        if call.seen:
            own = settings._replace(query_labels=None, guide=call.guide)
            part_output, part_lse = _attend(part, call.segments(), call.rows, own, need_lse)
        else:
            part_output = output.new_zeros((*part.shape[:3], output.shape[3]))
            part_lse = part.new_full(part.shape[:3], float("-inf"))
        output[group.batch].index_copy_(2, group.queries, part_output)
        if lse is not None and part_lse is not None:
            lse[group.batch].index_copy_(2, group.queries, part_lse.to(lse.dtype))
    return output, lse


def _of_group(group: Group, segments: Sequence[Any], guide: Any) -> _GroupCall:
    rows = [_of_rows(segment, group.batch) for segment in segments]
    seen = []
    for position, (segment, kept) in enumerate(zip(rows, group.keys)):
        key, value, counts = (
            x if x is None or kept is None else x.index_select(2, kept)
            for x in (segment.key, segment.value, segment.counts)
        )
        if key.shape[2]:
            own = dataclasses.replace(segment, key=key, value=value, counts=counts, labels=None)
            seen.append(_Seen(position, own))
    if guide is not None:
        key, kept = _of_rows(dataclasses.replace(segments[0], key=guide.key), group.batch).key, group.keys[0]
        guide = guide._replace(
            query=group.of(guide.query), key=key if kept is None else key.index_select(2, kept)
        )
    return _GroupCall(rows, seen, guide)


def _of_rows(segment: Any, batch: slice) -> Any:
    """The keys and values of a segment that one batch row of queries reads, or all of them."""
    keys, index = rows_read(batch, segment.batch_index)
    counts = None if segment.counts is None else segment.counts[batch]
    return dataclasses.replace(
        segment, key=segment.key[keys], value=segment.value[keys], counts=counts, batch_index=index
    )


def _attend(
    query: Tensor, segments: Sequence[Any], counted: Sequence[Any], settings: Settings, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention over `segments`; a contrast counts the keys of all that are `counted`."""
    scale, contrast, query_labels, guide = settings
    alone = guide is None and contrast == 1.0 and len(segments) == 1 and fused_serves(query, segments[0])
    if alone and (not need_lse or has_lse(query)):
        return fused(query, segments[0], scale * segments[0].logit_scale, need_lse)
    dtype = accumulate_dtype(query)
    output = query.new_empty((*query.shape[:3], segments[0].value.shape[3]))
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    for b in range(query.shape[0]):
        parts = [prepare(segment, guide, scale, b, dtype) for segment in segments]
        total = total_count(counted, b, dtype)
        for heads, rows in blocks_of(query, parts, score_tensors=2):
            tiles = [tile_of(part, query, settings, b, heads, rows) for part in parts]
            mass, lse[b, heads, rows] = masses(tiles)
            if contrast != 1.0:
                mass = [
                    clipped(unclipped(m, tile, contrast, total[heads]), tile, contrast)
                    for m, tile in zip(mass, tiles)
                ]
            values = [
                sum_of_seen(m.to(query.dtype).to(dtype), tile.value, tile.seen)
                for m, tile in zip(mass, tiles)
            ]
            output[b, heads, rows] = sum_of(values)
    return output, lse if need_lse else None


def attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor | None,
    lse: Tensor | None,
    query: Tensor,
    segments: Sequence[Any],
    *,
    scale: float,
    contrast: float,
    query_labels: Tensor | None,
    guide: Any,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of query, keys, values and guide that are needed.

    Masses are computed again, block by block. With g_ij = dO_i·v_j (a contrast: times c inside the clip):
    dl_ij = m_j p_ij (g_ij - Σ_k m_k p_ik g_ik + dlse_i), dv_j = Σ_i m_j w_ij dO_i.

    On the CPU torch's fused attention computes them, where it serves the call and output and log-sum-exp are
    given.
    """
    settings = Settings(scale, contrast, query_labels, guide)
    given = _Given(grad_output, grad_lse, output, lse)
    groups = group_queries(query_labels, [s.labels for s in segments], query.shape[0])
    if groups is None:
        grads = _backward(given, query, segments, segments, settings)
    else:
        grads = _backward_of_groups(given, query, segments, settings, groups)
    return [grad.to(query.dtype) if needed else None for grad, needed in zip(grads, needs)]


def _backward_of_groups(
    given: _Given, query: Tensor, segments: Sequence[Any], settings: Settings, groups: list[Group]
) -> list[Tensor]:
    """The gradients of query, keys, values and guide, group after group of queries."""
    guide, dtype = settings.guide, accumulate_dtype(query)
    guides = () if guide is None else (guide.query, guide.key)
    tensors = [query, *(s.key for s in segments), *(s.value for s in segments), *guides]
    sums = [x.new_zeros(x.shape, dtype=dtype) for x in tensors]
    of_guide = () if guide is None else (3, 4)  # its query and key, after those of the one segment
    for group in groups:
        call = _of_group(group, segments, guide)
        if not call.seen:
            continue
        own = settings._replace(query_labels=None, guide=call.guide)
        grads = _backward(given.of(group), group.of(query), call.segments(), call.rows, own)
        firsts = (1, 1 + len(segments))  # of the keys, and of the values
        places = [0, *(first + seen.position for first in firsts for seen in call.seen), *of_guide]
        for place, grad in zip(places, grads):
            if place in (0, *of_guide[:1]):
                sums[place][group.batch].index_copy_(2, group.queries, grad)
                continue
            position = (place - 1) % len(segments)
            target = sums[place][rows_read(group.batch, segments[position].batch_index)[0]]
            kept = group.keys[position]
            target.add_(grad) if kept is None else target.index_add_(2, kept, grad)
    return sums


def _backward(
    given: _Given, query: Tensor, segments: Sequence[Any], counted: Sequence[Any], settings: Settings
) -> list[Tensor]:
    """The gradients of query, keys, values and guide, in the accumulate dtype or that of the query."""
    scale, _, _, guide = settings
    lse = given.lse if given.grad_lse is None else None
    alone = guide is None and len(segments) == 1
    if alone and lse is not None and has_lse(query) and fused_serves(query, segments[0]):
        factor = scale * segments[0].logit_scale
        return fused_backward(given.grad_output, given.output, lse, query, segments[0], factor)
    dtype, head_dim = accumulate_dtype(query), query.shape[3]
    guides = () if guide is None else (guide.query, guide.key)
    grad_query, *grad_guides = (x.new_zeros(x.shape, dtype=dtype) for x in (query, *guides))
    grad_keys, grad_values = (
        [x.new_zeros(x.shape, dtype=dtype) for x in tensors]
        for tensors in zip(*((s.key, s.value) for s in segments))
    )
    for b in range(query.shape[0]):
        parts = [prepare(segment, guide, scale, b, dtype) for segment in segments]
        sums = [_Sums(torch.zeros_like(part.key), torch.zeros_like(part.value)) for part in parts]
        row = _Row(b, parts, total_count(counted, b, dtype), sums)
        for heads, rows in blocks_of(query, parts, score_tensors=5):
            features = _backward_of_block(given, query, settings, row, heads, rows)
            for part, grad_features in zip(parts, features):
                grad_query[b, heads, rows] += grad_features[..., :head_dim] * part.scale
                if guide is not None:
                    grad_guides[0][b, heads, rows] = grad_features[..., head_dim:] * guide.strength
        for segment, part, own, keys, values in zip(segments, parts, sums, grad_keys, grad_values):
            if part.counts is not None:  # a head may lack keys that others have
                own = _Sums(*(x.masked_fill_((part.counts == 0).mT, 0) for x in own))
            add_batch_row(keys, own.key[..., :head_dim], b, segment.batch_index, part.kept)
            add_batch_row(values, own.value, b, segment.batch_index, part.kept)
            if guide is not None:
                add_batch_row(grad_guides[1], own.key[..., head_dim:], b, segment.batch_index, part.kept)
    return [grad_query, *grad_keys, *grad_values, *grad_guides]


def _backward_of_block(
    given: _Given, query: Tensor, settings: Settings, row: _Row, heads: slice, rows: slice
) -> list[Tensor]:
    """Add the gradients of keys and values to the sums of the row. Returns those of query and guide."""
    b, contrast = row.batch, settings.contrast
    tiles = [tile_of(part, query, settings, b, heads, rows) for part in row.parts]
    dtype = tiles[0].key.dtype
    grad = given.grad_output[b, heads, rows].to(dtype)
    mass = masses(tiles).masses
    gains = [_unless_hidden(grad @ tile.value.mT, tile) for tile in tiles]
    weights = mass
    if contrast != 1.0:
        total = row.total[heads]
        weights = [unclipped(m.clone(), tile, contrast, total) for m, tile in zip(mass, tiles)]
        inside = [(w >= 0) & (w <= multiplicity(tile)) for w, tile in zip(weights, tiles)]
        weights = [clipped(w, tile, contrast) for w, tile in zip(weights, tiles)]
        gains = [g.mul_(within).mul_(contrast) for g, within in zip(gains, inside)]
    offset = -sum_of([torch.einsum("hrn,hrn->hr", m, g) for m, g in zip(mass, gains)])
    if given.grad_lse is not None:
        offset += given.grad_lse[b, heads, rows]
    grad_features = []
    for tile, m, w, g, sums in zip(tiles, mass, weights, gains, row.sums):
        grad_logits, weighed = _unless_hidden(g.add_(offset.unsqueeze(-1)).mul_(m), tile), w.to(query.dtype)
        grad_features.append(sum_of_seen(grad_logits, tile.key, tile.seen))
        add_sum_of_seen(sums.key[heads], grad_logits.mT, tile.query, tile.seen)
        add_sum_of_seen(sums.value[heads], weighed.to(dtype).mT, grad, tile.seen)
    return grad_features


def _unless_hidden(pairs: Tensor, tile: Tile) -> Tensor:
    """The numbers of pairs [h, r, U], 0 for a key that is not seen, in place."""
    return pairs if tile.seen is None else pairs.masked_fill_(~tile.seen, 0)
