"""attention and its gradient by blocks of heads and query rows; torch's fused attention where a call asks for nothing more.

On the CPU the queries of one label set go together with the keys that they see, and nothing has labels then. Each batch row is prepared
once: its keys and values in the accumulate dtype, on the CPU only those with a multiplicity. A block then holds one score tensor per segment,
so that segments are never concatenated. A guide is more columns of query and key. "Mass" is m_j p_ij, the probability with multiplicity.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ._blocks import accumulate_dtype, batch_row, blocks, on_host
from ._labels import Group, group_queries, rows_read

_SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class _Part(NamedTuple):
    """What one batch row reads of a segment, in the accumulate dtype."""

    key: Tensor  # [H, U, D + D_g]
    value: Tensor  # [H, U, D_v]
    counts: Tensor | None  # [H, 1, U]
    labels: Tensor | None  # [U]
    kept: Tensor | None  # [U], the tokens taken of the segment; None: all
    scale: float
    shift: float


class _Tile(NamedTuple):
    """A block of query rows against the keys of a part."""

    query: Tensor  # [h, r, D + D_g], times scale and strength
    key: Tensor  # [h, U, D + D_g]
    value: Tensor  # [h, U, D_v]
    counts: Tensor | None  # [h, 1, U]
    seen: Tensor | None  # [r, U], by the labels; None: all
    shift: float


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
    groups = group_queries(query_labels, [s.labels for s in segments], query.shape[0])
    if groups is None:
        return _attend(query, segments, segments, scale, contrast, query_labels, guide, need_lse)
    output = query.new_empty((*query.shape[:3], segments[0].value.shape[3]))
    lse = query.new_empty(query.shape[:3], dtype=accumulate_dtype(query)) if need_lse else None
    for group in groups:
        rows, seen, part_guide = _of_group(group, segments, guide)
        part = group.of(query)
        if seen:
            part_output, part_lse = _attend(
                part, [s for _, s in seen], rows, scale, contrast, None, part_guide, need_lse
            )
        else:
            part_output, part_lse = (
                output.new_zeros((*part.shape[:3], output.shape[3])),
                part.new_full(part.shape[:3], float("-inf")),
            )
        output[group.batch].index_copy_(2, group.queries, part_output)
        if lse is not None and part_lse is not None:
            lse[group.batch].index_copy_(2, group.queries, part_lse.to(lse.dtype))
    return output, lse


def _of_group(
    group: Group, segments: Sequence[Any], guide: Any
) -> tuple[list[Any], list[tuple[int, Any]], Any]:
    """The segments as the group's batch rows read them; what its queries see of each that shows them something, by position and without labels;
    the guide to match."""
    rows = [_of_rows(segment, group.batch) for segment in segments]
    seen = []
    for position, (segment, kept) in enumerate(zip(rows, group.keys)):
        key, value, counts = (
            x if x is None or kept is None else x.index_select(2, kept)
            for x in (segment.key, segment.value, segment.counts)
        )
        if key.shape[2]:
            seen.append(
                (position, dataclasses.replace(segment, key=key, value=value, counts=counts, labels=None))
            )
    if guide is not None:
        key = _of_rows(dataclasses.replace(segments[0], key=guide.key), group.batch).key
        guide = guide._replace(
            query=group.of(guide.query),
            key=key if group.keys[0] is None else key.index_select(2, group.keys[0]),
        )
    return rows, seen, guide


def _of_rows(segment: Any, batch: slice) -> Any:
    """What one query row, or all of them, read of a segment."""
    keys, index = rows_read(batch, segment.batch_index)
    counts = None if segment.counts is None else segment.counts[batch]
    return dataclasses.replace(
        segment, key=segment.key[keys], value=segment.value[keys], counts=counts, batch_index=index
    )


def _attend(
    query: Tensor, segments: Sequence[Any], counted: Sequence[Any], scale: float, contrast: float, query_labels: Tensor | None, guide: Any,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention over `segments`; a contrast counts the keys of all that are `counted`."""
    fused = guide is None and contrast == 1.0 and len(segments) == 1 and _fused_serves(query, segments[0])
    if fused and (not need_lse or _has_lse(query)):
        return _fused(query, segments[0], scale * segments[0].logit_scale, need_lse)
    dtype = accumulate_dtype(query)
    output = query.new_empty((*query.shape[:3], segments[0].value.shape[3]))
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    for b in range(query.shape[0]):
        parts = [_prepare(segment, guide, scale, b, dtype) for segment in segments]
        total = _total(counted, b, dtype)
        for heads, rows in _blocks_of(query, parts, score_tensors=2):
            tiles = [_tile(part, query, guide, query_labels, b, heads, rows) for part in parts]
            mass, lse[b, heads, rows] = _masses(tiles)
            if contrast != 1.0:
                mass = [
                    _clipped(_unclipped(m, tile, contrast, total[heads]), tile, contrast)
                    for m, tile in zip(mass, tiles)
                ]
            output[b, heads, rows] = _sum(
                [m.to(query.dtype).to(dtype) @ tile.value for m, tile in zip(mass, tiles)]
            )
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
    """The gradients of query, keys, values and guide that are needed, recomputing the masses block by block; on the CPU by torch's fused
    attention where the output and its log-sum-exp came and it serves the call.

    With g_ij = dO_i·v_j (contrasted: times c inside the clip): dl_ij = m_j p_ij (g_ij - Σ_k m_k p_ik g_ik + dlse_i), dv_j = Σ_i m_j w_ij dO_i.
    """
    groups = group_queries(query_labels, [s.labels for s in segments], query.shape[0])
    if groups is None:
        grads = _backward(
            grad_output,
            grad_lse,
            output,
            lse,
            query,
            segments,
            segments,
            scale,
            contrast,
            query_labels,
            guide,
        )
        return [grad.to(query.dtype) if needed else None for grad, needed in zip(grads, needs)]
    tensors = [
        query,
        *(s.key for s in segments),
        *(s.value for s in segments),
        *(() if guide is None else guide[:2]),
    ]
    sums = [x.new_zeros(x.shape, dtype=accumulate_dtype(query)) for x in tensors]
    of_guide = () if guide is None else (3, 4)  # its query and key, after those of the one segment
    for group in groups:
        rows, seen, part_guide = _of_group(group, segments, guide)
        if not seen:
            continue
        grad, part_grad_lse, part_output, part_lse = (
            None if x is None else group.of(x) for x in (grad_output, grad_lse, output, lse)
        )
        segments_seen = [segment for _, segment in seen]
        grads = _backward(
            grad,
            part_grad_lse,
            part_output,
            part_lse,
            group.of(query),
            segments_seen,
            rows,
            scale,
            contrast,
            None,
            part_guide,
        )
        places = [
            0,
            *(first + position for first in (1, 1 + len(segments)) for position, _ in seen),
            *of_guide,
        ]
        for place, grad in zip(places, grads):
            if place in (0, *of_guide[:1]):
                sums[place][group.batch].index_copy_(2, group.queries, grad)
                continue
            position = (place - 1) % len(segments)
            target, kept = (
                sums[place][rows_read(group.batch, segments[position].batch_index)[0]],
                group.keys[position],
            )
            target.add_(grad) if kept is None else target.index_add_(2, kept, grad)
    return [x.to(query.dtype) if needed else None for x, needed in zip(sums, needs)]


