"""Losses on features of the denoiser that make tokens of one part alike."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .networks import PART_SCALE

NEIGHBOURS = 48  # tokens drawn from each picture of a batch, as many of each part


def neighbours_loss(features: Tensor, labels: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Loss of neighbourhood components analysis: near tokens of other pictures should show the same part.

    Each token has a softmax over the cosines with tokens of the other pictures. The loss is the mean of
    -log of the share that falls on tokens of its own part. A match between pictures is a nearest neighbour,
    and predicting the part from the direction of a feature does not make neighbours alike.

    Args:
        features: [B, N, C].
        labels: int64 [B, N], the part of each token.
        weight: [parts], how often a part is drawn relative to others.
        generator: draws the `NEIGHBOURS` tokens of each picture.
    """
    size = torch.zeros(len(labels), len(weight), device=labels.device).scatter_add(
        1, labels, torch.ones_like(labels, dtype=torch.float32)
    )
    drawn = torch.multinomial(weight[labels] / size.gather(1, labels), NEIGHBOURS, generator=generator)
    directions = F.normalize(
        features.float().gather(1, drawn.unsqueeze(-1).expand(-1, -1, features.shape[2])), dim=-1
    ).flatten(0, 1)
    part = labels.gather(1, drawn).flatten()
    picture = torch.arange(len(labels), device=labels.device).repeat_interleave(NEIGHBOURS)
    elsewhere = picture[:, None] != picture
    same = elsewhere & (part[:, None] == part)
    logits = (PART_SCALE * directions @ directions.T).masked_fill(~elsewhere, -math.inf)
    found = same.any(1)
    surprise = logits[found].logsumexp(1) - logits[found].masked_fill(~same[found], -math.inf).logsumexp(1)
    return surprise.sum() / found.sum().clamp(min=1)


def labels_at(labels: Tensor, tokens: int) -> Tensor:
    """Labels [B, 1024] on a coarser grid: each token takes the label in the middle of its cell."""
    side, fine = math.isqrt(tokens), math.isqrt(labels.shape[1])
    stride = fine // side
    return labels.view(-1, fine, fine)[:, stride // 2 :: stride, stride // 2 :: stride].flatten(1)
