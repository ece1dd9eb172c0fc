"""distillation_loss as its formula reads."""

import torch
from torch import Tensor

from .attention import attention


def distillation_loss(output, query, segments, *, scale, query_labels=None) -> Tensor:
    accumulate = torch.float64 if output.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        ideal, _ = attention(query, segments, scale=scale, query_labels=query_labels)
    return (output.to(accumulate) - ideal.detach().to(accumulate)).abs().mean()