def _backward(
    grad_output: Any, grad_lse: Any, output: Any, lse: Any, query: Tensor, segments: Sequence[Any], counted: Sequence[Any], scale: float,
    contrast: float, query_labels: Tensor | None, guide: Any,
) -> list[Tensor]:  # fmt: skip
    """The gradients of query, keys, values and guide, in the accumulate dtype or that of the query."""
    if (
        guide is None
        and lse is not None
        and grad_lse is None
        and len(segments) == 1
        and _has_lse(query)
        and _fused_serves(query, segments[0])
    ):
        return _fused_backward(grad_output, output, lse, query, segments[0], scale * segments[0].logit_scale)
    dtype, head_dim = accumulate_dtype(query), query.shape[3]
    guides = () if guide is None else (guide.query, guide.key)
    grad_query, *grad_guides = (x.new_zeros(x.shape, dtype=dtype) for x in (query, *guides))
    grad_keys, grad_values = (
        [x.new_zeros(x.shape, dtype=dtype) for x in tensors]
        for tensors in zip(*((s.key, s.value) for s in segments))
    )
    for b in range(query.shape[0]):
        parts = [_prepare(segment, guide, scale, b, dtype) for segment in segments]
        total = _total(counted, b, dtype)
        sums = [(torch.zeros_like(part.key), torch.zeros_like(part.value)) for part in parts]
        for heads, rows in _blocks_of(query, parts, score_tensors=5):
            tiles = [_tile(part, query, guide, query_labels, b, heads, rows) for part in parts]
            grad = grad_output[b, heads, rows].to(dtype)
            mass, _ = _masses(tiles)
            gains = [grad @ tile.value.mT for tile in tiles]
            weights = mass
            if contrast != 1.0:
                weights = [
                    _unclipped(m.clone(), tile, contrast, total[heads]) for m, tile in zip(mass, tiles)
                ]
                inside = [(w >= 0) & (w <= _multiplicity(tile)) for w, tile in zip(weights, tiles)]
                weights = [_clipped(w, tile, contrast) for w, tile in zip(weights, tiles)]
                gains = [g.mul_(within).mul_(contrast) for g, within in zip(gains, inside)]
            offset = -_sum([torch.einsum("hrn,hrn->hr", m, g) for m, g in zip(mass, gains)])
            if grad_lse is not None:
                offset += grad_lse[b, heads, rows]
            for part, tile, m, w, g, (grad_key, grad_value) in zip(parts, tiles, mass, weights, gains, sums):
                grad_logits = g.add_(offset.unsqueeze(-1)).mul_(m)
                grad_features = grad_logits @ tile.key
                grad_query[b, heads, rows] += grad_features[..., :head_dim] * part.scale
                if guide is not None:
                    grad_guides[0][b, heads, rows] = grad_features[..., head_dim:] * guide.strength
                grad_key[heads].baddbmm_(grad_logits.mT, tile.query)
                grad_value[heads].baddbmm_(w.to(query.dtype).to(dtype).mT, grad)
        for segment, part, (grad_key, grad_value), keys, values in zip(
            segments, parts, sums, grad_keys, grad_values
        ):
            _add_batch_row(keys, grad_key[..., :head_dim], b, segment.batch_index, part.kept)
            _add_batch_row(values, grad_value, b, segment.batch_index, part.kept)
            if guide is not None:
                _add_batch_row(grad_guides[1], grad_key[..., head_dim:], b, segment.batch_index, part.kept)
    return [grad_query, *grad_keys, *grad_values, *grad_guides]


