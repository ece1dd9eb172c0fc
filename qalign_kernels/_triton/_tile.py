"""Tensors and tiles that several kernels share, and helpers that load, multiply and store them.

A head dim takes MAIN + TAIL channels (`split_head_dim`), of which D exist. A pitch is a stride in bytes: with
it, an address is one multiply-add.

Fields in capitals are constexpr as long as a tuple is only passed on. An assignment makes tensors of them.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._configs import split_head_dim

FAR = tl.constexpr(0x7FFFFFFF)  # beyond every index, and NaN where scores are `ordered`
NOTHING = tl.constexpr(-0x7F800001)  # -inf as `ordered` gives it


class Features(NamedTuple):
    """A tensor [B, H, N, D]: pitches of batch row, head and token in bytes, and the stride of channels.

    In bytes, the pitch of a head is a multiple of 16 even at head dim 40, so that loads stay wide.
    """

    pointer: Any
    pitch_b: Any
    pitch_h: Any
    pitch_n: Any
    stride_d: Any


class Rows(NamedTuple):
    """The tokens [N, D] of one batch row and head."""

    pointer: Any
    pitch: Any
    stride_d: Any


class Width(NamedTuple):
    """D channels as a power of two and a tail, which may be 0."""

    D: Any
    MAIN: Any
    TAIL: Any


class Parts(NamedTuple):
    """The two parts of a tile of rows. The tail is arbitrary if the width has none."""

    main: Any
    tail: Any


class TokenTile(NamedTuple):
    """The tokens of a program: those of row b·H + h that are `inside`."""

    row: Any
    batch: Any
    head: Any
    tokens: Any
    inside: Any


def features(tensor: torch.Tensor) -> Features:
    """A tensor as kernels read it."""
    batch, head, token = (stride * tensor.element_size() for stride in tensor.stride()[:3])
    return Features(tensor, batch, head, token, tensor.stride(3))


def width(dim: int) -> Width:
    """The channels of a head as kernels count them."""
    return Width(*(tl.constexpr(x) for x in (dim, *split_head_dim(dim))))


@triton.jit
def advance(pointer, pitch):
    """The pointer moved by int64 bytes: one number, or one for each row."""
    return (pointer.to(tl.pointer_type(tl.int8), bitcast=True) + pitch).to(pointer.dtype, bitcast=True)


@triton.jit
def rows_of(source, batch, head):
    """The tokens of one batch row and head of some features."""
    pointer = advance(source.pointer, batch * source.pitch_b + head * source.pitch_h)
    return Rows(pointer, source.pitch_n, source.stride_d)


@triton.jit
def read_row(pointer, stride, number, batch):
    """The row that a batch row reads, int64; the nearest of the `number` rows for an index out of range."""
    return tl.minimum(tl.maximum(tl.load(pointer + batch * stride), 0), number - 1).to(tl.int64)


@triton.jit
def skip(rows, tokens):
    """The rows without the first int64 `tokens`."""
    return Rows(advance(rows.pointer, tokens * rows.pitch), rows.pitch, rows.stride_d)


@triton.jit
def open_tile(tokens, H, BLOCK: tl.constexpr):
    """The tile of this program among the `tokens` of each row; int64."""
    blocks = tl.cdiv(tokens, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    own = ((tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    return TokenTile(row, row // H, row % H, own, own < tokens)


@triton.jit
def load(pointers, present, MASKED: tl.constexpr):
    """The values of tokens. If MASKED, tokens that are not `present` give 0."""
    if MASKED:
        return tl.load(pointers, mask=present, other=0)
    else:
        return tl.load(pointers)


@triton.jit
def load_rows(
    rows, tokens, present, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):
    """WIDTH channels from FIRST on of the int64 `tokens`: [tokens, WIDTH].

    Channels beyond D are 0. If MASKED, tokens that are not `present` are 0, too.
    """
    channels = FIRST + tl.arange(0, WIDTH)
    pointers = (
        advance(rows.pointer, tokens * rows.pitch)[:, None] + channels[None, :].to(tl.int64) * rows.stride_d
    )
    if FIRST + WIDTH > D:
        if MASKED:
            return tl.load(pointers, mask=present[:, None] & (channels < D)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=(channels < D)[None, :], other=0.0)
    else:
        if MASKED:
            return tl.load(pointers, mask=present[:, None], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def load_parts(rows, tokens, present, width, MASKED: tl.constexpr):
    """Both parts of a tile of rows. Without a tail, the main part stands in for it."""
    main = load_rows(rows, tokens, present, width.D, 0, width.MAIN, MASKED)
    tail = main
    if width.TAIL > 0:
        tail = load_rows(rows, tokens, present, width.D, width.MAIN, width.TAIL, MASKED)
    return Parts(main, tail)


@triton.jit
def zeros(BLOCK: tl.constexpr, width):
    """A tile of sums, fp32 [BLOCK, D]."""
    main = tl.zeros((BLOCK, width.MAIN), tl.float32)
    return Parts(main, tl.zeros((BLOCK, width.TAIL if width.TAIL > 0 else 1), tl.float32))


@triton.jit
def scale_rows(parts, factors, width):
    """Each row times its factor."""
    main, tail = parts.main * factors[:, None], parts.tail
    if width.TAIL > 0:
        tail *= factors[:, None]
    return Parts(main, tail)


@triton.jit
def accumulate(sums, weights, rows, tokens, present, width, MASKED: tl.constexpr):
    """sums + weights · rows: fp32 [BLOCK_M, D] plus [BLOCK_M, BLOCK_N] times the rows of the tokens."""
    main = load_rows(rows, tokens, present, width.D, 0, width.MAIN, MASKED)
    rounded = weights.to(main.dtype)
    sum_main, sum_tail = tl.dot(rounded, main, sums.main, input_precision="ieee"), sums.tail
    if width.TAIL > 0:
        tail = load_rows(rows, tokens, present, width.D, width.MAIN, width.TAIL, MASKED)
        sum_tail = tl.dot(rounded, tail, sum_tail, input_precision="ieee")
    return Parts(sum_main, sum_tail)


@triton.jit
def store_channels(pointers, values, inside, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Write channels from FIRST on of the rows that are `inside`. `pointers` has one pointer for each row."""
    channels = FIRST + tl.arange(0, WIDTH)
    mask = inside[:, None] & (channels < D)[None, :]
    tl.store(pointers[:, None] + channels[None, :], values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def store_parts(pointers, parts, inside, width, factor=1.0):
    """Write both parts of a tile of contiguous rows, times a factor: a number, or [BLOCK, 1]."""
    store_channels(pointers, parts.main * factor, inside, width.D, 0, width.MAIN)
    if width.TAIL > 0:
        store_channels(pointers, parts.tail * factor, inside, width.D, width.MAIN, width.TAIL)


@triton.jit
def split_scores(query, keys, tokens, present, width, MASKED: tl.constexpr):
    """fp32 [BLOCK_M, BLOCK_N]: the query tile against the keys at `tokens`, over all channels."""
    main = load_rows(keys, tokens, present, width.D, 0, width.MAIN, MASKED)
    scores = tl.dot(query.main, main.T, input_precision="ieee")
    if width.TAIL > 0:
        tail = load_rows(keys, tokens, present, width.D, width.MAIN, width.TAIL, MASKED)
        scores = tl.dot(query.tail, tail.T, scores, input_precision="ieee")
    return scores


@triton.jit
def ordered(scores):
    """int32 numbers that compare as the float32 scores do, with NaN above infinity."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(scores != scores, FAR, bits ^ ((bits >> 31) & FAR))


@triton.jit
def unordered(order):
    """The float32 scores of `ordered`."""
    return (order ^ ((order >> 31) & FAR)).to(tl.float32, bitcast=True)


@triton.jit
def pack_match(score, index):
    """int64 numbers of which the largest is the best match. Among equal scores the lowest index is the best.

    "No match" is -inf and -1. It is below all other matches.
    """
    return (ordered(score).to(tl.int64) << 32) | ((~index).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def unpack_match(match):
    """The score, float32, and the index, int32."""
    return unordered((match >> 32).to(tl.int32)), ~match.to(tl.int32)
