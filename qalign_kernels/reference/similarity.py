"""similarity_argmax and similarity_topk as their formulas read.

1. The matrix of scores, N_q×N_k; -inf where labels do not meet.
2. Its largest entries in each row, the lowest index first among equals.
"""

import torch
from torch import Tensor

from ._product import pairs
from .attention import batch_rows


def scores(
    query: Tensor,
    reference: Tensor,
    similarity: str,
    joint: bool,
    query_labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
    batch_index: Tensor | None = None,
) -> Tensor:
    """S [B, 1 or H, N_q, N_k], float32 (float64 for float64 input); -inf where the labels do not meet."""
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, reference = query.to(accumulate), reference.to(accumulate)
    reference = reference[batch_rows(batch_index, reference)]
    if joint:
        query, reference = (x.transpose(1, 2).flatten(2).unsqueeze(1) for x in (query, reference))
    if similarity == "cosine":
        query, reference = unit(query), unit(reference)
    if query_labels is None or reference_labels is None:
        return pairs(query, reference)
    admissible = ((query_labels.unsqueeze(-1) & reference_labels.unsqueeze(-2)) != 0).unsqueeze(1)
    admissible = admissible.expand(*query.shape[:3], reference.shape[2])
    return pairs(query, reference, admissible).masked_fill(~admissible, float("-inf"))


def unit(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12). Where x is not finite, its gradient is 0 if the incoming one is."""
    vectors = x.masked_fill(~x.isfinite().all(-1, keepdim=True), 0)
    found = torch.nn.functional.normalize(vectors, dim=-1, eps=1e-12)
    lost = torch.nn.functional.normalize(x.detach(), dim=-1, eps=1e-12) + 0 * x
    return torch.where(x.isfinite().all(-1, keepdim=True), found, lost)


def similarity_argmax(
    query, reference, similarity, joint, query_labels=None, reference_labels=None, batch_index=None
) -> tuple[Tensor, Tensor]:
    table = scores(query, reference, similarity, joint, query_labels, reference_labels, batch_index)
    best = table.detach().amax(-1)
    # torch.max does not say which index it returns for ties: take the lowest; a row with NaN takes its first
    columns = torch.arange(table.shape[-1], device=table.device)
    chosen = (table == best.unsqueeze(-1)) | (table.isnan() & best.isnan().unsqueeze(-1))
    index = torch.where(chosen, columns, table.shape[-1]).amin(-1)
    score = table.gather(-1, index.unsqueeze(-1)).squeeze(-1)  # its gradient goes to one token, ties or not
    return index.masked_fill(best == float("-inf"), -1).int(), score


def similarity_topk(
    query, reference, k, similarity, joint, query_labels=None, reference_labels=None, batch_index=None
) -> tuple[Tensor, Tensor]:
    table = scores(query, reference, similarity, joint, query_labels, reference_labels, batch_index)
    score, index = table.sort(dim=-1, descending=True, stable=True)
    score, index = score[..., :k], index[..., :k]
    return index.masked_fill(score == float("-inf"), -1).int(), score