def _fused_serves(query: Tensor, segment: Any) -> bool:
    """Whether torch's fused attention computes this segment without holding its scores."""
    if segment.labels is not None or segment.key.shape[3] != segment.value.shape[3]:
        return False
    if on_host(query):
        return True
    return query.device.type == "cuda" and segment.counts is None and query.dtype != torch.float64


def _has_lse(query: Tensor) -> bool:
    """Whether torch's fused attention also gives a log-sum-exp, and one to rely on: in half precision it is good to four digits."""
    return on_host(query) and query.dtype in (torch.float32, torch.float64)


def _fused(query: Tensor, segment: Any, scale: float, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    query, key, value = (_dense(x) for x in (query, segment.key, segment.value))
    if segment.counts is None and segment.batch_index is None:
        output, lse = _sdpa(query, key, value, None, scale)
        return output.contiguous(), lse.add(
            segment.logit_shift
        ).contiguous() if need_lse and lse is not None else None
    output = query.new_zeros(query.shape)
    lse = query.new_full(query.shape[:3], float("-inf"), dtype=accumulate_dtype(query)) if need_lse else None
    for b in range(query.shape[0]):
        row = _fused_row(key, value, segment, b)
        if row.key.shape[1] == 0:
            continue
        row_output, row_lse = _sdpa(
            query[b : b + 1], row.key.unsqueeze(0), row.value.unsqueeze(0), row.mask, scale
        )
        output[b] = row_output[0].masked_fill_(row.empty, 0)
        if lse is not None and row_lse is not None:
            lse[b] = (row_lse[0] + segment.logit_shift).masked_fill_(row.empty.squeeze(-1), float("-inf"))
    return output, lse


def _fused_backward(
    grad_output: Tensor, output: Any, lse: Tensor, query: Tensor, segment: Any, scale: float
) -> list[Tensor]:
    """The gradients of query, key and value; a few heads at a time, as torch's come in a layout of their own."""
    lse, grad_output = lse - segment.logit_shift, _dense(grad_output)
    query, key, value = (_dense(x) for x in (query, segment.key, segment.value))
    grad_query, grad_key, grad_value = (x.new_zeros(x.shape) for x in (query, key, value))
    step = torch.get_num_threads()
    for b in range(query.shape[0]):
        whole = _fused_row(key, value, segment, b)
        if whole.key.shape[1] == 0:
            continue
        for heads in (slice(first, first + step) for first in range(0, query.shape[1], step)):
            row = whole.of(heads)
            where = slice(b, b + 1), heads
            parts = _sdpa_backward(grad_output[where], query[where], output[where], lse[where], row, scale)
            grads = [x[0].masked_fill_(row.empty, 0) for x in parts]
            grad_query[b, heads] = grads[0]
            for total, grad in zip((grad_key, grad_value), grads[1:]):
                target = batch_row(total, b, segment.batch_index)[heads]
                if row.kept is None:
                    target += grad
                else:
                    target.scatter_add_(1, row.kept.unsqueeze(-1).expand_as(grad), grad)
    return [grad_query, grad_key, grad_value]


def _dense(x: Tensor) -> Tensor:
    """With channels next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sdpa(query, key, value, mask, scale: float) -> tuple[Tensor, Tensor | None]:
    """Output, and on the CPU the log-sum-exp. The caller's choice of SDPA backends stays outside."""
    if on_host(query):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
    with sdpa_kernel(_SDPA_BACKENDS):
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale), None


