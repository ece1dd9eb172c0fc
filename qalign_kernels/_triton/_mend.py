"""Rows that a hidden NaN or infinity reached, computed again.

Labels and counts hide keys from queries. Tiles are multiplied as a whole, so that a weight of 0 meets hidden
numbers, and 0 times NaN is NaN. After a launch with labels or counts, the kernels of `_mend_kernels.py` look
at its result once, and write the rows anew that are not finite.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor

from ._attention_choice import AttentionCall
from ._gradient_rows import QuerySide
from ._key_gradient import count_arguments
from ._launch import launch
from ._mend_kernels import Hidden, mend_key_gradient_kernel, mend_output_kernel, mend_query_gradient_kernel
from ._segments import (
    LOG2_E,
    query_arguments,
    segment_arguments,
)
from ._tile import (
    features,
    width,
)

NARROW = {"BLOCK_M": 32, "num_warps": 4}
WIDE = {"BLOCK_M": 4, "num_warps": 2}  # no spills, and no load of single numbers


class Given(NamedTuple):
    """A segment as a caller gives it."""

    key: Tensor
    value: Tensor
    counts: Tensor | None
    labels: Tensor | None
    batch_index: Tensor | None
    logit_shift: float = 0.0


def mend_output(call: AttentionCall, segments: Sequence[Any], scales: Sequence[float]) -> None:
    """Compute rows of the output of a call, or of its distances, again where they are not finite.

    `segments` are those of the call as they were given.
    """
    (batch, heads, tokens, dim), output, guide = call.query.shape, call.output, call.guide
    tile = _tile(dim, call.value_dim)
    assert output is not None  # a call that only sums exponentials has no rows to mend
    launch(
        mend_output_kernel,
        (triton.cdiv(tokens, tile["BLOCK_M"]) * batch * heads,),
        num_stages=1,
        **query_arguments(call.query, call.query_labels),
        guide_query=None if guide is None else features(guide.query),
        guide_strength=0.0 if guide is None else guide.strength * LOG2_E.value,
        hidden=_hidden(segments, scales, guide),
        output_ptr=output if call.distance is None else None,
        contrast=call.contrast,
        match_ptr=call.match,
        match_maps=1 if call.match is None else call.match.shape[1],
        output=features(output),
        distance_ptr=call.distance,
        signs_ptr=call.signs,
        SEGMENTS=len(segments),
        CONTRAST=call.contrast != 1.0,
        KEY_WIDTH=width(dim),
        VALUE_WIDTH=width(call.value_dim),
        **tile,
    )


def mend_query_gradient(
    queries: QuerySide, segments: Sequence[Any], scales: Sequence[float], grad_query: Tensor
) -> None:
    batch, heads, tokens, dim = queries.query.shape
    tile = _tile(dim, queries.grad_output.shape[3])
    launch(
        mend_query_gradient_kernel,
        (triton.cdiv(tokens, tile["BLOCK_M"]) * batch * heads,),
        num_stages=1,
        **queries.arguments(),
        hidden=_hidden(segments, scales),
        scales=tuple(scales),
        grad_query=features(grad_query),
        grad_query_ptr=grad_query,
        SEGMENTS=len(segments),
        KEY_WIDTH=width(dim),
        VALUE_WIDTH=width(queries.grad_output.shape[3]),
        **tile,
    )


def mend_key_gradient(
    queries: QuerySide, segment: Any, scale: float, grad_key: Tensor | None, grad_value: Tensor | None
) -> None:
    (batch, heads, _, dim), (rows, _, keys, _) = queries.query.shape, segment.key.shape
    tile = _tile(dim, queries.grad_output.shape[3])
    launch(
        mend_key_gradient_kernel,
        (triton.cdiv(keys, tile["BLOCK_M"]) * rows * heads,),
        num_stages=1,
        **queries.arguments(),
        hidden=_hidden([segment], [scale])[0],
        grad_key=None if grad_key is None else features(grad_key),
        grad_key_ptr=grad_key,
        grad_value=None if grad_value is None else features(grad_value),
        grad_value_ptr=grad_value,
        grad_scale=scale,
        B=batch,
        KEY_WIDTH=width(dim),
        VALUE_WIDTH=width(queries.grad_output.shape[3]),
        **tile,
    )


def _tile(*dims: int) -> dict[str, int]:
    return WIDE if max(dims) >= 128 else NARROW


def _hidden(segments: Sequence[Any], scales: Sequence[float], guide: Any = None) -> tuple[Hidden, ...]:
    guide_key = None if guide is None else guide.key
    return tuple(
        Hidden(
            segment_arguments(s.key, s.value, scale, s.logit_shift, None, s.labels, s.batch_index, guide_key),
            count_arguments(s.counts),
        )
        for s, scale in zip(segments, scales)
    )
