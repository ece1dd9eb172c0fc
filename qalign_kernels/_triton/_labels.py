"""Tokens sorted by their label sets, so that a tile of queries meets few keys that it does not see.

A label set belongs to a class: 0 has several labels, 1 all of them (-1), 2 + b the label b alone, 34 none.

1. Tokens are sorted by class, and keep their order within a class.
2. A tile of queries of one class sees the keys of its own class, and those with all labels, without comparing
   labels. It compares labels only with keys of several labels.
3. A tile with queries of several classes compares labels with the keys of all classes in its range.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from .rearrange import Multiplicity

SORTED_FROM = 2048  # queries, and keys of a segment with labels: with fewer, sorting costs what it saves
SORT_BLOCK = 1024
CLASSES = tl.constexpr(35)
NONE = tl.constexpr(34)  # the class of the empty set


class Labels(NamedTuple):
    """The label sets of tokens, int32 [B or 1, N]. One row serves all batch rows by a stride of 0."""

    pointer: Any
    stride_b: Any
    stride_n: Any


class Spans(NamedTuple):
    """Which sorted keys a tile of queries meets.

    The first `whole` keys come in whole tiles, without comparing labels. The next `compared` keys are
    compared. The other fields say where these keys lie in the order: see `free_slot` and `compared_slots`.
    """

    whole: Any
    compared: Any
    several: Any
    own_start: Any
    whole_first: Any
    free_own: Any
    rest_first: Any
    compared_first: Any


class SortedTokens(NamedTuple):
    """Tokens in the order of their classes."""

    order: Tensor  # int32 [B_l, 1, N], or as the order of a multiplicity
    weights: Tensor | None  # float32, the counts in this order
    log_weights: Tensor | None  # float32, log2 of the counts
    starts: Tensor  # int32 [..., 36], where each class starts; the last entry is the number of tokens


def label_arguments(labels: Tensor | None) -> Labels | None:
    """Labels as kernels take them."""
    if labels is None:
        return None
    return Labels(labels, labels.stride(0) if labels.shape[0] > 1 else 0, labels.stride(1))


def sort_tokens(labels: Tensor, multiplicity: Multiplicity | None = None) -> SortedTokens:
    """Sort tokens by the class of their labels [B_l, N]: all tokens, or those that a multiplicity chose."""
    tokens = labels.shape[1]
    shape = (labels.shape[0], 1, tokens) if multiplicity is None else multiplicity.weights.shape
    order = torch.empty(shape, device=labels.device, dtype=torch.int32)
    weights = log_weights = given_order = given_weights = given_unique = None
    if multiplicity is not None:
        weights, log_weights = (
            torch.empty(shape, device=labels.device, dtype=torch.float32) for _ in range(2)
        )
        given_order, given_weights, given_unique = (
            multiplicity.order,
            multiplicity.weights,
            multiplicity.unique,
        )
    starts = torch.empty((*shape[:2], CLASSES.value + 1), device=labels.device, dtype=torch.int32)
    launch(
        _sort_tokens_kernel,
        (shape[0] * shape[1],),
        num_warps=8,
        num_stages=1,
        labels=label_arguments(labels),
        given_order_ptr=given_order,
        given_weights_ptr=given_weights,
        given_unique_ptr=given_unique,
        order_ptr=order,
        weights_ptr=weights,
        log_weights_ptr=log_weights,
        starts_ptr=starts,
        G=shape[1],
        N=tokens,
        BLOCK=SORT_BLOCK,
    )
    return SortedTokens(order, weights, log_weights, starts)


def sort_queries(query_labels: Tensor | None, key_labels: Iterable[Tensor | None]) -> Tensor | None:
    """The order of the queries, or None if sorting queries and keys by label would not save time."""
    if query_labels is None or query_labels.shape[1] < SORTED_FROM:
        return None
    if all(labels is None or labels.shape[1] < SORTED_FROM for labels in key_labels):
        return None
    return sort_tokens(query_labels).order


@triton.jit
def label_class(labels):
    """The class of each int32 bit set."""
    bits = labels.to(tl.uint32, bitcast=True)
    # the exponent of a single bit is its position
    power = bits.to(tl.float32).to(tl.int32, bitcast=True)
    single = 2 + ((power >> 23) & 255) - 127
    several = tl.where(labels == -1, 1, 0)
    return tl.where(bits == 0, NONE, tl.where((bits & (bits - 1)) == 0, single, several))


@triton.jit
def _or(left, right):
    return left | right


@triton.jit
def _tokens_at(slots, inside, given_order_ptr, labels_ptr, stride_n):
    """The tokens of some slots and their classes. A slot that is not inside has class NONE."""
    tokens = slots
    if given_order_ptr is not None:
        tokens = tl.load(given_order_ptr + slots, mask=inside, other=0)
    labels = tl.load(labels_ptr + tokens.to(tl.int64) * stride_n, mask=inside, other=0)
    return tokens, label_class(labels)


@triton.jit
def _sort_tokens_kernel(
    labels,
    given_order_ptr,
    given_weights_ptr,
    given_unique_ptr,
    order_ptr,
    weights_ptr,
    log_weights_ptr,
    starts_ptr,
    G,
    N,
    BLOCK: tl.constexpr,
):
    """Sort the tokens of one row.

    1. Find out which classes occur.
    2. For each of them, scan all tokens and write those of the class behind the ones before.
    """
    row = tl.program_id(0).to(tl.int64)
    labels_ptr = labels.pointer + (row // G) * labels.stride_b
    order_ptr += row * N
    starts_ptr += row * (CLASSES + 1)
    number = N
    if given_order_ptr is not None:
        given_order_ptr += row * N
        given_weights_ptr += row * N
        weights_ptr += row * N
        log_weights_ptr += row * N
        number = tl.load(given_unique_ptr + row)
    occurring = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, number, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        tokens, classes = _tokens_at(slots, slots < number, given_order_ptr, labels_ptr, labels.stride_n)
        occurring |= tl.where(slots < number, tl.full((BLOCK,), 1, tl.int64) << classes.to(tl.int64), 0)
    occurring = tl.reduce(occurring, 0, _or)
    sorted_before = 0
    for current in range(0, CLASSES):
        tl.store(starts_ptr + current, sorted_before)
        for start in range(0, tl.where((occurring >> current) & 1 != 0, number, 0), BLOCK):
            slots = start + tl.arange(0, BLOCK)
            tokens, classes = _tokens_at(slots, slots < number, given_order_ptr, labels_ptr, labels.stride_n)
            member = (slots < number) & (classes == current)
            target = sorted_before + tl.cumsum(member.to(tl.int32), 0) - 1
            tl.store(order_ptr + target, tokens, mask=member)
            if given_order_ptr is not None:
                weights = tl.load(given_weights_ptr + slots, mask=member, other=1.0)
                tl.store(weights_ptr + target, weights, mask=member)
                tl.store(log_weights_ptr + target, tl.math.log2(weights), mask=member)
            sorted_before += tl.sum(member.to(tl.int32), 0)
    tl.store(starts_ptr + CLASSES, sorted_before)


@triton.jit
def visible_spans(starts_ptr, lowest, highest, BLOCK_N: tl.constexpr):
    """Which sorted keys queries of the classes from `lowest` to `highest` meet.

    Queries of one class see the keys with all labels, and those of their own class, without comparing. They
    are compared with keys of several labels. Queries of several classes are compared with every class in
    their range.
    """
    several, everything, end = tl.load(starts_ptr + 1), tl.load(starts_ptr + 2), tl.load(starts_ptr + NONE)
    own_start = tl.load(starts_ptr + lowest)
    own = tl.load(starts_ptr + tl.minimum(highest + 1, NONE)) - own_start  # 0 for the empty set
    one_label, all_labels = (lowest == highest) & (lowest > 1), (lowest == highest) & (lowest == 1)
    free_first = tl.where(
        all_labels, end - several, tl.where(one_label & (lowest < NONE), everything - several, 0)
    )
    free_own = tl.where(one_label, own, 0) // BLOCK_N * BLOCK_N
    compared_first = tl.where(
        lowest == NONE, 0, tl.where(one_label | all_labels, several, tl.where(lowest > 1, everything, end))
    )
    compared_own = tl.where(lowest > 1, own - free_own, 0)
    whole_first = free_first // BLOCK_N * BLOCK_N
    rest_first = free_first - whole_first
    return Spans(
        whole_first + free_own,
        rest_first + compared_first + compared_own,
        several,
        own_start,
        whole_first,
        free_own,
        rest_first,
        compared_first,
    )


@triton.jit
def free_slot(start, spans):
    """Where the keys of a whole tile begin in the order."""
    return tl.where(
        start < spans.whole_first, spans.several + start, spans.own_start + start - spans.whole_first
    )


@triton.jit
def compared_slots(positions, spans):
    """Where compared keys are: the rest of the keys with all labels, the first classes, the own classes."""
    others = positions - spans.rest_first
    last = others - spans.compared_first
    return tl.where(
        others < 0,
        spans.several + spans.whole_first + positions,
        tl.where(last < 0, others, spans.own_start + spans.free_own + last),
    )