def _sdpa_backward(
    grad_output, query, output, lse, row: "_FusedRow", scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    key, value = row.key.unsqueeze(0), row.value.unsqueeze(0)
    return backward(grad_output, query, key, value, output, lse, 0.0, False, attn_mask=row.mask, scale=scale)


class _FusedRow(NamedTuple):
    """What one batch row reads of a segment with counts or a batch index; U is the largest number of counted keys of a head."""

    key: Tensor  # [H, U, D]
    value: Tensor  # [H, U, D]
    mask: Tensor | None  # log-counts [1, 1 or H, 1, U]; None: each key once
    kept: Tensor | None  # [1 or H, U], the tokens taken of the segment; None: all, in order
    empty: Tensor  # [1 or H, 1, 1], whether a head has no key at all

    def of(self, heads: slice) -> "_FusedRow":
        """Of some heads."""
        mask = self.mask if self.mask is None or self.mask.shape[1] == 1 else self.mask[:, heads]
        kept = self.kept if self.kept is None or self.kept.shape[0] == 1 else self.kept[heads]
        empty = self.empty if self.empty.shape[0] == 1 else self.empty[heads]
        return _FusedRow(self.key[heads], self.value[heads], mask, kept, empty)


def _fused_row(key: Tensor, value: Tensor, segment: Any, b: int) -> _FusedRow:
    """Reads U on the host. Heads with fewer keys than U are filled up by zeros of weight zero."""
    key, value = (batch_row(x, b, segment.batch_index) for x in (key, value))
    if segment.counts is None:
        return _FusedRow(key, value, None, None, torch.zeros((1, 1, 1), dtype=torch.bool, device=key.device))
    counts = segment.counts[b]
    used, empty = int((counts != 0).sum(-1).max()), (counts == 0).all(-1)[:, None, None]
    kept = None
    if used < key.shape[1]:
        kept = (counts == 0).to(torch.uint8).argsort(dim=-1, stable=True)[:, :used]
        counts = counts.gather(1, kept)
        if kept.shape[0] == 1:
            key, value = (x.index_select(1, kept[0]) for x in (key, value))
        else:
            key, value = (
                torch.stack([x[h].index_select(0, kept[h]) for h in range(x.shape[0])]) for x in (key, value)
            )
    if counts.shape[0] > 1 and bool((counts == 0).any()):
        absent = (counts == 0).unsqueeze(-1)
        key, value = (x.masked_fill(absent, 0) for x in (key, value))
    plain = used == 0 or bool((counts == 1).all())
    return _FusedRow(
        key, value, None if plain else counts.to(accumulate_dtype(key)).log_()[None, :, None], kept, empty
    )


def _prepare(segment: Any, guide: Any, scale: float, b: int, dtype: torch.dtype) -> _Part:
    key, value = (batch_row(x, b, segment.batch_index).to(dtype) for x in (segment.key, segment.value))
    if guide is not None:
        key = torch.cat([key, batch_row(guide.key, b, segment.batch_index).to(dtype)], -1)
    labels = None if segment.labels is None else segment.labels[b if segment.labels.shape[0] > 1 else 0]
    counts = kept = None
    if segment.counts is not None:
        counts = segment.counts[b]
        kept = _present(counts) if on_host(counts) else None
        if kept is not None:
            key, value, counts = (x.index_select(1, kept) for x in (key, value, counts))
            labels = None if labels is None else labels.index_select(0, kept)
        counts = counts.to(dtype).unsqueeze(1).expand(key.shape[0], -1, -1)
        key, value = (x.masked_fill((counts == 0).mT, 0) for x in (key, value))
    return _Part(key, value, counts, labels, kept, scale * segment.logit_scale, segment.logit_shift)


def _present(counts: Tensor) -> Tensor | None:
    """The tokens [U], at least one, that any head counts; None for all of them. Reads U on the host."""
    kept = (counts != 0).any(0).nonzero().squeeze(1)
    if kept.numel() == counts.shape[1]:
        return None
    return kept if kept.numel() else kept.new_zeros(1)


def _total(segments: Sequence[Any], b: int, dtype: torch.dtype) -> Tensor:
    """N [H, 1, 1], the number of keys with multiplicity, at least 1."""
    total = segments[0].key.new_zeros(segments[0].key.shape[1], dtype=dtype)
    for segment in segments:
        total += segment.key.shape[2] if segment.counts is None else segment.counts[b].sum(-1)
    return total.clamp_(min=1)[:, None, None]


def _blocks_of(query: Tensor, parts: Sequence[_Part], score_tensors: int) -> Iterator[tuple[slice, slice]]:
    bytes_per_row = score_tensors * parts[0].key.dtype.itemsize * sum(part.key.shape[1] for part in parts)
    return blocks(query.shape[1], query.shape[2], bytes_per_row, query.device)


def _tile(
    part: _Part, query: Tensor, guide: Any, query_labels: Tensor | None, b: int, heads: slice, rows: slice
) -> _Tile:
    features = query[b, heads, rows].to(part.key.dtype) * part.scale
    if guide is not None:
        features = torch.cat([features, guide.query[b, heads, rows].to(part.key.dtype) * guide.strength], -1)
    seen = None
    if part.labels is not None and query_labels is not None:
        labels = query_labels[b if query_labels.shape[0] > 1 else 0, rows]
        seen = (labels.unsqueeze(1) & part.labels) != 0
    counts = None if part.counts is None else part.counts[heads]
    return _Tile(features, part.key[heads], part.value[heads], counts, seen, part.shift)


def _masses(tiles: Sequence[_Tile]) -> tuple[list[Tensor], Tensor]:
    """m_j p_ij [h, r, U] of each tile, and the log-sum-exp [h, r] over all of them."""
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
    total = _sum([x.sum(-1, keepdim=True) for x in mass])
    lse = (peak + total.log()).squeeze(-1)
    total.masked_fill_(total == 0, 1)
    return [x.div_(total) for x in mass], lse


def _unclipped(mass: Tensor, tile: _Tile, contrast: float, total: Tensor) -> Tensor:
    """m_j (c (p_ij - 1/N) + 1/N) in the place of `mass`."""
    return mass.mul_(contrast).add_(_multiplicity(tile) * ((1 - contrast) / total))


def _clipped(weights: Tensor, tile: _Tile, contrast: float) -> Tensor:
    """Each between 0 and m_j, 0 for a key that is not seen, in place."""
    if tile.counts is None:
        weights.clamp_(0, 1)
    else:
        torch.minimum(weights.clamp_(min=0), tile.counts, out=weights)
    return weights if tile.seen is None or contrast >= 1 else weights.masked_fill_(~tile.seen, 0)


def _multiplicity(tile: _Tile) -> Tensor:
    """m_j, [H, 1, U] or one number."""
    return tile.key.new_ones(()) if tile.counts is None else tile.counts


def _add_batch_row(
    target: Tensor, added: Tensor, b: int, batch_index: Tensor | None, kept: Tensor | None
) -> None:
    """Add [H, U, D] to the row of `target` [B_s, H, N_k, D] that query row b reads."""
    if batch_index is not None and not on_host(target):
        target.index_add_(0, batch_index[b : b + 1], added.unsqueeze(0))
        return
    row = batch_row(target, b, batch_index)
    if kept is None:
        row.add_(added)
    else:
        row.index_add_(1, kept, added)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum, in the place of the first."""
    total = tensors[0]
    for x in tensors[1:]:
        total = total.add_(x)
    return total
