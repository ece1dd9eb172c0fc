"""distillation_loss on Triton: the attention kernel compares its result with an output.

It does not write its own output.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._attention_choice import AttentionCall
from ._labels import sort_queries
from ._mend import mend_output
from ._segments import segment_arguments
from .attention import launch_attention


def distillation_loss(
    output: Tensor,
    query: Tensor,
    segments: Sequence[Any],
    *,
    scale: float,
    query_labels: Tensor | None,
    need_signs: bool,
) -> tuple[Tensor, Tensor | None]:
    distance = torch.empty(query.shape[:3], device=query.device, dtype=torch.float32)
    signs = torch.empty(output.shape, device=query.device, dtype=torch.int8) if need_signs else None
    query_order = sort_queries(query_labels, [s.labels for s in segments])
    arguments = [
        segment_arguments(s.key, s.value, scale, labels=s.labels, by_label=query_order is not None)
        for s in segments
    ]
    labels: dict[str, Any] = {"query_labels": query_labels, "query_order": query_order}
    call = AttentionCall(query, arguments, output, distance=distance, signs=signs, **labels)
    launch_attention(call)
    if any(s.labels is not None for s in segments):
        mend_output(call, segments, [scale] * len(segments))
    return distance.mean(), signs
