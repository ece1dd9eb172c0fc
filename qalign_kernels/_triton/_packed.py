"""The argmax to 16 bits of a score, packed: one and a half instructions for a score.

1. The bits of a float32 score that is not negative compare as the score does. Their seven low bits are
   replaced by a code of the tile and of the column, even or odd.
2. One maximum then keeps score and code of every two columns together.
3. After the last tile, the columns meet, and the index follows from the code.
4. Where a tile has queries whose best score is negative, a second walk compares inverted bits.
"""

import triton
import triton.language as tl

from ._matches import Best
from ._score_tile import _score_tile
from ._tile import FAR

CODES = tl.constexpr(128)  # of a packed score: its tile and which of two columns, in seven bits
PTX_TARGETS = ("sm_90", "sm_100", "sm_103")


@triton.jit
def _pack(bits, code, PTX: tl.constexpr):
    """int32 numbers with `code` as their seven low bits: two instructions in LLVM, one in inline PTX."""
    if PTX:
        code = tl.zeros_like(bits) + code
        instruction: tl.constexpr = "lop3.b32 $0, $1, 0xFFFFFF80, $2, 0xEA;"
        return tl.inline_asm_elementwise(
            instruction, "=r,r,r", [bits, code], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return (bits & -CODES) | code


@triton.jit
def _largest(first, second, third, PTX: tl.constexpr):
    """The largest of three int32; ptxas makes one instruction of the two only where they are neighbours."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .s32 larger; max.s32 larger, $1, $2; max.s32 $0, larger, $3; }",
            "=r,r,r,r",
            [first, second, third],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.maximum(tl.maximum(first, second), third)


@triton.jit
def _walk_packed(pair, opened, tiles, variant, NEGATIVE: tl.constexpr, PTX: tl.constexpr):
    """The best score of rows that have one not below 0; if NEGATIVE, of the other rows.

    The bits of these scores compare as the scores do. The seven low bits become a code. It is larger for an
    earlier tile, and for the even one of two columns. Among equal upper bits, the lowest index is returned.
    """
    HALF: tl.constexpr = variant.BLOCK_N // 2
    best = tl.full([variant.BLOCK_M, HALF], -FAR - 1, tl.int32)
    for tile in range(tiles.first, tiles.last):
        start = tl.minimum(tile * variant.BLOCK_N, tiles.last_start)
        bits = _score_tile(pair, opened, start, variant).to(tl.int32, bitcast=True)
        even, odd = tl.split(tl.reshape(~bits if NEGATIVE else bits, [variant.BLOCK_M, HALF, 2]))
        code = CODES - 1 - 2 * (tile - tiles.first)
        best = _largest(_pack(even, code, PTX), _pack(odd, code - 1, PTX), best, PTX)

    codes = CODES - 1 - (best & (CODES - 1))
    starts = tl.minimum((tiles.first + codes // 2) * variant.BLOCK_N, tiles.last_start)
    columns = starts + 2 * tl.arange(0, HALF)[None, :] + codes % 2
    best |= 1  # the columns of a tile are equals
    strongest = tl.max(best, 1)
    index = tl.min(tl.where(best == strongest[:, None], columns, FAR), 1)
    strongest &= -CODES
    return Best(~strongest if NEGATIVE else strongest, index)


@triton.jit
def _best_packed(pair, opened, tiles, variant, PTX: tl.constexpr):
    """The best score of each query to 16 bits."""
    bits, index = _walk_packed(pair, opened, tiles, variant, False, PTX)
    if tl.min(bits, 0) < 0:
        other = _walk_packed(pair, opened, tiles, variant, True, PTX)
        index = tl.where(bits < 0, other.index, index)
        bits = tl.where(bits < 0, other.score, bits)
    middle = bits ^ (CODES // 2)  # the middle of all scores with these upper bits
    middle = tl.where((bits & FAR & -CODES) == 0, 0, middle)  # a score of zero is exact
    return Best(middle.to(tl.float32, bitcast=True), index)
