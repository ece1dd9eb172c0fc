"""What both gradients of attention need of each query: its log2-sum-exp, and delta_i = dO_i·O_i - dlse_i.

For a tile of queries:

1. Load the gradient of the output, the output and the log-sum-exp.
2. Write log2 of the sum of the exponentials. A query without keys gets infinity: its probabilities are 0.
3. Write delta, the sum over the channels of gradient times output, minus the gradient of the log-sum-exp.

`QuerySide` holds the result beside the queries, as the launches of both gradients take them.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import Tile, choose_tile
from ._launch import launch, target_of
from ._segments import LOG2_E, query_arguments
from ._tile import features, load_rows, open_tile, rows_of

GRADIENT_ROWS = 32


class QuerySide(NamedTuple):
    """Queries [B, H, N_Q, D], the gradient of their output [B, H, N_Q, D_V], and their saved sums."""

    query: Tensor
    labels: Tensor | None
    grad_output: Tensor
    known: Tensor  # float32 [B, H, N_Q], log2 of the sums of the exponentials
    delta: Tensor  # float32 [B, H, N_Q]

    def arguments(self) -> dict[str, Any]:
        return {
            **query_arguments(self.query, self.labels),
            "grad": features(self.grad_output),
            "known_ptr": self.known,
            "delta_ptr": self.delta,
        }

    def head_dim(self) -> int:
        """The larger one of D and D_V."""
        return max(self.query.shape[3], self.grad_output.shape[3])

    def tile(self, mode: str) -> Tile:
        target, tokens = target_of(self.query.device), self.query.shape[2]
        return choose_tile("attention_backward", mode, target, self.head_dim(), self.query.dtype, tokens)


def query_side(
    query: Tensor,
    labels: Tensor | None,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
) -> QuerySide:
    batch, heads, tokens, value_dim = output.shape
    known, delta = (
        torch.empty((batch, heads, tokens), device=output.device, dtype=torch.float32) for _ in range(2)
    )
    width = triton.next_power_of_2(value_dim)
    launch(
        gradient_rows_kernel,
        (batch * heads * triton.cdiv(tokens, GRADIENT_ROWS),),
        num_warps=max(4, width // 32),
        num_stages=1,
        grad=features(grad_output),
        grad_lse_ptr=grad_lse,
        grad_lse_strides=(0, 0, 0) if grad_lse is None else grad_lse.stride(),
        output_ptr=output,
        lse_ptr=lse,
        known_ptr=known,
        delta_ptr=delta,
        H=heads,
        N_Q=tokens,
        D_V=value_dim,
        WIDTH=width,
        BLOCK=GRADIENT_ROWS,
    )
    return QuerySide(query, labels, grad_output, known, delta)


@triton.jit
def gradient_rows_kernel(
    grad,
    grad_lse_ptr,
    grad_lse_strides,
    output_ptr,
    lse_ptr,
    known_ptr,
    delta_ptr,
    H,
    N_Q,
    D_V: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of queries: their log2-sum-exp and delta."""
    row, batch, head, queries, inside = open_tile(N_Q, H, BLOCK)
    gradient = load_rows(rows_of(grad, batch, head), queries, inside, D_V, 0, WIDTH, True).to(tl.float32)
    channels = tl.arange(0, WIDTH)
    output_ptrs = output_ptr + (row * N_Q + queries)[:, None] * D_V + channels[None, :]
    mask = inside[:, None] & (channels < D_V)[None, :]
    output = tl.load(output_ptrs, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(gradient * output, 1)
    lse = tl.load(lse_ptr + row * N_Q + queries, mask=inside, other=0.0)
    if grad_lse_ptr is not None:
        grad_lse_ptr += batch * grad_lse_strides[0] + head * grad_lse_strides[1]
        delta -= tl.load(grad_lse_ptr + queries * grad_lse_strides[2], mask=inside, other=0.0)
    tl.store(
        known_ptr + row * N_Q + queries,
        tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E),
        mask=inside,
    )
    tl.store(delta_ptr + row * N_Q + queries, delta, mask=inside)
