"""label_mass and mean_attention_map on Triton. B batch rows, H heads, N_Q queries, N_K keys, D channels.

`label_mass` is attention over values that say to which class a key belongs.

`mean_attention_map`, for one tile of the result:

1. A first launch writes the log2-sum-exp of every query and head.
2. The kernel walks over the heads: it multiplies a tile of queries and a tile of keys, makes probabilities of
   the scores by the log2-sum-exp, and adds them.
3. It divides by the number of heads and writes the tile.
"""

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ._attention_choice import AttentionCall
from ._configs import choose_tile
from ._launch import launch, target_of
from ._segments import LOG2_E, segment_arguments
from ._tile import Rows, advance, features, load_parts, split_scores, width
from .attention import launch_attention, log2_sum_exp
from .attention_backward import attention_backward


def label_mass(query, key, key_labels, num_labels, *, scale, counts) -> Tensor:
    """Attention over the indicator of the classes, with unrounded probabilities."""
    interpreted = target_of(query.device) == "interpreter"  # which has no correct bfloat16
    exact = torch.float32 if interpreted else torch.bfloat16
    members = _indicator(key, key_labels, num_labels, exact)
    mass = torch.empty((*query.shape[:3], members.shape[3]), device=query.device, dtype=torch.float32)
    segment = segment_arguments(key, members, scale, counts=counts)
    launch_attention(AttentionCall(query, [segment], mass, exact_weights=True))
    return mass[..., :num_labels].contiguous()


def label_mass_backward(
    grad_mass, mass, query, key, key_labels, num_labels, *, scale, counts, needs
) -> list[Tensor | None]:
    """The gradients of query and key that are needed: those of attention over the indicator."""
    # with 16 classes, threads of the smallest tiles would load one number each
    members = _indicator(key, key_labels, num_labels, query.dtype, least=32)
    absent = members.shape[3] - num_labels
    grad_output, output = pad(grad_mass, (0, absent)).to(query.dtype), pad(mass, (0, absent))
    lse = torch.empty(query.shape[:3], device=query.device, dtype=torch.float32)
    launch_attention(AttentionCall(query, [segment_arguments(key, None, scale, counts=counts)], lse=lse))
    segment = SimpleNamespace(
        key=key, value=members, counts=counts, labels=None, batch_index=None, logit_scale=1.0, logit_shift=0.0
    )
    return attention_backward(
        grad_output,
        None,
        output,
        lse,
        query,
        [segment],
        scale=scale,
        contrast=1.0,
        query_labels=None,
        guide=None,
        needs=[*needs, False],
    )[:2]


def _indicator(
    key: Tensor, key_labels: Tensor, num_labels: int, dtype: torch.dtype, least: int = 16
) -> Tensor:
    """Ones where a key belongs to a class, else zeros: [B, H, N_K, W], W a power of two, at least `least`."""
    width = max(least, triton.next_power_of_2(num_labels))
    members = key_labels.unsqueeze(-1) == torch.arange(width, device=key.device, dtype=torch.int32)
    return members.to(dtype).unsqueeze(1).expand(*key.shape[:3], width)


def mean_attention_map(query, key, *, scale) -> Tensor:
    (batch, heads, tokens, dim), key_tokens = query.shape, key.shape[2]
    lse = log2_sum_exp(query, [segment_arguments(key, None, scale)])
    output = torch.empty((batch, tokens, key_tokens), device=query.device, dtype=torch.float32)
    tile = choose_tile("attention", "map", target_of(query.device), dim, query.dtype, tokens)
    launch(
        mean_attention_map_kernel,
        (triton.cdiv(tokens, tile.block_m) * triton.cdiv(key_tokens, tile.block_n) * batch,),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        query=features(query),
        key=features(key),
        lse_ptr=lse,
        output_ptr=output,
        H=heads,
        N_Q=tokens,
        N_K=key_tokens,
        scale=scale * LOG2_E.value,
        WIDTH=width(dim),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
    )
    return output


@triton.jit
def mean_attention_map_kernel(
    query, key, lse_ptr, output_ptr, H, N_Q, N_K, scale, WIDTH, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One tile of the result: the sum over all heads, in order."""
    key_blocks = tl.cdiv(N_K, BLOCK_N)
    row = tl.program_id(0) // key_blocks
    blocks = tl.cdiv(N_Q, BLOCK_M)
    batch = (row // blocks).to(tl.int64)
    queries = (row % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = (tl.program_id(0) % key_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, present = queries < N_Q, keys < N_K
    query_tokens, key_tokens = queries.to(tl.int64), keys.to(tl.int64)
    query_ptr = advance(query.pointer, batch * query.pitch_b)
    key_ptr = advance(key.pointer, batch * key.pitch_b)
    lse_ptr += batch * H * N_Q
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.range(0, H):
        query_rows = Rows(query_ptr, query.pitch_n, query.stride_d)
        key_rows = Rows(key_ptr, key.pitch_n, key.stride_d)
        tile = load_parts(query_rows, query_tokens, inside, WIDTH, True)
        scores = split_scores(tile, key_rows, key_tokens, present, WIDTH, True)
        lse = tl.load(lse_ptr + queries, mask=inside, other=0.0)
        total += tl.math.exp2(tl.fma(scores, scale, -lse[:, None]))
        query_ptr = advance(query_ptr, query.pitch_h)
        key_ptr = advance(key_ptr, key.pitch_h)
        lse_ptr += N_Q
    output_ptrs = output_ptr + (batch * N_Q + query_tokens)[:, None] * N_K + key_tokens[None, :]
    tl.store(output_ptrs, total / H, mask=inside[:, None] & present[None, :])
