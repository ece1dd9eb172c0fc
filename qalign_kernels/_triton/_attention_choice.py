"""Which kernel serves a call of attention, with which tile, and in which variant.

`choose` looks at the shapes, strides and settings of a call, never at the values of its tensors:

1. A call with one segment and no labels takes the kernel for Hopper (`_attention_hopper.py`), if
   `tiles.json` lists a tile for it and the bulk copy engine can read its tensors.
2. Every other call takes `attention.attention_kernel`, with the tile of its mode.
3. A FIXED kernel first tries the largest logit of the first key tile as the maximum of all key tiles.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ._configs import Tile, choose_tile, listed_tile, split_head_dim
from ._launch import launch, target_of
from ._segments import SegmentArguments, unsigned

LN_2 = 0.6931471805599453
FIXED_TARGETS = ("sm_90", "interpreter")
LOOP_TARGETS = ("sm_90", "interpreter")  # see `loop_once`; in the interpreter tests run these loops
# the largest head dims for which the kernel with both loops does not spill on these targets
FIXED_WIDTHS = {"plain": 128, "counts": 128, "distance": 64}
COPY_ALIGNMENT = 16  # of rows that the bulk copy engine reads, in bytes
NARROWEST_VALUE = 16  # channels that a kernel without output is compiled for


class AttentionCall(NamedTuple):
    """The tensors and settings of one launch of attention.

    Without an `output` the launch computes the log-sum-exp only. With a `known` log2-sum-exp the weights are
    contrasted.

    Args:
        query: [B, H, N_Q, D].
        segments: The keys and values, as `_segments.segment_arguments` makes them.
        output: [B, H, N_Q, D_V]. It is written and contiguous; with a `distance` it is read and compared, and
            may have any strides.
        lse: float32 [B, H, N_Q], written in `lse_unit`: ln 2 for natural logarithms, 1 for base 2.
        query_labels: int32 [B or 1, N_Q], the label sets of the queries.
        query_order: int32 [B or 1, 1, N_Q]. Tiles take queries in this order where segments are sorted by
            label.
        guide: Features of queries and keys whose products are added to the logits, and their strength.
        contrast: The factor c of the contrast.
        known: float32 [B, H, N_Q], the log2-sum-exp of a first launch.
        exact_weights: Whether weights meet the values unrounded.
        match: int64 [B, G, N_Q] as `_tile.pack_match` makes it, of the maps of the first segment's counts.
            Queries whose match has score NaN give NaN.
        distance: float32 [B, H, N_Q], the mean of |output - attention| over the channels of each query.
        signs: int8 [B, H, N_Q, D_V], contiguous, the signs of output - attention.
    """

    query: Tensor
    segments: Sequence[SegmentArguments]
    output: Tensor | None = None
    lse: Tensor | None = None
    lse_unit: float = LN_2
    query_labels: Tensor | None = None
    query_order: Tensor | None = None
    guide: Any = None
    contrast: float = 1.0
    known: Tensor | None = None
    exact_weights: bool = False
    match: Tensor | None = None
    distance: Tensor | None = None
    signs: Tensor | None = None

    @property
    def value_dim(self) -> int:
        """D_V, the channels of a value."""
        return NARROWEST_VALUE if self.output is None else self.output.shape[3]


class Choice(NamedTuple):
    """How a call is served."""

    tile: Tile
    hopper: bool  # whether by the kernel for Hopper
    fixed: bool  # whether the maximum of the first key tile may serve for all tiles
    loop_once: bool  # whether every product stands in a loop


def choose(call: AttentionCall) -> Choice:
    query, mode, target = call.query, _tile_mode(call), target_of(call.query.device)
    dim, tokens = query.shape[3], query.shape[2]
    looped = loop_once(target, (dim,) if call.output is None else (dim, call.value_dim))
    tile = _hopper_tile(call, mode)
    if tile is not None:
        return Choice(tile, True, _fixed(call), looped)
    tile = choose_tile("attention", mode, target, max(dim, call.value_dim), query.dtype, tokens)
    return Choice(tile, False, _fixed(call), looped)


def loop_once(target: str, dims: tuple[int, ...]) -> bool:
    """Whether every product stands in a pipelined loop, even one that is computed once.

    ptxas 12.8, the assembler of Triton 3.6 and 3.7, reads wrong addresses on sm_90 where a part of a head dim
    has fewer than 64 channels and its product stands outside such a loop. `make static` finds these products
    as stray descriptors. Wider parts are faster without the loop.
    """
    return target in LOOP_TARGETS and min(part for dim in dims for part in split_head_dim(dim) if part) < 64


def _tile_mode(call: AttentionCall) -> str:
    """The mode of `_configs.WORK`."""
    if call.guide is not None or call.exact_weights:
        return "guided" if call.guide is not None else "exact"
    if call.output is None:
        return "lse"
    counted = any(s.weights_ptr is not None for s in call.segments)
    labelled = any(s.labels is not None for s in call.segments)
    busy = labelled or (counted and len(call.segments) > 1) or call.distance is not None
    if call.known is not None:
        return "busy contrast" if busy else "contrast"
    return "busy softmax" if busy else "counted softmax" if counted else "softmax"


def _fixed(call: AttentionCall) -> bool:
    """Whether the maximum of the first key tile may serve for all tiles.

    Weights need the range of float32, and every query must see a key of the first tile.
    """
    query, segments, output = call.query, call.segments, call.output
    unsorted = any(s.labels is not None and s.starts_ptr is None for s in segments)
    if call.known is not None or call.exact_weights or query.dtype == torch.float16 or unsorted:
        return False
    compared, counted = call.distance is not None, segments[0].weights_ptr is not None
    kind = "distance" if compared else "counts" if counted else "plain"
    narrow = output is None or max(query.shape[3], output.shape[3]) <= FIXED_WIDTHS[kind]
    return narrow and (output is None or len(segments) == 1) and target_of(query.device) in FIXED_TARGETS


def _hopper_tile(call: AttentionCall, mode: str) -> Tile | None:
    """The tile with which `_attention_hopper` serves a call, or None where it does not serve it."""
    query, output, (segment, *others) = call.query, call.output, call.segments
    if mode not in ("softmax", "counted softmax") or others or segment.order_ptr is not None:
        return None
    target, dim, tokens = target_of(query.device), query.shape[3], query.shape[2]
    tile = listed_tile("attention", f"{mode} hopper", target, dim, query.dtype, tokens)
    if tile is None or output is None or output.shape[3] != dim or segment.N_K < tile.block_n:
        return None
    return tile if all(map(_is_copied, (query, *_copied(segment)))) else None


def _copied(segment: SegmentArguments) -> list[Tensor]:
    """The keys and the values of a segment."""
    return [x.pointer for x in (segment.key, segment.value) if x is not None]


def _is_copied(x: Tensor) -> bool:
    """Whether the bulk copy engine can read tiles of these features."""
    *apart, step = (stride for stride, size in zip(x.stride(), x.shape) if size > 1)
    addresses = (x.data_ptr(), *(stride * x.element_size() for stride in apart))
    return step == 1 and all(apart) and not any(address % COPY_ALIGNMENT for address in addresses)


def launch_hopper(call: AttentionCall, choice: Choice) -> None:
    from . import _attention_hopper  # Gluon, which no other call needs

    query, tile, segment = call.query, choice.tile, call.segments[0]
    key, value = _copied(segment)
    launch(
        _attention_hopper.attention_hopper_kernel,
        (triton.cdiv(query.shape[2], tile.block_m) * query.shape[0] * query.shape[1],),
        num_warps=tile.num_warps // _attention_hopper.CONSUMERS.value,
        num_stages=1,
        segment=unsigned(segment),
        output_ptr=call.output,
        lse_ptr=call.lse,
        lse_unit=call.lse_unit,
        match_ptr=call.match,
        H=query.shape[1],
        N_Q=query.shape[2],
        FIXED=choice.fixed,
        **_attention_hopper.arguments(query, key, value, tile),
    )
