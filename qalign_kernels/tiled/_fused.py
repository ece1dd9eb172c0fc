"""Attention of one segment by torch's fused attention, which never holds the scores.

With counts, each batch row goes alone:

1. Take the keys and values that a head counts at least once. Heads that count fewer keys than others get
   zeros of weight zero as well.
2. Pass the logarithms of the counts as an additive mask.
3. Set the output of heads without any key to zero.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ._blocks import accumulate_dtype, batch_row, on_host

_FLASH_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
FEW_KEYS = 16  # below a vector register of keys, torch loses the NaN of a query unless there is a mask
_SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def fused_serves(query: Tensor, segment: Any) -> bool:
    """Whether torch's fused attention computes this segment without holding its scores."""
    if segment.labels is not None or segment.key.shape[3] != segment.value.shape[3]:
        return False
    if on_host(query):
        return True
    return query.device.type == "cuda" and segment.counts is None and query.dtype != torch.float64


def has_lse(query: Tensor) -> bool:
    """Whether torch's fused attention gives a log-sum-exp that is precise enough.

    In half precision it is good to four digits only.
    """
    return on_host(query) and query.dtype in (torch.float32, torch.float64)


class FusedRow(NamedTuple):
    """What one batch row reads of a segment with counts or a batch index.

    U is the largest number of counted keys of a head.
    """

    key: Tensor  # [H, U, D]
    value: Tensor  # [H, U, D]
    mask: Tensor | None  # log-counts [1, 1 or H, 1, U]; None: each key once
    kept: Tensor | None  # [1 or H, U], the tokens taken of the segment; None: all, in order
    empty: Tensor  # [1 or H, 1, 1], whether a head has no key at all

    def of(self, heads: slice) -> "FusedRow":
        """The row with some of its heads only."""
        mask = self.mask if self.mask is None or self.mask.shape[1] == 1 else self.mask[:, heads]
        kept = self.kept if self.kept is None or self.kept.shape[0] == 1 else self.kept[heads]
        empty = self.empty if self.empty.shape[0] == 1 else self.empty[heads]
        return FusedRow(self.key[heads], self.value[heads], mask, kept, empty)


def fused(query: Tensor, segment: Any, scale: float, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    query, key, value = (_dense(x) for x in (query, segment.key, segment.value))
    if segment.counts is None and segment.batch_index is None:
        output, lse = _sdpa(query, key, value, None, scale)
        lse = lse.add(segment.logit_shift).contiguous() if need_lse and lse is not None else None
        return output.contiguous(), lse
    output = query.new_zeros(query.shape)
    lse = query.new_full(query.shape[:3], float("-inf"), dtype=accumulate_dtype(query)) if need_lse else None
    for b in range(query.shape[0]):
        row = _fused_row(key, value, segment, b)
        if row.key.shape[1] == 0:
            continue
        row_output, row_lse = _sdpa(
            query[b : b + 1], row.key.unsqueeze(0), row.value.unsqueeze(0), row.mask, scale
        )
        output[b] = row_output[0].masked_fill_(row.empty, 0)
        if lse is not None and row_lse is not None:
            lse[b] = (row_lse[0] + segment.logit_shift).masked_fill_(row.empty.squeeze(-1), float("-inf"))
    return output, lse


def fused_backward(
    grad_output: Tensor, output: Any, lse: Tensor, query: Tensor, segment: Any, scale: float
) -> list[Tensor]:
    """The gradients of query, key and value.

    A few heads are computed at a time, because torch returns the gradients in a layout of its own.
    """
    lse, grad_output = lse - segment.logit_shift, _dense(grad_output)
    query, key, value = (_dense(x) for x in (query, segment.key, segment.value))
    grad_query, grad_key, grad_value = (x.new_zeros(x.shape) for x in (query, key, value))
    step = torch.get_num_threads()
    for b in range(query.shape[0]):
        whole = _fused_row(key, value, segment, b)
        if whole.key.shape[1] == 0:
            continue
        for heads in (slice(first, first + step) for first in range(0, query.shape[1], step)):
            row = whole.of(heads)
            where = slice(b, b + 1), heads
            parts = _sdpa_backward(grad_output[where], query[where], output[where], lse[where], row, scale)
            grad_query[b, heads] = parts[0][0].masked_fill_(row.empty, 0)
            grads = [_of_present(x[0], row) for x in parts[1:]]
            for total, grad in zip((grad_key, grad_value), grads):
                target = batch_row(total, b, segment.batch_index)[heads]
                if row.kept is None:
                    target += grad
                else:
                    target.scatter_add_(1, row.kept.unsqueeze(-1).expand_as(grad), grad)
    return [grad_query, grad_key, grad_value]


def _of_present(grad: Tensor, row: FusedRow) -> Tensor:
    """The gradient of keys or values [H, U, D], 0 for those that a head does not count."""
    absent = row.empty if row.mask is None else row.empty | (row.mask[0] == float("-inf")).mT
    return grad.masked_fill_(absent, 0)


def _dense(x: Tensor) -> Tensor:
    """`x` with its channels next to each other, copied only if they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sdpa(query, key, value, mask, scale: float) -> tuple[Tensor, Tensor | None]:
    """Output, and on the CPU the log-sum-exp. The caller's choice of SDPA backends stays outside."""
    if on_host(query):
        if mask is None and key.shape[2] < FEW_KEYS:
            mask = query.new_zeros(1, 1, 1, key.shape[2])
        return _FLASH_ON_CPU(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
    with sdpa_kernel(_SDPA_BACKENDS):
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale), None


def _sdpa_backward(
    grad_output, query, output, lse, row: "FusedRow", scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    key, value = row.key.unsqueeze(0), row.value.unsqueeze(0)
    return backward(grad_output, query, key, value, output, lse, 0.0, False, attn_mask=row.mask, scale=scale)


def _fused_row(key: Tensor, value: Tensor, segment: Any, b: int) -> FusedRow:
    """The keys and values of one batch row; U is read on the host."""
    key, value = (batch_row(x, b, segment.batch_index) for x in (key, value))
    if segment.counts is None:
        return FusedRow(key, value, None, None, torch.zeros((1, 1, 1), dtype=torch.bool, device=key.device))
    counts = segment.counts[b].clamp(min=0)
    used, empty = int((counts != 0).sum(-1).max()), (counts == 0).all(-1)[:, None, None]
    kept = None
    if used < key.shape[1]:
        kept = (counts == 0).to(torch.uint8).argsort(dim=-1, stable=True)[:, :used]
        counts = counts.gather(1, kept)
        if kept.shape[0] == 1:
            key, value = (x.index_select(1, kept[0]) for x in (key, value))
        else:
            key, value = (
                torch.stack([x[h].index_select(0, kept[h]) for h in range(x.shape[0])]) for x in (key, value)
            )
    if counts.shape[0] > 1 and bool((counts == 0).any()):
        absent = (counts == 0).unsqueeze(-1)
        key, value = (x.masked_fill(absent, 0) for x in (key, value))
    plain = used == 0 or bool((counts == 1).all())
    return FusedRow(
        key, value, None if plain else counts.to(accumulate_dtype(key)).log_()[None, :, None], kept, empty
    )
