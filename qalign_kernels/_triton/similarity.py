"""similarity_argmax and similarity_topk on Triton. B batch rows, G maps (1 when joint, else H), H heads, N_Q and N_K tokens, D channels a head.

The best score and its tile are kept for every column of a tile apart (packed, for every two) and meet once, after the last tile: three
instructions for a score (packed, one and a half), no reduction in the loop. The last tile is moved back to end at N_K, so that no tile has
columns to mask.

Where several programs share the keys of a query, their matches meet in one 64-bit atomic maximum of (score, lowest index): exact, in any order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import Tile, choose_tile, split_head_dim, split_keys
from ._labels import label_strides
from ._launch import launch, target_of
from ._tile import FAR, advance, load_rows, ordered, pack_match, split_scores, unordered, unpack_match

PREPARED_ROWS = 64  # heads of tokens that are loaded at once, by which fewer loads wait for one another
PREPARED_HEADS = 16  # the most of them that are one token's
UNPACK_BLOCK = 256
FOLDED_HEAD_DIM = 64
CODES = tl.constexpr(128)  # of a packed score: its tile and which of two columns, in seven bits
PTX_TARGETS = ("sm_90", "sm_100", "sm_103")
NOTHING = tl.constexpr(-0x7F800001)  # -inf as `ordered` gives it


class Pair(NamedTuple):
    """What the kernels read of queries and reference; None where a call has none. Pitches are strides in bytes."""

    query_ptr: Tensor
    reference_ptr: Tensor
    query_norm_ptr: Tensor | None
    reference_norm_ptr: Tensor | None
    query_labels_ptr: Tensor | None
    reference_labels_ptr: Tensor | None
    rows_ptr: Tensor | None
    query_pitch_b: int
    query_pitch_h: int
    query_pitch_n: int
    query_stride_d: int
    reference_pitch_b: int
    reference_pitch_h: int
    reference_pitch_n: int
    reference_stride_d: int
    query_labels_stride_b: int
    query_labels_stride_n: int
    reference_labels_stride_b: int
    reference_labels_stride_n: int
    rows_stride: int
    H: int
    N_Q: int
    N_K: int


def similarity_argmax(
    query, reference, similarity, joint, query_labels=None, reference_labels=None, batch_index=None, *, exact=True
) -> tuple[Tensor, Tensor]:
    index, score = _per_token(query, joint, torch.int32), _per_token(query, joint, torch.float32)
    match = _argmax(query, reference, similarity, joint, query_labels, reference_labels, batch_index, exact, index=index, score=score)
    if match is not None:
        launch(
            _unpack_matches_kernel, (triton.cdiv(match.numel(), UNPACK_BLOCK),), num_warps=4, num_stages=1, match_ptr=match, index_ptr=index,
            score_ptr=score, ROWS=match.numel(), BLOCK=UNPACK_BLOCK,
        )  # fmt: skip
    return index, score


def counted_argmax(query, reference, similarity, joint, query_labels=None, reference_labels=None, batch_index=None) -> tuple[Tensor, Tensor]:
    """The best matches int64 [B, G, N_Q] as `_tile.pack_match` has them, and how often each reference token is one, int32 [B, G, N_K].

    The scores of the cosine lack the query's norm, which changes no match.
    """
    counts = query.new_empty((query.shape[0], 1 if joint else query.shape[1], reference.shape[2]), dtype=torch.int32)
    match = _per_token(query, joint, torch.int64)
    _argmax(query, reference, similarity, joint, query_labels, reference_labels, batch_index, True, match=match, counts=counts)
    return match, counts


def _per_token(x: Tensor, joint: bool, dtype: torch.dtype) -> Tensor:
    """Uninitialised, a number for each map and token of `x`: [B, G, N]."""
    return x.new_empty((x.shape[0], 1 if joint else x.shape[1], x.shape[2]), dtype=dtype)


def _argmax(
    query, reference, similarity, joint, query_labels, reference_labels, batch_index, exact, *, index=None, score=None, match=None, counts=None
) -> Tensor | None:
    """Without a `match` to write to, index and score are written where one program has all keys of a query, else matches to unpack are returned."""
    pair, constants = _pair(query, reference, joint, query_labels, reference_labels, batch_index)
    packed = not exact and not joint and query_labels is None  # it pays only where little else is done for a score
    target = target_of(query.device)
    mode = "joint" if joint else "packed" if packed else "exact"
    tile = choose_tile("similarity", mode, target, constants["D"], query.dtype, pair.N_Q)
    rows = query.shape[0] * (1 if joint else query.shape[1])
    programs, key_tiles = rows * triton.cdiv(pair.N_Q, tile.block_m), triton.cdiv(pair.N_K, tile.block_n)
    splits, tiles_per_split = split_keys(programs, key_tiles, CODES.value // 2 if packed else key_tiles)
    if match is None and splits > 1:
        match = _per_token(query, joint, torch.int64)
    pair = _prepare(pair, query, reference, similarity, joint, match, counts)
    launch(
        _similarity_argmax_kernel, (programs * splits,), num_warps=tile.num_warps, num_stages=tile.num_stages, pair=pair, index_ptr=index,
        score_ptr=score, match_ptr=match, counts_ptr=counts, SPLITS=splits, TILES_PER_SPLIT=tiles_per_split, PACKED=packed, PTX=target in PTX_TARGETS,
        **constants, **_tiled(pair, tile),
    )  # fmt: skip
    return match


def similarity_topk(query, reference, k, similarity, joint, query_labels=None, reference_labels=None, batch_index=None) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], 1 if joint else query.shape[1], query.shape[2])
    index, score = (torch.empty((*shape, k), device=query.device, dtype=dtype) for dtype in (torch.int32, torch.float32))
    pair, constants = _pair(query, reference, joint, query_labels, reference_labels, batch_index)
    pair = _prepare(pair, query, reference, similarity, joint)
    tile = choose_tile("similarity", "topk", target_of(query.device), constants["D"], query.dtype, shape[2])
    launch(
        _similarity_topk_kernel, (shape[0] * shape[1] * triton.cdiv(shape[2], tile.block_m),), num_warps=tile.num_warps,
        num_stages=tile.num_stages, pair=pair, index_ptr=index, score_ptr=score, K=k, SLOTS=triton.next_power_of_2(k), **constants,
        **_tiled(pair, tile),
    )  # fmt: skip
    return index, score


def _tiled(pair: Pair, tile: Tile) -> dict[str, Any]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SHORT": pair.N_K < tile.block_n}


def _pair(query, reference, joint, query_labels, reference_labels, batch_index) -> tuple[Pair, dict[str, Any]]:
    """What both kernels read, the norms apart, and their constants."""
    heads, dim = query.shape[1], query.shape[3]
    strides = [list(x.stride()) for x in (query, reference)]
    heads_in_a_row = all(x.stride(1) == dim * x.stride(3) for x in (query, reference))
    if joint and heads_in_a_row and heads * dim % FOLDED_HEAD_DIM == 0:  # the same channels as heads without padding
        heads, dim = heads * dim // FOLDED_HEAD_DIM, FOLDED_HEAD_DIM
        for stride in strides:
            stride[1] = dim * stride[3]
    main, tail = split_head_dim(dim)
    pitches = [[*(x * query.element_size() for x in stride[:3]), stride[3]] for stride in strides]
    labels = [*label_strides(query_labels), *label_strides(reference_labels)]
    tensors = [query, reference, None, None, query_labels, reference_labels, batch_index]
    rows_stride = 0 if batch_index is None else batch_index.stride(0)
    pair = Pair._make([*tensors, *pitches[0], *pitches[1], *labels, rows_stride, heads, query.shape[2], reference.shape[2]])
    return pair, {"D": dim, "MAIN": main, "TAIL": tail, "JOINT": joint}


def _prepare(
    pair: Pair, query: Tensor, reference: Tensor, similarity: str, joint: bool, match: Tensor | None = None, counts: Tensor | None = None
) -> Pair:
    """In one launch, or none: the norms that the cosine needs, those of the queries only without counts; no match yet for every query; no counts.

    The pair with its inverse norms, 1 / max(|x|, 1e-12) of each token, fp32 [B, G, N], over its head or over all of them.
    """
    if similarity == "cosine":
        query_norm = _per_token(query, joint, torch.float32) if counts is None else None
        pair = pair._replace(query_norm_ptr=query_norm, reference_norm_ptr=_per_token(reference, joint, torch.float32))
    elif match is None:
        return pair
    heads, dim = query.shape[1], query.shape[3]
    maps = 1 if joint else heads
    heads_at_once = min(triton.next_power_of_2(heads // maps), PREPARED_HEADS)
    block = PREPARED_ROWS // heads_at_once
    query_programs, reference_programs = (x.shape[0] * maps * triton.cdiv(x.shape[2], block) for x in (query, reference))
    width = triton.next_power_of_2(dim)
    launch(
        _prepare_kernel, (query_programs + (reference_programs if similarity == "cosine" else 0),), num_warps=max(4, width // 16), num_stages=1,
        query_ptr=query, reference_ptr=reference, query_norm_ptr=pair.query_norm_ptr, reference_norm_ptr=pair.reference_norm_ptr, match_ptr=match,
        counts_ptr=counts,
        **{
            f"{name}_pitch_{axis}": x.stride(i) * x.element_size()
            for name, x in (("query", query), ("reference", reference))
            for i, axis in enumerate("bhn")
        },
        query_stride_d=query.stride(3), reference_stride_d=reference.stride(3),
        QUERY_PROGRAMS=query_programs, MAPS=maps, HEADS_PER_MAP=heads // maps, N_Q=query.shape[2], N_K=reference.shape[2], D=dim,
        WIDTH=width, HEADS=heads_at_once, BLOCK=block,
    )  # fmt: skip
    return pair


@triton.jit
def _store_inverse_norms(
    source_ptr, norm_ptr, pitch_b, pitch_h, pitch_n, stride_d, program, MAPS, HEADS_PER_MAP, N, D: tl.constexpr, WIDTH: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK)
    row, start = (program // blocks).to(tl.int64), (program % blocks) * BLOCK
    source_ptr = advance(source_ptr, (row // MAPS) * pitch_b + (row % MAPS) * HEADS_PER_MAP * pitch_h)
    places = tl.arange(0, BLOCK * HEADS)
    tokens, heads = start + places // HEADS, places % HEADS
    offsets = tokens.to(tl.int64) * pitch_n + heads.to(tl.int64) * pitch_h
    total = tl.zeros([BLOCK * HEADS], tl.float32)
    for head in range(0, HEADS_PER_MAP, HEADS):
        present = (tokens < N) & (heads < HEADS_PER_MAP - head)
        tile = load_rows(source_ptr, offsets, present, 1, stride_d, D, 0, WIDTH, True)
        total += tl.sum(tile.to(tl.float32) * tile.to(tl.float32), 1)
        source_ptr = advance(source_ptr, HEADS * tl.cast(pitch_h, tl.int64))
    norm = tl.maximum(tl.sqrt_rn(tl.sum(tl.reshape(total, (BLOCK, HEADS)), 1)), 1e-12, propagate_nan=tl.PropagateNan.ALL)
    tokens = start + tl.arange(0, BLOCK)
    tl.store(norm_ptr + row * N + tokens, 1.0 / norm, mask=tokens < N)


@triton.jit
def _clear_matches(match_ptr, counts_ptr, program, N_Q, N_K, BLOCK: tl.constexpr):
    """No match for a block of queries, and no counts for this block's share of the reference tokens."""
    blocks = tl.cdiv(N_Q, BLOCK)
    row, block = (program // blocks).to(tl.int64), program % blocks
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(match_ptr + row * N_Q + tokens, tl.full((BLOCK,), NOTHING, tl.int64) << 32, mask=tokens < N_Q)
    if counts_ptr is not None:
        for start in range(block * BLOCK, N_K, blocks * BLOCK):
            keys = start + tl.arange(0, BLOCK)
            tl.store(counts_ptr + row * N_K + keys, tl.zeros((BLOCK,), tl.int32), mask=keys < N_K)


@triton.jit
def _prepare_kernel(
    query_ptr, reference_ptr, query_norm_ptr, reference_norm_ptr, match_ptr, counts_ptr, query_pitch_b, query_pitch_h, query_pitch_n,
    query_stride_d, reference_pitch_b, reference_pitch_h, reference_pitch_n, reference_stride_d, QUERY_PROGRAMS, MAPS, HEADS_PER_MAP, N_Q, N_K,
    D: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < QUERY_PROGRAMS:
        if match_ptr is not None:
            _clear_matches(match_ptr, counts_ptr, program, N_Q, N_K, BLOCK)
        if query_norm_ptr is not None:
            _store_inverse_norms(
                query_ptr, query_norm_ptr, query_pitch_b, query_pitch_h, query_pitch_n, query_stride_d, program, MAPS, HEADS_PER_MAP, N_Q, D,
                WIDTH, HEADS, BLOCK,
            )  # fmt: skip
    elif reference_norm_ptr is not None:
        _store_inverse_norms(
            reference_ptr, reference_norm_ptr, reference_pitch_b, reference_pitch_h, reference_pitch_n, reference_stride_d,
            program - QUERY_PROGRAMS, MAPS, HEADS_PER_MAP, N_K, D, WIDTH, HEADS, BLOCK,
        )  # fmt: skip


@triton.jit
def _open_tile(
    pair, row, row_tile, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, JOINT: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Where the tile's queries and their keys are: (query rows, their channels and labels, pointers to query, keys, key norms, key labels)."""
    query_rows = tl.minimum(row_tile * BLOCK_M + tl.arange(0, BLOCK_M), pair.N_Q - 1).to(tl.int64)
    maps = 1 if JOINT else pair.H
    batch, head = row // maps, row % maps
    reference_batch = batch
    if pair.rows_ptr is not None:
        reference_batch = tl.load(pair.rows_ptr + batch * pair.rows_stride).to(tl.int64)
    query_ptr = advance(pair.query_ptr, batch * pair.query_pitch_b + head * pair.query_pitch_h)
    reference_ptr = advance(pair.reference_ptr, reference_batch * pair.reference_pitch_b + head * pair.reference_pitch_h)
    query_main, query_tail, query_labels, norm_ptr, labels_ptr = 0, 0, 0, 0, 0
    if not JOINT:
        query_main = load_rows(query_ptr, query_rows, query_rows, pair.query_pitch_n, pair.query_stride_d, D, 0, MAIN, False)
        if TAIL > 0:
            query_tail = load_rows(query_ptr, query_rows, query_rows, pair.query_pitch_n, pair.query_stride_d, D, MAIN, TAIL, False)
    if pair.reference_norm_ptr is not None:
        norm_ptr = pair.reference_norm_ptr + (reference_batch * maps + head) * pair.N_K
    if pair.reference_labels_ptr is not None:
        query_labels = tl.load(pair.query_labels_ptr + batch * pair.query_labels_stride_b + query_rows * pair.query_labels_stride_n)
        labels_ptr = pair.reference_labels_ptr + batch * pair.reference_labels_stride_b
    return query_rows, query_main, query_tail, query_labels, query_ptr, reference_ptr, norm_ptr, labels_ptr


@triton.jit
def _score_tile(
    pair, opened, start, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, JOINT: tl.constexpr,
    SHORT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_M, BLOCK_N] against the keys from `start` on, without the query's norm; -inf where labels do not meet."""
    query_rows, query_main, query_tail, query_labels, query_ptr, reference_ptr, norm_ptr, labels_ptr = opened
    columns = tl.arange(0, BLOCK_N)
    if SHORT:
        columns = tl.minimum(columns, pair.N_K - 1)
    keys_ptr = advance(reference_ptr, start.to(tl.int64) * pair.reference_pitch_n)
    keys = columns.to(tl.int64)
    if JOINT:
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for _ in range(pair.H):
            part = load_rows(query_ptr, query_rows, query_rows, pair.query_pitch_n, pair.query_stride_d, D, 0, MAIN, False)
            key = load_rows(keys_ptr, keys, keys, pair.reference_pitch_n, pair.reference_stride_d, D, 0, MAIN, False)
            scores = tl.dot(part, key.T, scores, input_precision="ieee")
            if TAIL > 0:
                part = load_rows(query_ptr, query_rows, query_rows, pair.query_pitch_n, pair.query_stride_d, D, MAIN, TAIL, False)
                key = load_rows(keys_ptr, keys, keys, pair.reference_pitch_n, pair.reference_stride_d, D, MAIN, TAIL, False)
                scores = tl.dot(part, key.T, scores, input_precision="ieee")
            query_ptr = advance(query_ptr, pair.query_pitch_h)
            keys_ptr = advance(keys_ptr, pair.reference_pitch_h)
    else:
        scores = split_scores(query_main, query_tail, keys_ptr, keys, keys, pair.reference_pitch_n, pair.reference_stride_d, D, MAIN, TAIL, False)
    if pair.reference_norm_ptr is not None:
        scores *= tl.load(norm_ptr + start + columns)[None, :]
    if pair.reference_labels_ptr is not None:
        labels = tl.load(labels_ptr + (start + columns).to(tl.int64) * pair.reference_labels_stride_n)
        scores = tl.where((query_labels[:, None] & labels[None, :]) != 0, scores, float("-inf"))
    return scores


@triton.jit
def _maximum(left, right):
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _best_column(scores, columns):
    """The largest score of each row, NaN where it has one, and the lowest of its columns (some number for NaN)."""
    score = tl.reduce(scores, 1, _maximum)
    return score, tl.min(tl.where(scores == score[:, None], columns, FAR), 1)


@triton.jit
def _pack(bits, code, PTX: tl.constexpr):
    """int32 with their seven low bits replaced by `code`; LLVM makes two instructions of it for sm_90, so one is asked for by name."""
    if PTX:
        code = tl.zeros_like(bits) + code
        return tl.inline_asm_elementwise("lop3.b32 $0, $1, 0xFFFFFF80, $2, 0xEA;", "=r,r,r", [bits, code], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return (bits & -CODES) | code


@triton.jit
def _largest(first, second, third, PTX: tl.constexpr):
    """The largest of three int32; ptxas makes one instruction of the two only where they are neighbours."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .s32 larger; max.s32 larger, $1, $2; max.s32 $0, larger, $3; }", "=r,r,r,r", [first, second, third], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.maximum(tl.maximum(first, second), third)


@triton.jit
def _walk_packed(
    pair, opened, first, last, last_start, NEGATIVE: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PTX: tl.constexpr,
    SHORT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The bits of each row's best score without their seven low ones, and the lowest index that has it, of rows with a score that is not negative;
    of rows without one if NEGATIVE.

    There the bits compare as the scores do. Below them each has a code, which is larger the earlier its tile and, of two columns, the even one is.
    """
    best = tl.full([BLOCK_M, BLOCK_N // 2], -FAR - 1, tl.int32)
    for tile in range(first, last):
        start = tl.minimum(tile * BLOCK_N, last_start)
        bits = _score_tile(pair, opened, start, D, MAIN, TAIL, False, SHORT, BLOCK_M, BLOCK_N).to(tl.int32, bitcast=True)
        even, odd = tl.split(tl.reshape(~bits if NEGATIVE else bits, [BLOCK_M, BLOCK_N // 2, 2]))
        code = CODES - 1 - 2 * (tile - first)
        best = _largest(_pack(even, code, PTX), _pack(odd, code - 1, PTX), best, PTX)

    codes = CODES - 1 - (best & (CODES - 1))
    columns = tl.minimum((first + codes // 2) * BLOCK_N, last_start) + 2 * tl.arange(0, BLOCK_N // 2)[None, :] + codes % 2
    best |= 1  # the columns of a tile are equals
    strongest = tl.max(best, 1)
    index = tl.min(tl.where(best == strongest[:, None], columns, FAR), 1)
    strongest &= -CODES
    return ~strongest if NEGATIVE else strongest, index


@triton.jit
def _similarity_argmax_kernel(
    pair, index_ptr, score_ptr, match_ptr, counts_ptr, SPLITS, TILES_PER_SPLIT, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    JOINT: tl.constexpr, PACKED: tl.constexpr, PTX: tl.constexpr, SHORT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(pair.N_Q, BLOCK_M)
    row_tile, split = tl.program_id(0) % row_tiles, (tl.program_id(0) // row_tiles) % SPLITS
    row = (tl.program_id(0) // row_tiles // SPLITS).to(tl.int64)
    opened = _open_tile(pair, row, row_tile, D, MAIN, TAIL, JOINT, BLOCK_M)
    first = split * TILES_PER_SPLIT
    last = tl.minimum(first + TILES_PER_SPLIT, tl.cdiv(pair.N_K, BLOCK_N))
    last_start = tl.maximum(pair.N_K - BLOCK_N, 0)
    columns = tl.arange(0, BLOCK_N)[None, :]
    if PACKED:
        bits, index = _walk_packed(pair, opened, first, last, last_start, False, D, MAIN, TAIL, PTX, SHORT, BLOCK_M, BLOCK_N)
        if tl.min(bits, 0) < 0:
            other_bits, other_index = _walk_packed(pair, opened, first, last, last_start, True, D, MAIN, TAIL, PTX, SHORT, BLOCK_M, BLOCK_N)
            index = tl.where(bits < 0, other_index, index)
            bits = tl.where(bits < 0, other_bits, bits)
        score = (bits ^ (CODES // 2)).to(tl.float32, bitcast=True)  # the middle of the scores that share the upper bits
    else:
        if JOINT:  # the heads' sum needs the registers, and there is one tile to reduce for all of them
            score = tl.full([BLOCK_M], float("-inf"), tl.float32)
            index = tl.full([BLOCK_M], -1, tl.int32)
        else:
            best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
            best_tile = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for tile in range(first, last):
            start = tl.minimum(tile * BLOCK_N, last_start)
            scores = _score_tile(pair, opened, start, D, MAIN, TAIL, JOINT, SHORT, BLOCK_M, BLOCK_N)
            if JOINT:
                tile_score, tile_index = _best_column(scores, start + columns)
                index = tl.where(tile_score > score, tile_index, index)
                score = tl.maximum(score, tile_score, propagate_nan=tl.PropagateNan.ALL)
            else:
                best_tile = tl.where(scores > best, tile, best_tile)
                best = tl.maximum(best, scores, propagate_nan=tl.PropagateNan.ALL)
        if not JOINT:
            score, index = _best_column(best, tl.minimum(best_tile * BLOCK_N, last_start) + columns)

    found = score != float("-inf")
    if pair.query_norm_ptr is not None:
        score *= tl.load(pair.query_norm_ptr + row * pair.N_Q + opened[0])
    elif pair.reference_norm_ptr is not None:  # the cosine of an infinite query
        score = tl.where(score == float("inf"), float("nan"), score)
    tokens = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tokens < pair.N_Q
    out = row * pair.N_Q + tokens
    score = tl.where(found, score, float("-inf"))
    index = tl.where(score != score, 0, tl.where(found, tl.minimum(index, pair.N_K - 1), -1))
    if match_ptr is None:
        tl.store(index_ptr + out, index, mask=inside)
        tl.store(score_ptr + out, score, mask=inside)
    else:
        match = pack_match(score, index)
        before = tl.atomic_max(match_ptr + out, match, mask=inside, sem="relaxed")
        if counts_ptr is not None:  # in whatever order the splits come, each takes from the last what it won over, and the best one keeps it
            counts_ptr += row * pair.N_K
            won = inside & (match > before)
            lost_score, lost = unpack_match(before)
            tl.atomic_add(counts_ptr + index, 1, mask=won, sem="relaxed")
            tl.atomic_add(counts_ptr + lost, -1, mask=won & (lost >= 0), sem="relaxed")


@triton.jit
def _unpack_matches_kernel(match_ptr, index_ptr, score_ptr, ROWS, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    score, index = unpack_match(tl.load(match_ptr + rows, mask=rows < ROWS, other=0))
    tl.store(index_ptr + rows, index, mask=rows < ROWS)
    tl.store(score_ptr + rows, score, mask=rows < ROWS)


@triton.jit
def _similarity_topk_kernel(
    pair, index_ptr, score_ptr, K, SLOTS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    JOINT: tl.constexpr, SHORT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(pair.N_Q, BLOCK_M)
    row_tile, row = tl.program_id(0) % row_tiles, (tl.program_id(0) // row_tiles).to(tl.int64)
    opened = _open_tile(pair, row, row_tile, D, MAIN, TAIL, JOINT, BLOCK_M)
    last_start = tl.maximum(pair.N_K - BLOCK_N, 0)
    kept = tl.full([BLOCK_M, SLOTS], NOTHING, tl.int32)
    kept_index = tl.zeros([BLOCK_M, SLOTS], tl.int32) - 1 - tl.arange(0, SLOTS)[None, :]
    weakest = tl.full([BLOCK_M], NOTHING, tl.int32)
    for tile in range(0, tl.cdiv(pair.N_K, BLOCK_N)):
        start = tl.minimum(tile * BLOCK_N, last_start)
        scores = _score_tile(pair, opened, start, D, MAIN, TAIL, JOINT, SHORT, BLOCK_M, BLOCK_N)
        columns = start + tl.arange(0, BLOCK_N)
        unseen = (columns >= tile * BLOCK_N) & (columns < pair.N_K)
        order = tl.where(unseen[None, :], ordered(scores), NOTHING)
        strongest = tl.max(order, 1)
        while tl.max((strongest > weakest).to(tl.int32), 0) > 0:
            column = tl.min(tl.where(order == strongest[:, None], columns[None, :], FAR), 1)
            # of equally weak ones the highest index leaves; empty slots have negative indices of their own
            leaving = tl.max(tl.where(kept == weakest[:, None], kept_index, -FAR), 1)
            replaced = kept_index == tl.where(strongest > weakest, leaving, FAR)[:, None]
            kept = tl.where(replaced, strongest[:, None], kept)
            kept_index = tl.where(replaced, column[:, None], kept_index)
            order = tl.where(columns[None, :] == column[:, None], NOTHING, order)
            strongest = tl.max(order, 1)
            weakest = tl.min(kept, 1)

    tokens = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    out = (row * pair.N_Q + tokens) * K
    for rank in range(K):
        strongest = tl.max(kept, 1)
        index = tl.min(tl.where(kept == strongest[:, None], kept_index, FAR), 1)
        kept = tl.where(kept_index == index[:, None], -FAR - 1, kept)
        score = unordered(strongest)
        if pair.query_norm_ptr is not None:
            score *= tl.load(pair.query_norm_ptr + row * pair.N_Q + opened[0])
        tl.store(index_ptr + out + rank, tl.maximum(index, -1), mask=tokens < pair.N_Q)
        tl.store(score_ptr + out + rank, tl.where(index >= 0, score, float("-inf")), mask=tokens < pair.N_Q)
