"""distillation_loss by tiles of query rows. Only one tile of the ideal output is held at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._blocks import accumulate_dtype, blocks
from .attention import attention


def distillation_loss(
    output: Tensor,
    query: Tensor,
    segments: Sequence[Any],
    *,
    scale: float,
    query_labels: Tensor | None,
    need_signs: bool,
) -> tuple[Tensor, Tensor | None]:
    dtype = accumulate_dtype(output)
    signs = torch.empty(output.shape, dtype=torch.int8, device=output.device) if need_signs else None
    bytes_per_row = 6 * dtype.itemsize * output.shape[0] * output.shape[1] * output.shape[3]
    sums = []
    for _, rows in blocks(1, output.shape[2], bytes_per_row, output.device):
        labels = None if query_labels is None else query_labels[:, rows]
        ideal, _ = attention(
            query[:, :, rows],
            segments,
            scale=scale,
            contrast=1.0,
            query_labels=labels,
            guide=None,
            need_lse=False,
        )
        difference = ideal.to(dtype)
        torch.sub(output[:, :, rows].to(dtype), difference, out=difference)
        if signs is not None:
            torch.sub((difference > 0).to(torch.int8), (difference < 0).to(torch.int8), out=signs[:, :, rows])
        sums.append(difference.abs_().sum())
    return torch.stack(sums).sum() / output.numel(), signs
