"""similarity_argmax and similarity_topk on Triton.

B batch rows, G maps (1 when joint, else H), H heads, N_Q and N_K tokens, D channels a head.

The argmax, for one tile of queries:

1. `_norms.py` writes the inverse norms of the cosine before.
2. A program walks over its tiles of reference tokens (`_score_tile.py`). The last tile is moved back to end
   at N_K, so that no tile has columns to mask.
3. Every column of a tile keeps its best score and its tile. The columns meet once, after the last tile: three
   instructions for a score, no reduction in the loop. A packed argmax (`_packed.py`) needs one and a half.
4. Where several programs share the tokens of a reference, their matches meet in one 64-bit atomic maximum of
   (score, lowest index). It is exact in any order.

The top k keeps k candidates of each query, of which stronger tokens replace the weakest.
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
from ._matches import Best, KeyRange, Matching, Outputs, Pair, best_column, better, store_best
from ._norms import per_token, prepare, with_norms
from ._occupancy import ASSUMED_PROGRAMS, programs_at_once
from ._packed import CODES, PTX_TARGETS, _best_packed
from ._score_tile import Variant, _open_tile, _score_tile
from ._tile import FAR, NOTHING, features, ordered, unordered, unpack_match, width

UNPACK_BLOCK = 256
FOLDED_HEAD_DIM = 64
COPY_ALIGNMENT = 16  # of rows that the bulk copy engine reads, in bytes


class Choice(NamedTuple):
    """A kernel of the argmax, its tile, and the arguments that only this kernel takes."""

    kernel: Any
    tile: Tile
    own: dict[str, Any]


class FoldedPair(NamedTuple):
    """What the kernels read, with H heads of `head_dim` channels."""

    pair: Pair
    head_dim: int


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
    matching = Matching(query, reference, similarity, joint, query_labels, reference_labels, batch_index)
    index = per_token(query, matching.maps, torch.int32)
    score = per_token(query, matching.maps, torch.float32)
    match = _argmax(matching, exact, Outputs(index, score, None, None))
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

    Matches are packed as `_tile.pack_match` does. The cosine lacks the query's norm, which changes no match.
    """
    matching = Matching(query, reference, similarity, joint, query_labels, reference_labels, batch_index)
    counts = query.new_empty((query.shape[0], matching.maps, reference.shape[2]), dtype=torch.int32)
    match = per_token(query, matching.maps, torch.int64)
    _argmax(matching, True, Outputs(None, None, match, counts))
    return match, counts


def _argmax(matching: Matching, exact: bool, outputs: Outputs) -> Tensor | None:
    """Write the matches, packed or as index and score. Returns packed matches, or None."""
    query, joint, maps = matching.query, matching.joint, matching.maps
    pair, dim = _fold(matching)
    # packing pays only where little else is done for a score
    packed = not exact and not joint and matching.query_labels is None
    kernel, tile, own = _choose(matching, pair, dim, packed)
    programs = query.shape[0] * maps * triton.cdiv(pair.N_Q, tile.block_m)
    key_tiles = triton.cdiv(pair.N_K, tile.block_n)
    most_tiles = CODES.value // 2 if packed else key_tiles
    pair = with_norms(pair, matching, counted=outputs.counts_ptr is not None)
    room = functools.cache(lambda: per_token(query, maps, torch.int64))  # where matches of splits meet

    def arguments(at_once: int) -> dict[str, Any]:
        splits, tiles_per_split = split_keys(programs, key_tiles, most_tiles, at_once)
        needs_room = outputs.match_ptr is None and splits > 1
        return {
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "pair": pair,
            **outputs._replace(match_ptr=room() if needs_room else outputs.match_ptr)._asdict(),
            "SPLITS": splits,
            "TILES_PER_SPLIT": tiles_per_split,
            **own,
        }

    # the compiled kernel says how many of it run at once, and is the same for most divisions of the keys
    chosen = arguments(programs_at_once(kernel, **arguments(ASSUMED_PROGRAMS)))
    prepare(pair, matching, chosen["match_ptr"], outputs.counts_ptr)
    launch(kernel, (programs * chosen["SPLITS"],), **chosen)
    return chosen["match_ptr"]


