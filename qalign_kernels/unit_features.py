"""Features of length 1, whose dot product is the cosine similarity."""

import math

import torch
from torch import Tensor

from . import _backends, _library
from .segments import Guide


def unit(x: Tensor) -> Tensor:
    """Compute x / max(|x|, 1e-12) along the last axis, in float32 or float64, rounded to the input dtype."""
    return _wide_unit(x).to(x.dtype)


def _wide_unit(x: Tensor) -> Tensor:
    """The unit vectors in float32 or float64. Where x is not finite, its gradient is 0 if the incoming is."""
    wide = x.to(_library.accumulate_dtype(x))
    if not _library.wants_gradient(x):
        return _normalize(wide)
    finite = wide.isfinite().all(-1, keepdim=True)
    lost = _normalize(wide.detach()) + 0 * wide
    return torch.where(finite, _normalize(wide.masked_fill(~finite, 0)), lost)


def _normalize(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1, eps=1e-12)


def alignment(
    query: Tensor, ref_query: Tensor, similarity: str, strength: float, backend: str | None
) -> Guide:
    """Compute features whose per-head dot product, times a strength, is that of the similarity.

    With a gradient, unit vectors have the length of typical features, about √D: the gradient of such a vector
    is as large as that of the feature, and overflows no sooner. The length is a power of 2, which changes no
    bit of the similarity.
    """
    if similarity == "dot":
        return Guide(query, ref_query, strength)
    if not _library.wants_gradient(query, ref_query):
        features, ref_features = _unit_features_op(query, ref_query, _backends.requested(backend))
        return Guide(features, ref_features, strength)
    length = 2.0 ** round(math.log2(int(query.shape[3])) / 2)
    features, ref_features = ((_wide_unit(x) * length).to(x.dtype) for x in (query, ref_query))
    return Guide(features, ref_features, strength / length**2)


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
