"""Adaptive instance normalisation (AdaIN): of latents, with or without masks, and of attention tokens."""

import torch
from torch import Tensor


def adain(
    content: Tensor,
    style: Tensor,
    *,
    content_mask: Tensor | None = None,
    style_mask: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Give the content's channels the mean and standard deviation of the style's channels.

    (x - mean(x)) / √(var(x) + eps) · √(var(y) + eps) + mean(y), per row and channel over space. The variance
    is unbiased. With masks, the statistics are taken inside the masks, and the content changes only inside
    its own mask. A row with fewer than two positions in one of its masks has no variance, and stays as it is.

    >>> import torch
    >>> from qalign.context.adain import adain
    >>> content, style = torch.randn(2, 4, 16, 16), torch.randn(1, 4, 32, 32) + 5
    >>> adain(content, style).shape
    torch.Size([2, 4, 16, 16])

    Args:
        content: x [B, C, h, w].
        style: y [B or 1, C, h', w'].
        content_mask, style_mask: bool [B or 1, h, w] and [B or 1, h', w']. None is the whole picture.
        eps: added to both variances.

    Returns:
        [B, C, h, w] in the content's dtype, computed in float32 or better.

    Raises:
        ValueError: shapes or dtypes that do not fit together.

    Source: Cross-Image attention, arXiv 2311.03335.
    """
    if (
        content.ndim != 4
        or style.ndim != 4
        or style.shape[0] not in (1, len(content))
        or style.shape[1] != content.shape[1]
    ):
        expected = f"[{len(content)} or 1, C, h, w] with the channels of content {list(content.shape)}"
        raise ValueError(f"style: expected {expected}, got {list(style.shape)}")
    inside, model = _mask(content_mask, "content_mask", content), _mask(style_mask, "style_mask", style)
    dtype = torch.promote_types(content.dtype, torch.float32)
    mean, deviation, defined = _statistics(content.to(dtype), inside, eps)
    style_mean, style_deviation, style_defined = _statistics(style.to(dtype), model, eps)
    normalised = (content.to(dtype) - mean) / deviation * style_deviation + style_mean
    return torch.where(inside & defined & style_defined, normalised.to(content.dtype), content)


def token_adain(x: Tensor, reference: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Give each head's channels the mean and standard deviation that they have over the reference's tokens.

    (x - mean(x)) / √(var(x) + eps) · √(var(y) + eps) + mean(y), per row, head and channel over tokens. The
    variance is unbiased. A single token has no variance: x then stays as it is.

    >>> import torch
    >>> from qalign.context.adain import token_adain
    >>> token_adain(torch.randn(1, 2, 16, 8), torch.randn(1, 2, 64, 8)).shape
    torch.Size([1, 2, 16, 8])

    Args:
        x: [B, H, N, D].
        reference: y [B, H, N', D].
        eps: added to both variances.

    Returns:
        [B, H, N, D] in the dtype of x, computed in float32 or better, with x's order in memory.

    Source: StyleAligned, arXiv 2312.02133.
    """
    if x.shape[-2] < 2 or reference.shape[-2] < 2:
        return x
    dtype = torch.promote_types(x.dtype, torch.float32)
    (variance, mean), (style_variance, style_mean) = (
        torch.var_mean(each.to(dtype), dim=-2, keepdim=True) for each in (x, reference)
    )
    return ((x.to(dtype) - mean) * ((style_variance + eps) / (variance + eps)).sqrt() + style_mean).to(
        x.dtype
    )


def _mask(mask: Tensor | None, name: str, picture: Tensor) -> Tensor:
    """Return the mask as bool [B or 1, 1, h, w]."""
    if mask is None:
        return torch.ones(1, 1, *picture.shape[-2:], dtype=torch.bool, device=picture.device)
    rows, space = len(picture), list(picture.shape[-2:])
    if (
        mask.dtype != torch.bool
        or mask.ndim != 3
        or mask.shape[0] not in (1, rows)
        or list(mask.shape[1:]) != space
    ):
        expected = f"bool [{rows} or 1, {space[0]}, {space[1]}]"
        raise ValueError(f"{name}: expected {expected}, got {mask.dtype} {list(mask.shape)}")
    return mask.unsqueeze(1)


def _statistics(picture: Tensor, mask: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and deviation [B, C, 1, 1] inside the mask, and bool [B or 1, 1, 1, 1]: they exist."""
    space = (-2, -1)
    count = mask.sum(space, keepdim=True)
    mean = torch.where(mask, picture, 0).sum(space, keepdim=True) / count.clamp(min=1)
    variance = torch.where(mask, picture - mean, 0).square().sum(space, keepdim=True) / (count - 1).clamp(
        min=1
    )
    return mean, (variance + eps).sqrt(), count > 1