def _choose(matching: Matching, pair: Pair, dim: int, packed: bool) -> Choice:
    query, reference, joint = matching.query, matching.reference, matching.joint
    tile = _hopper_tile(matching, pair, dim)
    if tile is not None:
        from . import _joint_hopper  # Gluon, which no other call needs

        own = _joint_hopper.arguments(query, reference, tile)
        return Choice(_joint_hopper.joint_argmax_hopper_kernel, tile, own)
    target, mode = target_of(query.device), "joint" if joint else "packed" if packed else "exact"
    tile = choose_tile("similarity", mode, target, dim, query.dtype, pair.N_Q)
    own = {"PACKED": packed, "PTX": target in PTX_TARGETS, **_constants(pair, tile, dim, joint)}
    return Choice(_similarity_argmax_kernel, tile, own)


def _hopper_tile(matching: Matching, pair: Pair, dim: int) -> Tile | None:
    """The tile with which `_joint_hopper` serves a call, or None if it cannot copy its features."""
    query, reference = matching.query, matching.reference
    if not matching.joint or pair.query_labels is not None or dim != FOLDED_HEAD_DIM or pair.H == 1:
        return None
    tile = listed_tile("similarity", "joint hopper", target_of(query.device), dim, query.dtype, pair.N_Q)
    fits = tile is not None and pair.N_K >= tile.block_n and all(map(_is_matrix, (query, reference)))
    return tile if fits else None


def _is_matrix(x: Tensor) -> bool:
    """Whether the tokens of all batch rows are rows of one matrix that the bulk copy engine can read."""
    batch, _, tokens, dim = x.shape
    between, across, pitch, step = x.stride()
    one_matrix = pitch > 0 and step == 1 and across == dim and (batch == 1 or between % pitch == 0)
    return one_matrix and x.data_ptr() % COPY_ALIGNMENT == pitch * x.element_size() % COPY_ALIGNMENT == 0


def similarity_topk(
    query, reference, k, similarity, joint, query_labels=None, reference_labels=None, batch_index=None
) -> tuple[Tensor, Tensor]:
    matching = Matching(query, reference, similarity, joint, query_labels, reference_labels, batch_index)
    shape = (query.shape[0], matching.maps, query.shape[2])
    dtypes = (torch.int32, torch.float32)
    index, score = (torch.empty((*shape, k), device=query.device, dtype=dtype) for dtype in dtypes)
    pair, dim = _fold(matching)
    pair = with_norms(pair, matching)
    prepare(pair, matching)
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
    """The constexpr arguments of both kernels."""
    return {
        "JOINT": joint,
        "SHORT": pair.N_K < tile.block_n,
        "WIDTH": width(dim),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }


def _fold(matching: Matching) -> FoldedPair:
    """What both kernels read, without the norms; channels of a joint map in heads that need no padding."""
    query, reference, batch_index = matching.query, matching.reference, matching.batch_index
    heads, dim = query.shape[1], query.shape[3]
    query_features, reference_features = features(query), features(reference)
    heads_in_a_row = all(x.stride(1) == dim * x.stride(3) for x in (query, reference))
    if matching.joint and heads_in_a_row and heads * dim % FOLDED_HEAD_DIM == 0:
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
        query_labels=label_arguments(matching.query_labels),
        reference_labels=label_arguments(matching.reference_labels),
        rows_ptr=batch_index,
        rows_stride=0 if batch_index is None else batch_index.stride(0),
        rows_number=None if batch_index is None else reference.shape[0],
        H=heads,
        N_Q=query.shape[2],
        N_K=reference.shape[2],
    )
    return FoldedPair(pair, dim)


@triton.jit
def _best_joint(pair, opened, tiles, variant):
    """The best score of each query, reduced after every tile: the sum over the heads needs the registers."""
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
    """Find the best keys of a tile of queries of one map, in its split of the keys."""
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
    """A tile of queries of one map, and its K best keys.

    1. Score a tile of keys.
    2. As long as a query has a key in the tile that is stronger than its weakest kept key, the strongest of
       these keys replaces the weakest.
    3. After the last tile, write the kept keys, the best score first, the lowest index first among equals.
    """
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
            # among equally weak keys, the highest index leaves; each empty slot has its own negative index
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
