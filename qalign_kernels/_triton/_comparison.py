"""The distance of an output from the attention that a kernel has computed, in the place of writing it.

`distillation_loss` needs it: the mean of |output - attention| over the channels of each query, and the signs
of the differences, from which the gradient follows.
"""

import triton
import triton.language as tl

from ._tile import load_rows


@triton.jit
def _compare_channels(
    compared, signs_ptrs, ideal, queries, inside, D_V: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr
):
    """Sum |output - ideal| over some channels and write the signs. The ideal is rounded like the output."""
    output = load_rows(compared, queries, inside, D_V, FIRST, WIDTH, True)
    difference = output.to(tl.float32) - ideal.to(output.dtype).to(tl.float32)
    if signs_ptrs is not None:
        channels = FIRST + tl.arange(0, WIDTH)
        sign = (difference > 0).to(tl.int8) - (difference < 0).to(tl.int8)
        mask = inside[:, None] & (channels < D_V)[None, :]
        tl.store(signs_ptrs[:, None] + channels[None, :], sign, mask=mask)
    return tl.sum(tl.abs(difference), 1)


@triton.jit
def _compare_parts(compared, signs_ptrs, parts, factors, queries, inside, width):
    """Sum |output - ideal| over all channels. The ideal is `parts` times the factor of each row."""
    main = parts.main * factors
    total = _compare_channels(compared, signs_ptrs, main, queries, inside, width.D, 0, width.MAIN)
    if width.TAIL > 0:
        tail = parts.tail * factors
        total += _compare_channels(
            compared, signs_ptrs, tail, queries, inside, width.D, width.MAIN, width.TAIL
        )
    return total
