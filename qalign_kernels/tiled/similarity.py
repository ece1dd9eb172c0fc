"""similarity_argmax and similarity_topk by blocks of query rows.

1. On the CPU, queries that see the same reference tokens go together.
2. One matrix product gives the scores of a block, [reference tokens, query rows]: every reduction runs over
   contiguous rows.
3. The scores are reduced to the maximum of each window of WINDOW reference tokens. torch finds a maximum many
   times faster than an argmax.
4. The argmax over the windows, then over the tokens of the best window, gives the best token.
"""

import torch
from torch import Tensor

from ._blocks import accumulate_dtype, batch_row, blocks
from ._labels import group_queries, rows_read
from .rearrange import absent, add_rows, places, tokens_of

WINDOW = 32
MAX_EXTRACTED = 32  # for a larger k, sorting a block is faster than taking its best tokens one by one


def similarity_argmax(
    query: Tensor,
    reference: Tensor,
    similarity: str,
    joint: bool,
    query_labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
    batch_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    index, score = similarity_topk(
        query, reference, 1, similarity, joint, query_labels, reference_labels, batch_index
    )
    return index.squeeze(-1), score.squeeze(-1)


def similarity_topk(
    query: Tensor,
    reference: Tensor,
    k: int,
    similarity: str,
    joint: bool,
    query_labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
    batch_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    groups = group_queries(query_labels, [reference_labels], query.shape[0])
    if groups is None:
        return _topk(query, reference, k, similarity, joint, query_labels, reference_labels, batch_index)
    shape = (query.shape[0], 1 if joint else query.shape[1], query.shape[2], k)
    index = query.new_full(shape, -1, dtype=torch.int32)
    score = query.new_full(shape, float("-inf"), dtype=accumulate_dtype(query))
    for group in groups:
        rows, left = rows_read(group.batch, batch_index)
        kept = group.keys[0]
        seen = reference[rows] if kept is None else reference[rows].index_select(2, kept)
        if seen.shape[2]:
            few = min(k, seen.shape[2])
            matched, best = _topk(group.of(query), seen, few, similarity, joint, None, None, left)
            if kept is not None:
                matched = torch.where(matched < 0, matched, kept.int()[matched.clamp(min=0).long()])
            index[group.batch, :, :, :few].index_copy_(2, group.queries, matched)
            score[group.batch, :, :, :few].index_copy_(2, group.queries, best)
    return index, score


def _topk(
    query: Tensor,
    reference: Tensor,
    k: int,
    similarity: str,
    joint: bool,
    query_labels: Tensor | None,
    reference_labels: Tensor | None,
    batch_index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, tokens = *query.shape[:3], reference.shape[2]
    groups, padded = 1 if joint else heads, -(-tokens // WINDOW) * WINDOW
    dtype = accumulate_dtype(query)
    index = query.new_empty((batch, groups, queries, k), dtype=torch.int32)
    score = query.new_empty((batch, groups, queries, k), dtype=dtype)
    score_tensors = 1 if k <= MAX_EXTRACTED else 6
    bytes_per_row = padded * dtype.itemsize * (score_tensors + (query_labels is not None))
    tiles = list(blocks(groups, queries, bytes_per_row, query.device))
    columns = max((group.stop - group.start) * (rows.stop - rows.start) for group, rows in tiles)
    # one block's scores, used again for every block: fresh memory costs page faults
    scores = query.new_empty(padded * columns, dtype=dtype)
    for b in range(batch):
        features = query.new_zeros(
            (groups, padded, reference.shape[3] * (heads if joint else 1)), dtype=dtype
        )
        _write_features(features[:, :tokens], batch_row(reference, b, batch_index), similarity, joint)
        for group, rows in tiles:
            part = query[b, :, rows] if joint else query[b, group, rows]
            block = features.new_empty((group.stop - group.start, rows.stop - rows.start, features.shape[2]))
            _write_features(block, part, similarity, joint)
            table = scores[: padded * block.shape[0] * block.shape[1]].view(
                block.shape[0], padded, block.shape[1]
            )
            torch.bmm(features[group], block.mT, out=table)
            table[:, tokens:] = float("-inf")
            if query_labels is not None and reference_labels is not None:
                labels, others = (x[b if x.shape[0] > 1 else 0] for x in (query_labels, reference_labels))
                table[:, :tokens].masked_fill_((others.unsqueeze(1) & labels[rows]) == 0, float("-inf"))
            best = _extract(table, k) if k <= MAX_EXTRACTED else _sort(table, k)
            index[b, group, rows], score[b, group, rows] = best
    return index, score


def _write_features(target: Tensor, source: Tensor, similarity: str, joint: bool) -> None:
    """Write the compared vectors of one batch row [H, N, D].

    `target` is [1, N, H·D] for a joint map, else [H, N, D].
    """
    shaped = target[0].unflatten(-1, (source.shape[0], -1)).transpose(0, 1) if joint else target
    shaped.copy_(source)
    if similarity == "cosine":
        target.div_(torch.linalg.vector_norm(target, dim=-1, keepdim=True).clamp_(min=1e-12))


def _extract(table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best tokens of each column of [G, tokens, rows], the lowest token first among equals.

    A token that was taken is overwritten by -inf.
    """
    windows = table.unflatten(1, (-1, WINDOW))
    peaks = windows.amax(2)
    indices, scores = [], []
    for _ in range(k):
        window = peaks.argmax(1, keepdim=True)
        score = peaks.gather(1, window)
        candidates = windows.gather(1, window.unsqueeze(2).expand(-1, -1, WINDOW, -1)).squeeze(1)
        column = candidates.argmax(1, keepdim=True)
        index = window * WINDOW + column
        indices.append(index.masked_fill(score == float("-inf"), -1))
        scores.append(score)
        if len(scores) < k:
            table.scatter_(1, index, float("-inf"))
            peaks.scatter_(1, window, candidates.scatter_(1, column, float("-inf")).amax(1, keepdim=True))
    return torch.cat(indices, 1).mT.int(), torch.cat(scores, 1).mT


def _sort(table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    score, index = table.mT.contiguous().sort(dim=-1, descending=True, stable=True)
    score, index = score[..., :k], index[..., :k]
    return index.masked_fill(score == float("-inf"), -1).int(), score


def matched_score_backward(
    grad_score: Tensor,
    query: Tensor,
    reference: Tensor,
    index: Tensor,
    similarity: str,
    batch_index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of query and reference, from those of the scores of the matched pairs.

    dq̂_i = Σ_t g_it r̂_π(it) and dr̂_j = Σ_{π(it) = j} g_it q̂_i. For "cosine", x̂ = x / |x| and
    dx = (dx̂ - x̂ (x̂·dx̂)) / |x|.
    """
    dtype, (batch, heads, tokens, head_dim) = accumulate_dtype(query), query.shape
    if index.dim() == 3:
        index, grad_score = index.unsqueeze(-1), grad_score.unsqueeze(-1)
    missing = absent(index, reference.shape[2])
    grad_score = grad_score.to(dtype).masked_fill(missing, 0)
    joint = index.shape[1] < heads or heads == 1
    wide = [_maps(x.to(dtype), joint) for x in (query, reference)]
    lengths = [_length(x) if similarity == "cosine" else None for x in wide]
    unit = [x if length is None else x / length for x, length in zip(wide, lengths)]
    grads = [torch.zeros_like(x) for x in unit]
    bytes_per_row = 2 * dtype.itemsize * batch * heads * head_dim * index.shape[3]
    for _, rows in blocks(1, tokens, bytes_per_row, query.device):
        some, weight = index[:, :, rows], grad_score[:, :, rows].unsqueeze(-1)
        batch_rows, maps = places(unit[1], some, batch_index)
        matched = unit[1][batch_rows, maps, tokens_of(some, reference.shape[2])]
        matched.masked_fill_(missing[:, :, rows].unsqueeze(-1), 0)
        grads[0][:, :, rows] = (weight * matched).sum(3)
        add_rows(grads[1], some, weight * unit[0][:, :, rows].unsqueeze(3), batch_index)
    grad_query, grad_reference = (
        _unmapped(_of_vector(grad, x, length), joint, heads).to(query.dtype)
        for grad, x, length in zip(grads, unit, lengths)
    )
    return grad_query, grad_reference


def _of_vector(grad: Tensor, unit: Tensor, length: Tensor | None) -> Tensor:
    """The gradient of a vector, from that of its unit vector; None: it was compared as it is.

    Where no query was matched with a vector, it is 0, even of one that is not finite.
    """
    if length is None:
        return grad
    found = (grad - unit * (unit * grad).sum(-1, keepdim=True)) / length
    return found.masked_fill((grad == 0).all(-1, keepdim=True), 0)


def _maps(x: Tensor, joint: bool) -> Tensor:
    """[B, G, N, C]: the vectors that one map compares."""
    return x.transpose(1, 2).flatten(2).unsqueeze(1) if joint else x


def _unmapped(x: Tensor, joint: bool, heads: int) -> Tensor:
    """[B, H, N, D] again."""
    return x.squeeze(1).unflatten(2, (heads, -1)).transpose(1, 2).contiguous() if joint else x


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=1e-12)
