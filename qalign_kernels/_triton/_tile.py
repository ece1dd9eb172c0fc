"""Device helpers that several kernels share.

A head dim is MAIN + TAIL channels (`split_head_dim`), of which D exist. A pitch is the distance of two tokens in bytes: one multiply-add makes
an address of it.
"""

import triton
import triton.language as tl

FAR = tl.constexpr(0x7FFFFFFF)  # beyond every index, and NaN where scores are `ordered`


@triton.jit
def advance(pointer, pitch):
    """The pointer moved by int64 bytes, of one scalar or of one per row."""
    return (pointer.to(tl.pointer_type(tl.int8), bitcast=True) + pitch).to(pointer.dtype, bitcast=True)


@triton.jit
def open_tile(tokens, H, BLOCK: tl.constexpr):
    """Of this program: its row b·H + h, its batch row b and head h, the int64 tokens of its tile, and which of them are inside."""
    blocks = tl.cdiv(tokens, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    rows = ((tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    return row, row // H, row % H, rows, rows < tokens


@triton.jit
def load(pointers, present, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=present, other=0)
    else:
        return tl.load(pointers)


@triton.jit
def load_rows(pointer, rows, present, pitch, stride_d, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """[rows, WIDTH]: channels FIRST .. FIRST + WIDTH of the int64 `rows`; zeros beyond D and, where MASKED, for rows that are not `present`."""
    channels = FIRST + tl.arange(0, WIDTH)
    pointers = advance(pointer, rows * pitch)[:, None] + channels[None, :].to(tl.int64) * stride_d
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
def load_parts(pointer, batch, head, rows, present, pitch_b, pitch_h, pitch_n, stride_d, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Both parts of a tile of rows; the main part again where there is no tail."""
    pointer = advance(pointer, batch * pitch_b + head * pitch_h)
    main = load_rows(pointer, rows, present, pitch_n, stride_d, D, 0, MAIN, True)
    tail = main
    if TAIL > 0:
        tail = load_rows(pointer, rows, present, pitch_n, stride_d, D, MAIN, TAIL, True)
    return main, tail


@triton.jit
def store_channels(output_ptrs, acc, inside, D_V: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    channels = FIRST + tl.arange(0, WIDTH)
    mask = inside[:, None] & (channels < D_V)[None, :]
    tl.store(output_ptrs[:, None] + channels[None, :], acc.to(output_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def split_scores(
    query_main, query_tail, key_ptr, rows, present, pitch, stride_d, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """fp32 [BLOCK_M, BLOCK_N]: the query tile against the keys in `rows`, over both parts of the head dim."""
    scores = tl.dot(query_main, load_rows(key_ptr, rows, present, pitch, stride_d, D, 0, MAIN, MASKED).T, input_precision="ieee")
    if TAIL > 0:
        tail = load_rows(key_ptr, rows, present, pitch, stride_d, D, MAIN, TAIL, MASKED)
        scores = tl.dot(query_tail, tail.T, scores, input_precision="ieee")
    return scores


@triton.jit
def ordered(scores):
    """int32 in the order of the float32 scores, with NaN above infinity."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(scores != scores, FAR, bits ^ ((bits >> 31) & FAR))


@triton.jit
def unordered(order):
    """The float32 scores of `ordered`."""
    return (order ^ ((order >> 31) & FAR)).to(tl.float32, bitcast=True)


@triton.jit
def pack_match(score, index):
    """int64 whose largest is the best match, among equal scores that of the lowest index; no match, -inf and -1, is below all others."""
    return (ordered(score).to(tl.int64) << 32) | ((~index).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def unpack_match(match):
    """The score, float32, and the index, int32."""
    return unordered((match >> 32).to(tl.int32)), ~match.to(tl.int32)
