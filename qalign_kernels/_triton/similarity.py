"""similarity_argmax and similarity_topk on Triton.

B batch rows, G maps (1 when joint, else H), H heads, N_Q and N_K tokens, D channels a head.

The best score and its tile are kept for every column of a tile apart (packed, for every two) and meet once,
after the last tile: three instructions for a score (packed, one and a half), no reduction in the loop. The
last tile is moved back to end at N_K, so that no tile has columns to mask.

Where several programs share the keys of a query, their matches meet in one 64-bit atomic maximum of (score,
lowest index): exact, in any order.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import Tile, choose_tile, listed_tile, split_keys
from ._labels import label_arguments
from ._launch import launch, target_of
from ._matches import Best, KeyRange, Outputs, Pair, best_column, better, reference_row, store_best
from ._occupancy import ASSUMED_PROGRAMS, programs_at_once
from ._tile import (
    FAR,
    Parts,
    Rows,
    advance,
    features,
    load_parts,
    load_rows,
    ordered,
    rows_of,
    skip,
    split_scores,
    unordered,
    unpack_match,
    width,
)

PREPARED_ROWS = 64  # heads of tokens that are loaded at once, by which fewer loads wait for one another
PREPARED_HEADS = 16  # the most of them that are one token's
UNPACK_BLOCK = 256
FOLDED_HEAD_DIM = 64
COPY_ALIGNMENT = 16  # of rows that the bulk copy engine reads, in bytes
CODES = tl.constexpr(128)  # of a packed score: its tile and which of two columns, in seven bits
PTX_TARGETS = ("sm_90", "sm_100", "sm_103")
NOTHING = tl.constexpr(-0x7F800001)  # -inf as `ordered` gives it


class Choice(NamedTuple):
    """A kernel of the argmax, its tile, and the arguments that it alone takes."""

    kernel: Any
    tile: Tile
    own: dict[str, Any]


class Opened(NamedTuple):
    """A tile of queries and where their keys are; 0 for what is absent and, if joint, for the channels."""

    tokens: Any
    channels: Parts
    labels: Any
    query: Rows
    reference: Rows
    norm_ptr: Any
    labels_ptr: Any


class Variant(NamedTuple):
    """Which kernel this is; constexpr. SHORT where the reference has less than BLOCK_N tokens."""

    JOINT: Any
    SHORT: Any
    WIDTH: Any
    BLOCK_M: Any
    BLOCK_N: Any


def similarity_argmax(
    query,
    reference,
    similarity,
    joint,
    query_labels=None,
    reference_labels=None,
    batch_index=None,
    *,
    exact=True,
) -> tuple[Tensor, Tensor]:
    index, score = _per_token(query, joint, torch.int32), _per_token(query, joint, torch.float32)
    matching = (query, reference, similarity, joint, query_labels, reference_labels, batch_index)
    match = _argmax(*matching, exact, index=index, score=score)
    if match is not None:
        launch(
            _unpack_matches_kernel,
            (triton.cdiv(match.numel(), UNPACK_BLOCK),),
            num_warps=4,
            num_stages=1,
            match_ptr=match,
            index_ptr=index,
            score_ptr=score,
            ROWS=match.numel(),
            BLOCK=UNPACK_BLOCK,
        )
    return index, score


def counted_argmax(
    query, reference, similarity, joint, query_labels=None, reference_labels=None, batch_index=None
) -> tuple[Tensor, Tensor]:
    """The best matches and how often each reference token is one: int64 [B, G, N_Q], int32 [B, G, N_K].

    Matches are as `_tile.pack_match` has them. The cosine lacks the query's norm, which changes no match.
    """
    shape = (query.shape[0], 1 if joint else query.shape[1], reference.shape[2])
    counts = query.new_empty(shape, dtype=torch.int32)
    match = _per_token(query, joint, torch.int64)
    matching = (query, reference, similarity, joint, query_labels, reference_labels, batch_index)
    _argmax(*matching, True, match=match, counts=counts)
    return match, counts


def _per_token(x: Tensor, joint: bool, dtype: torch.dtype) -> Tensor:
    """Uninitialised, a number for each map and token of `x`: [B, G, N]."""
    return x.new_empty((x.shape[0], 1 if joint else x.shape[1], x.shape[2]), dtype=dtype)


def _argmax(
    query,
    reference,
    similarity,
    joint,
    query_labels,
    reference_labels,
    batch_index,
    exact,
    *,
    index=None,
    score=None,
    match=None,
    counts=None,
) -> Tensor | None:
    """Write matches to `match`; without one write index and score, or return matches to unpack."""
    pair, dim = _pair(query, reference, joint, query_labels, reference_labels, batch_index)
    packed = (
        not exact and not joint and query_labels is None
    )  # it pays only where little else is done for a score
    kernel, tile, own = _choose(query, reference, pair, dim, joint, packed)
    rows = query.shape[0] * (1 if joint else query.shape[1])
    programs, key_tiles = rows * triton.cdiv(pair.N_Q, tile.block_m), triton.cdiv(pair.N_K, tile.block_n)
    most_tiles = CODES.value // 2 if packed else key_tiles
    pair = _with_norms(pair, query, reference, similarity, joint, counted=counts is not None)
    room = functools.cache(lambda: _per_token(query, joint, torch.int64))  # where matches of splits meet

    def arguments(at_once: int) -> dict[str, Any]:
        splits, tiles_per_split = split_keys(programs, key_tiles, most_tiles, at_once)
        return {
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "pair": pair,
            "index_ptr": index,
            "score_ptr": score,
            "match_ptr": room() if match is None and splits > 1 else match,
            "counts_ptr": counts,
            "SPLITS": splits,
            "TILES_PER_SPLIT": tiles_per_split,
            **own,
        }

    # the compiled kernel says how many of it run at once, and is the same for most divisions of the keys
    chosen = arguments(programs_at_once(kernel, **arguments(ASSUMED_PROGRAMS)))
    match = chosen["match_ptr"]
    _prepare(pair, query, reference, joint, match, counts)
    launch(kernel, (programs * chosen["SPLITS"],), **chosen)
    return match


def _choose(query: Tensor, reference: Tensor, pair: Pair, dim: int, joint: bool, packed: bool) -> Choice:
    tile = _hopper_tile(query, reference, pair, dim, joint)
    if tile is not None:
        from . import _joint_hopper  # Gluon, which no other call needs

        own = _joint_hopper.arguments(query, reference, tile)
        return Choice(_joint_hopper.joint_argmax_hopper_kernel, tile, own)
    target, mode = target_of(query.device), "joint" if joint else "packed" if packed else "exact"
    tile = choose_tile("similarity", mode, target, dim, query.dtype, pair.N_Q)
    own = {"PACKED": packed, "PTX": target in PTX_TARGETS, **_constants(pair, tile, dim, joint)}
    return Choice(_similarity_argmax_kernel, tile, own)


def _hopper_tile(query: Tensor, reference: Tensor, pair: Pair, dim: int, joint: bool) -> Tile | None:
    """The tile with which `_joint_hopper` serves these features, or None: it copies tiles of a matrix [B·N, C]."""
    if not joint or pair.query_labels is not None or dim != FOLDED_HEAD_DIM or pair.H == 1:
        return None
    tile = listed_tile("similarity", "joint hopper", target_of(query.device), dim, query.dtype, pair.N_Q)
    fits = tile is not None and pair.N_K >= tile.block_n and all(map(_is_matrix, (query, reference)))
    return tile if fits else None


def _is_matrix(x: Tensor) -> bool:
    """Whether the tokens of all batch rows are rows of one matrix that the bulk copy engine reads."""
    batch, _, tokens, dim = x.shape
    between, across, pitch, step = x.stride()
    one_matrix = pitch > 0 and step == 1 and across == dim and (batch == 1 or between % pitch == 0)
    return one_matrix and x.data_ptr() % COPY_ALIGNMENT == pitch * x.element_size() % COPY_ALIGNMENT == 0


def similarity_topk(
    query, reference, k, similarity, joint, query_labels=None, reference_labels=None, batch_index=None
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], 1 if joint else query.shape[1], query.shape[2])
    dtypes = (torch.int32, torch.float32)
    index, score = (torch.empty((*shape, k), device=query.device, dtype=dtype) for dtype in dtypes)
    pair, dim = _pair(query, reference, joint, query_labels, reference_labels, batch_index)
    pair = _with_norms(pair, query, reference, similarity, joint)
    _prepare(pair, query, reference, joint)
    tile = choose_tile("similarity", "topk", target_of(query.device), dim, query.dtype, shape[2])
    launch(
        _similarity_topk_kernel,
        (shape[0] * shape[1] * triton.cdiv(shape[2], tile.block_m),),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        pair=pair,
        index_ptr=index,
        score_ptr=score,
        K=k,
        SLOTS=triton.next_power_of_2(k),
        **_constants(pair, tile, dim, joint),
    )
    return index, score


def _constants(pair: Pair, tile: Tile, dim: int, joint: bool) -> dict[str, Any]:
    """What is constexpr in both kernels."""
    return {
        "JOINT": joint,
        "SHORT": pair.N_K < tile.block_n,
        "WIDTH": width(dim),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }


def _pair(query, reference, joint, query_labels, reference_labels, batch_index) -> tuple[Pair, int]:
    """What both kernels read, the norms apart, and the channels of one of their heads."""
    heads, dim = query.shape[1], query.shape[3]
    query_features, reference_features = features(query), features(reference)
    heads_in_a_row = all(x.stride(1) == dim * x.stride(3) for x in (query, reference))
    if joint and heads_in_a_row and heads * dim % FOLDED_HEAD_DIM == 0:
        # the same channels as heads without padding
        heads, dim = heads * dim // FOLDED_HEAD_DIM, FOLDED_HEAD_DIM
        query_features, reference_features = (
            x._replace(pitch_h=dim * x.stride_d * query.element_size())
            for x in (query_features, reference_features)
        )
    pair = Pair(
        query=query_features,
        reference=reference_features,
        query_norm_ptr=None,
        reference_norm_ptr=None,
        query_labels=label_arguments(query_labels),
        reference_labels=label_arguments(reference_labels),
        rows_ptr=batch_index,
        rows_stride=0 if batch_index is None else batch_index.stride(0),
        H=heads,
        N_Q=query.shape[2],
        N_K=reference.shape[2],
    )
    return pair, dim


def _with_norms(
    pair: Pair, query: Tensor, reference: Tensor, similarity: str, joint: bool, counted: bool = False
) -> Pair:
    """The pair with room for the inverse norms of the cosine, those of the queries only without counts."""
    if similarity != "cosine":
        return pair
    return pair._replace(
        query_norm_ptr=None if counted else _per_token(query, joint, torch.float32),
        reference_norm_ptr=_per_token(reference, joint, torch.float32),
    )


def _prepare(
    pair: Pair,
    query: Tensor,
    reference: Tensor,
    joint: bool,
    match: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    """Write what the other kernels begin with, in one launch or none.

    That is: the inverse norms that the pair has room for, 1 / max(|x|, 1e-12) of each token, fp32 [B, G, N],
    over its head or over all of them; no match for every query; counts of 0.
    """
    normed = pair.reference_norm_ptr is not None
    if not normed and match is None:
        return
    heads, dim = query.shape[1], query.shape[3]
    maps = 1 if joint else heads
    heads_at_once = min(triton.next_power_of_2(heads // maps), PREPARED_HEADS)
    block = PREPARED_ROWS // heads_at_once
    query_programs, reference_programs = (
        x.shape[0] * maps * triton.cdiv(x.shape[2], block) for x in (query, reference)
    )
    channels = triton.next_power_of_2(dim)
    launch(
        _prepare_kernel,
        (query_programs + (reference_programs if normed else 0),),
        num_warps=max(4, channels // 16),
        num_stages=1,
        query=features(query),
        reference=features(reference),
        query_norm_ptr=pair.query_norm_ptr,
        reference_norm_ptr=pair.reference_norm_ptr,
        match_ptr=match,
        counts_ptr=counts,
        QUERY_PROGRAMS=query_programs,
        MAPS=maps,
        HEADS_PER_MAP=heads // maps,
        N_Q=query.shape[2],
        N_K=reference.shape[2],
        D=dim,
        WIDTH=channels,
        HEADS=heads_at_once,
        BLOCK=block,
    )


@triton.jit
def _store_inverse_norms(
    source,
    norm_ptr,
    program,
    MAPS,
    HEADS_PER_MAP,
    N,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of tokens of one map, HEADS of its heads at once."""
    blocks = tl.cdiv(N, BLOCK)
    row, start = (program // blocks).to(tl.int64), (program % blocks) * BLOCK
    first_head = (row // MAPS) * source.pitch_b + (row % MAPS) * HEADS_PER_MAP * source.pitch_h
    source_ptr = advance(source.pointer, first_head)
    places = tl.arange(0, BLOCK * HEADS)
    tokens, heads = start + places // HEADS, places % HEADS
    offsets = tokens.to(tl.int64) * source.pitch_n + heads.to(tl.int64) * source.pitch_h
    total = tl.zeros([BLOCK * HEADS], tl.float32)
    for head in range(0, HEADS_PER_MAP, HEADS):
        present = (tokens < N) & (heads < HEADS_PER_MAP - head)
        tile = load_rows(Rows(source_ptr, 1, source.stride_d), offsets, present, D, 0, WIDTH, True)
        total += tl.sum(tile.to(tl.float32) * tile.to(tl.float32), 1)
        source_ptr = advance(source_ptr, HEADS * tl.cast(source.pitch_h, tl.int64))
    norm = tl.sqrt_rn(tl.sum(tl.reshape(total, (BLOCK, HEADS)), 1))
    norm = tl.maximum(norm, 1e-12, propagate_nan=tl.PropagateNan.ALL)
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
    query,
    reference,
    query_norm_ptr,
    reference_norm_ptr,
    match_ptr,
    counts_ptr,
    QUERY_PROGRAMS,
    MAPS,
    HEADS_PER_MAP,
    N_Q,
    N_K,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of queries, or of the reference's tokens: the programs of the queries come first."""
    program = tl.program_id(0)
    if program < QUERY_PROGRAMS:
        if match_ptr is not None:
            _clear_matches(match_ptr, counts_ptr, program, N_Q, N_K, BLOCK)
        if query_norm_ptr is not None:
            _store_inverse_norms(
                query, query_norm_ptr, program, MAPS, HEADS_PER_MAP, N_Q, D, WIDTH, HEADS, BLOCK
            )
    elif reference_norm_ptr is not None:
        program -= QUERY_PROGRAMS
        _store_inverse_norms(
            reference, reference_norm_ptr, program, MAPS, HEADS_PER_MAP, N_K, D, WIDTH, HEADS, BLOCK
        )


@triton.jit
def _open_tile(pair, row, row_tile, variant):
    """The tile's queries, those beyond the end as the last one, and their keys."""
    tokens = tl.minimum(row_tile * variant.BLOCK_M + tl.arange(0, variant.BLOCK_M), pair.N_Q - 1).to(tl.int64)
    maps = 1 if variant.JOINT else pair.H
    batch, head = row // maps, row % maps
    reference_batch = reference_row(pair, batch)
    query, reference = rows_of(pair.query, batch, head), rows_of(pair.reference, reference_batch, head)
    channels, labels, norm_ptr, labels_ptr = Parts(0, 0), 0, 0, 0
    if not variant.JOINT:
        channels = load_parts(query, tokens, tokens, variant.WIDTH, False)
    if pair.reference_norm_ptr is not None:
        norm_ptr = pair.reference_norm_ptr + (reference_batch * maps + head) * pair.N_K
    if pair.reference_labels is not None:
        pointers = pair.query_labels.pointer + batch * pair.query_labels.stride_b
        labels = tl.load(pointers + tokens * pair.query_labels.stride_n)
        labels_ptr = pair.reference_labels.pointer + batch * pair.reference_labels.stride_b
    return Opened(tokens, channels, labels, query, reference, norm_ptr, labels_ptr)


@triton.jit
def _score_tile(pair, opened, start, variant):
    """fp32 [BLOCK_M, BLOCK_N] of the keys from `start` on, without the query's norm; -inf where unseen."""
    columns = tl.arange(0, variant.BLOCK_N)
    if variant.SHORT:
        columns = tl.minimum(columns, pair.N_K - 1)
    keys = skip(opened.reference, start.to(tl.int64))
    tokens = columns.to(tl.int64)
    if variant.JOINT:
        scores = _sum_of_heads(pair, opened, keys, tokens, variant)
    else:
        scores = split_scores(opened.channels, keys, tokens, tokens, variant.WIDTH, False)
    if pair.reference_norm_ptr is not None:
        scores *= tl.load(opened.norm_ptr + start + columns)[None, :]
    if pair.reference_labels is not None:
        offsets = (start + columns).to(tl.int64) * pair.reference_labels.stride_n
        labels = tl.load(opened.labels_ptr + offsets)
        scores = tl.where((opened.labels[:, None] & labels[None, :]) != 0, scores, float("-inf"))
    return scores


@triton.jit
def _sum_of_heads(pair, opened, keys, tokens, variant):
    """fp32 [BLOCK_M, BLOCK_N], head after head: the channels of all of them are too many to hold."""
    query_ptr, key_ptr = opened.query.pointer, keys.pointer
    scores = tl.zeros([variant.BLOCK_M, variant.BLOCK_N], tl.float32)
    for _ in range(pair.H):
        query = Rows(query_ptr, pair.query.pitch_n, pair.query.stride_d)
        key = Rows(key_ptr, pair.reference.pitch_n, pair.reference.stride_d)
        scores = _add_head(scores, query, key, opened.tokens, tokens, variant.WIDTH.D, 0, variant.WIDTH.MAIN)
        if variant.WIDTH.TAIL > 0:
            scores = _add_head(
                scores,
                query,
                key,
                opened.tokens,
                tokens,
                variant.WIDTH.D,
                variant.WIDTH.MAIN,
                variant.WIDTH.TAIL,
            )
        query_ptr = advance(query_ptr, pair.query.pitch_h)
        key_ptr = advance(key_ptr, pair.reference.pitch_h)
    return scores


@triton.jit
def _add_head(
    scores, query, key, query_tokens, key_tokens, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr
):
    """The scores plus those over some channels of one head."""
    part = load_rows(query, query_tokens, query_tokens, D, FIRST, WIDTH, False)
    keys = load_rows(key, key_tokens, key_tokens, D, FIRST, WIDTH, False)
    return tl.dot(part, keys.T, scores, input_precision="ieee")


@triton.jit
def _pack(bits, code, PTX: tl.constexpr):
    """int32 with their seven low bits replaced by `code`: two instructions in LLVM, one in inline PTX."""
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
    """The best of rows with a score that is not negative, of the other rows if NEGATIVE.

    There the bits compare as the scores do. Their seven low ones become a code, which is larger the earlier
    the tile and, of two columns, for the even one. The index is the lowest that has the upper bits.
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
    middle = bits ^ (CODES // 2)  # of the scores that share the upper bits
    return Best(middle.to(tl.float32, bitcast=True), index)


@triton.jit
def _best_joint(pair, opened, tiles, variant):
    """The best score of each query, reduced tile after tile: the sum over the heads needs the registers."""
    columns = tl.arange(0, variant.BLOCK_N)[None, :]
    best = Best(
        tl.full([variant.BLOCK_M], float("-inf"), tl.float32), tl.full([variant.BLOCK_M], -1, tl.int32)
    )
    for tile in range(tiles.first, tiles.last):
        start = tl.minimum(tile * variant.BLOCK_N, tiles.last_start)
        best = better(best, best_column(_score_tile(pair, opened, start, variant), start + columns))
    return best


@triton.jit
def _best_exact(pair, opened, tiles, variant):
    """The best score of each query: each column keeps its own until the last tile."""
    columns = tl.arange(0, variant.BLOCK_N)[None, :]
    best = tl.full([variant.BLOCK_M, variant.BLOCK_N], float("-inf"), tl.float32)
    best_tile = tl.zeros([variant.BLOCK_M, variant.BLOCK_N], tl.int32)
    for tile in range(tiles.first, tiles.last):
        start = tl.minimum(tile * variant.BLOCK_N, tiles.last_start)
        scores = _score_tile(pair, opened, start, variant)
        best_tile = tl.where(scores > best, tile, best_tile)
        best = tl.maximum(best, scores, propagate_nan=tl.PropagateNan.ALL)
    return best_column(best, tl.minimum(best_tile * variant.BLOCK_N, tiles.last_start) + columns)


@triton.jit
def _best(pair, opened, tiles, variant, PACKED: tl.constexpr, PTX: tl.constexpr):
    """The best score of each query among the tiles, and its index."""
    if PACKED:
        return _best_packed(pair, opened, tiles, variant, PTX)
    elif variant.JOINT:
        return _best_joint(pair, opened, tiles, variant)
    else:
        return _best_exact(pair, opened, tiles, variant)


@triton.jit
def _similarity_argmax_kernel(
    pair,
    index_ptr,
    score_ptr,
    match_ptr,
    counts_ptr,
    SPLITS,
    TILES_PER_SPLIT,
    JOINT: tl.constexpr,
    PACKED: tl.constexpr,
    PTX: tl.constexpr,
    SHORT: tl.constexpr,
    WIDTH,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of queries of one map against its split of the keys."""
    row_tiles = tl.cdiv(pair.N_Q, BLOCK_M)
    row_tile, split = tl.program_id(0) % row_tiles, (tl.program_id(0) // row_tiles) % SPLITS
    row = (tl.program_id(0) // row_tiles // SPLITS).to(tl.int64)
    opened = _open_tile(pair, row, row_tile, Variant(JOINT, SHORT, WIDTH, BLOCK_M, BLOCK_N))
    first = split * TILES_PER_SPLIT
    last = tl.minimum(first + TILES_PER_SPLIT, tl.cdiv(pair.N_K, BLOCK_N))
    tiles = KeyRange(first, last, tl.maximum(pair.N_K - BLOCK_N, 0))
    best = _best(pair, opened, tiles, Variant(JOINT, SHORT, WIDTH, BLOCK_M, BLOCK_N), PACKED, PTX)
    tokens = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    store_best(pair, Outputs(index_ptr, score_ptr, match_ptr, counts_ptr), row, tokens, best)


@triton.jit
def _unpack_matches_kernel(match_ptr, index_ptr, score_ptr, ROWS, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    score, index = unpack_match(tl.load(match_ptr + rows, mask=rows < ROWS, other=0))
    tl.store(index_ptr + rows, index, mask=rows < ROWS)
    tl.store(score_ptr + rows, score, mask=rows < ROWS)


@triton.jit
def _similarity_topk_kernel(
    pair,
    index_ptr,
    score_ptr,
    K,
    SLOTS: tl.constexpr,
    JOINT: tl.constexpr,
    SHORT: tl.constexpr,
    WIDTH,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of queries of one map: the strongest keys of each tile replace the weakest that are kept."""
    row_tiles = tl.cdiv(pair.N_Q, BLOCK_M)
    row_tile, row = tl.program_id(0) % row_tiles, (tl.program_id(0) // row_tiles).to(tl.int64)
    opened = _open_tile(pair, row, row_tile, Variant(JOINT, SHORT, WIDTH, BLOCK_M, BLOCK_N))
    last_start = tl.maximum(pair.N_K - BLOCK_N, 0)
    kept = tl.full([BLOCK_M, SLOTS], NOTHING, tl.int32)
    kept_index = tl.zeros([BLOCK_M, SLOTS], tl.int32) - 1 - tl.arange(0, SLOTS)[None, :]
    weakest = tl.full([BLOCK_M], NOTHING, tl.int32)
    for tile in range(0, tl.cdiv(pair.N_K, BLOCK_N)):
        start = tl.minimum(tile * BLOCK_N, last_start)
        scores = _score_tile(pair, opened, start, Variant(JOINT, SHORT, WIDTH, BLOCK_M, BLOCK_N))
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
            score *= tl.load(pair.query_norm_ptr + row * pair.N_Q + opened.tokens)
        tl.store(index_ptr + out + rank, tl.maximum(index, -1), mask=tokens < pair.N_Q)
        tl.store(score_ptr + out + rank, tl.where(index >= 0, score, float("-inf")), mask=tokens < pair.N_Q)
