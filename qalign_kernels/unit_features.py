"""Features of length 1, whose dot product is the cosine similarity."""

import torch
from torch import Tensor

from . import _backends, _library


def unit(x: Tensor) -> Tensor:
    """Compute x / max(|x|, 1e-12) along the last axis, in float32 or float64, rounded to the input dtype.

    Where x is not finite, its gradient is 0 if the incoming one is.
    """
    wide = x.to(_library.accumulate_dtype(x))
    if not _library.wants_gradient(x):
        return _normalize(wide).to(x.dtype)
    finite = wide.isfinite().all(-1, keepdim=True)
    lost = _normalize(wide.detach()) + 0 * wide
    return torch.where(finite, _normalize(wide.masked_fill(~finite, 0)), lost).to(x.dtype)


def _normalize(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1, eps=1e-12)


def alignment_features(
    query: Tensor, ref_query: Tensor, similarity: str, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Compute the features whose per-head dot product is the similarity, in the input dtype."""
    if similarity == "dot":
        return query, ref_query
    if _library.wants_gradient(query, ref_query):
        return unit(query), unit(ref_query)
    return _unit_features_op(query, ref_query, _backends.requested(backend))


def _unit_features_implementation(query, ref_query, backend):
    chosen = _backends.select("qalign_attention", backend, query, (query.shape[3],))
    if chosen == "triton":
        return _backends.implementation("triton", "qalign_attention").unit_features(query, ref_query)
    return unit(query).contiguous(), unit(ref_query).contiguous()


def _unit_features_fake(query, ref_query, backend):
    return query.new_empty(query.shape), ref_query.new_empty(ref_query.shape)


_unit_features_op = _library.register(
    "unit_features",
    "(Tensor query, Tensor ref_query, str backend) -> (Tensor, Tensor)",
    _unit_features_implementation,
    _unit_features_fake,
)
