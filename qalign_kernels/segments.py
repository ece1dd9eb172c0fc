"""Segments of keys and values, which attention reads as if they were concatenated."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from . import _contracts


@dataclass(frozen=True, eq=False)
class Segment:
    """Keys and values to attend to, with optional counts, labels, scale and shift.

    Attributes:
        key: [B_s, H, N_k, D], any strides. B_s = B of the query unless `batch_index` is given.
        value: [B_s, H, N_k, D_v], any strides.
        counts: int32 [B, 1 or H, N_k], the multiplicity of each key for each query row. A key with a count
            below 1 is absent. None: every key counts once.
        labels: int32 bit sets [B or 1, N_k]. A query sees a key only if their sets share a bit. None: every
            query sees every key.
        logit_scale: factor of the logits; 1.0 leaves them unchanged.
        logit_shift: added to the logits; 0.0 adds nothing. A shift of ln r acts like r copies of each key.
        batch_index: int32 [B], the row of `key` and `value` that each query row reads, without a copy; the
            nearest row if it is out of range. None: its own row.

    Example:
        >>> from qalign_kernels import Segment, attention
        >>> query, (key, value) = torch.randn(3, 8, 256, 40), torch.randn(2, 1, 8, 64, 40)
        >>> rows = torch.zeros(3, dtype=torch.int32)  # all three query rows read the one reference
        >>> attention(query, Segment(key, value, batch_index=rows)).shape
        torch.Size([3, 8, 256, 40])
    """

    key: Tensor
    value: Tensor
    counts: Tensor | None = field(default=None, kw_only=True)
    labels: Tensor | None = field(default=None, kw_only=True)
    logit_scale: float = field(default=1.0, kw_only=True)
    logit_shift: float = field(default=0.0, kw_only=True)
    batch_index: Tensor | None = field(default=None, kw_only=True)


class Guide(NamedTuple):
    """A second dot product that is added to the logits of a single segment: strength · query_i·key_j.

    `query` is [B, H, N_q, D_g] and `key` is [B_s, H, N_k, D_g].
    """

    query: Tensor
    key: Tensor
    strength: float


def checked_segments(
    query: Tensor, segments: Sequence[Segment], query_labels: Tensor | None, scale: float
) -> tuple[Segment, ...]:
    """Check the segments of a call and the labels of its query. The numbers of a result are floats."""
    batch, _, tokens, _ = query.shape
    if not segments:
        raise ValueError("segments: expected at least one Segment, got none")
    if query_labels is not None:
        _contracts.check_token_labels("query_labels", query_labels, batch, tokens, "N_q", query.device)
    checked = []
    for position, segment in enumerate(segments):
        if not isinstance(segment, Segment):
            _contracts.fail("segments", "Segment objects", segment, error=TypeError)
        name = "" if len(segments) == 1 else f"segments[{position}]."
        _check_segment(name, segment, query)
        if segment.labels is not None:
            _contracts.require_query_labels(query_labels, f"{name}labels", batch, tokens)
        _contracts.check_sizes(f"{name}value", segment.value, head_dim=segments[0].value.shape[3])
        checked.append(_with_floats(name, segment, scale))
    return tuple(checked)


def _check_segment(name: str, segment: Segment, query: Tensor) -> None:
    key, value = segment.key, segment.value
    for part, tensor in (("key", key), ("value", value)):
        _contracts.check_features(name + part, tensor)
        _contracts.check_like(name + part, tensor, "query", query)
    _contracts.check_sizes(f"{name}key", key, heads=query.shape[1], head_dim=query.shape[3])
    _contracts.check_sizes(
        f"{name}value", value, batch=key.shape[0], heads=query.shape[1], tokens=key.shape[2]
    )
    _contracts.check_batch_index(f"{name}batch_index", segment.batch_index, query, key.shape[0], f"{name}key")
    if segment.counts is not None:
        _contracts.check_counts(
            f"{name}counts", segment.counts, query.shape[0], query.shape[1], key.shape[2], query.device
        )
    if segment.labels is not None:
        _contracts.check_token_labels(
            f"{name}labels", segment.labels, query.shape[0], key.shape[2], "N_k", query.device
        )


def _with_floats(name: str, segment: Segment, scale: float) -> Segment:
    """The segment with checked numbers, itself where they are floats."""
    logit_scale = _contracts.number(f"{name}logit_scale", segment.logit_scale)
    logit_shift = _contracts.number(f"{name}logit_shift", segment.logit_shift)
    if not -_contracts.LARGEST_NUMBER <= logit_scale * scale <= _contracts.LARGEST_NUMBER:
        _contracts.fail(
            f"{name}logit_scale", f"a number that times scale={scale} is at most 2^127", logit_scale
        )
    if logit_scale is segment.logit_scale and logit_shift is segment.logit_shift:
        return segment
    return replace(segment, logit_scale=logit_scale, logit_shift=logit_shift)
