"""The measured ops: the call, its check against float64 and its FLOPs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import qalign_kernels as qk

from .. import Segment
from .checks import (
    STRENGTH,
    TOPK,
    check_attention,
    check_gather,
    check_gradient,
    check_guided,
    check_match,
    check_probe,
    check_qalign,
    check_step,
    check_topk_attention,
    check_warped_output,
    distillation_step,
    gradient,
    joint_map,
)
from .measure import NUM_LABELS, Inputs, Sizes, draw_inputs, in_processor_layout

CONTRAST = 1.67
MATCHED_FRACTION = 0.55  # of the reference tokens, for correlated queries
SDPA = "sdpa"
WARM_UP_TOKENS = 64


class Op(NamedTuple):
    """A measured op.

    Attributes:
        name: the name on the command line and in the table.
        run: `run(inputs, backend)` is the measured call.
        check: `check(inputs, result, backend)` is whether the result is within the error budget.
        flops: FLOPs of the op's formula by sizes, whatever the implementation does; None if it has none.
        correlated: the queries are noisy copies of reference tokens.
        match_map: `match_map(inputs, result, backend)` gives the match map that the op uses; None if it uses
            none.
        learned: the op computes gradients, for which autograd saves tensors.
    """

    name: str
    run: Callable[[Inputs, str], Any]
    check: Callable[[Inputs, Any, str], bool]
    flops: Callable[[Sizes], float] | None
    correlated: bool = False
    match_map: Callable[[Inputs, Any, str], Tensor] | None = None
    learned: bool = False


def _qalign(x: Inputs, backend: str, **settings: Any) -> Tensor:
    return qk.qalign_attention(x.query, x.ref_query, x.key, x.value, backend=backend, **settings)


def _segment(x: Inputs, **settings: Any) -> Segment:
    return Segment(x.key, x.value, **settings)


def _match_flops(sizes: Sizes) -> float:
    """FLOPs of the product of queries and keys: 2·E·D."""
    return 2 * sizes.scores * sizes.head_dim


def attention_flops(sizes: Sizes) -> float:
    """FLOPs of the products with keys and with values: 2·E·(D + D_v)."""
    return 2 * sizes.scores * (sizes.head_dim + sizes.value_dim)


def _attention_op(name: str, options: Callable[[Inputs], dict], contrast: float = 1.0) -> Op:
    """An op over one segment. `options` gives its settings, and `query_labels` if it has labels."""

    def parts(x: Inputs) -> tuple[Segment, Tensor | None]:
        settings = options(x)
        query_labels = settings.pop("query_labels", None)
        return _segment(x, **settings), query_labels

    def run(x: Inputs, backend: str) -> Tensor:
        segment, query_labels = parts(x)
        return qk.attention(x.query, segment, contrast=contrast, query_labels=query_labels, backend=backend)

    def check(x: Inputs, output: Tensor, backend: str) -> bool:
        segment, query_labels = parts(x)
        return check_attention(x, output, [segment], contrast, query_labels)

    counted = name == "attention_counts"
    match_map = (lambda x, output, backend: x.match_map) if counted else None
    return Op(name, run, check, attention_flops, match_map=match_map)


def _topk_flops(sizes: Sizes) -> float:
    chosen = sizes.batch * sizes.heads * sizes.tokens * TOPK
    return _match_flops(sizes) + 2 * chosen * (sizes.head_dim + sizes.value_dim)


def _two_segments(x: Inputs) -> list[Segment]:
    return [Segment(x.ref_query, x.value), _segment(x)]


OPS = [
    Op(
        "similarity_argmax",
        lambda x, backend: qk.similarity_argmax(x.query, x.ref_query, backend=backend),
        lambda x, match, backend: check_match(x, match, "cosine", True),
        _match_flops,
        match_map=lambda x, match, backend: match.index,
    ),
    Op(
        "similarity_argmax_per_head",
        lambda x, backend: qk.similarity_argmax(
            x.query, x.ref_query, similarity="dot", heads="per_head", backend=backend
        ),
        lambda x, match, backend: check_match(x, match, "dot", False),
        _match_flops,
        match_map=lambda x, match, backend: match.index,
    ),
    Op(
        "similarity_argmax_packed",
        lambda x, backend: qk.similarity_argmax(
            x.query, x.ref_query, similarity="dot", heads="per_head", exact=False, backend=backend
        ),
        lambda x, match, backend: check_match(x, match, "dot", False, packed=True),
        _match_flops,
        match_map=lambda x, match, backend: match.index,
    ),
    Op(
        "similarity_topk",
        lambda x, backend: qk.similarity_topk(x.query, x.ref_query, TOPK, backend=backend),
        lambda x, match, backend: check_match(x, match, "cosine", True),
        _match_flops,
    ),
    Op(
        "match_counts",
        lambda x, backend: qk.match_counts(x.match_map, x.key.shape[2], backend=backend),
        lambda x, counts, backend: torch.equal(counts, x.counts),
        None,
        match_map=lambda x, counts, backend: x.match_map,
    ),
    Op(
        "rearrange_kv",
        lambda x, backend: qk.rearrange_kv(x.key, x.value, x.match_map, backend=backend),
        check_gather,
        None,
    ),
    _attention_op("attention", lambda x: {}),
    _attention_op("attention_counts", lambda x: {"counts": x.counts}),
    _attention_op("attention_contrast", lambda x: {}, contrast=CONTRAST),
    _attention_op("attention_labels", lambda x: {"labels": x.bit_sets, "query_labels": x.query_bit_sets}),
    _attention_op(
        "attention_half_labels", lambda x: {"labels": x.half_sets, "query_labels": x.query_half_sets}
    ),
    Op(
        "attention_segments",
        lambda x, backend: qk.attention(x.query, _two_segments(x), backend=backend),
        lambda x, output, backend: check_attention(x, output, _two_segments(x)),
        lambda sizes: 2 * attention_flops(sizes),
    ),
    Op("attention_gradient", gradient, check_gradient, lambda x: 3.5 * attention_flops(x), learned=True),
    Op(
        "distillation_step",
        distillation_step,
        check_step,
        lambda x: 4.5 * attention_flops(x),
        learned=True,
    ),
    Op(
        "label_mass",
        lambda x, backend: qk.label_mass(x.query, x.key, x.classes, NUM_LABELS, backend=backend),
        lambda x, mass, backend: check_probe(x, mass, "label_mass", x.classes, NUM_LABELS, token_axis=2),
        lambda sizes: _match_flops(sizes) + 2 * sizes.scores * NUM_LABELS,
    ),
    Op(
        "mean_attention_map",
        lambda x, backend: qk.mean_attention_map(x.query, x.key, backend=backend),
        lambda x, mean, backend: check_probe(x, mean, "mean_attention_map", token_axis=1),
        _match_flops,
    ),
    *(
        Op(
            name,
            lambda x, backend: _qalign(x, backend),
            check_qalign,
            lambda sizes: _match_flops(sizes) + attention_flops(sizes),
            correlated=correlated,
            match_map=lambda x, output, backend: joint_map(x, backend).index,
        )
        for name, correlated in (("qalign_attention", False), ("qalign_attention_correlated", True))
    ),
    Op(
        "qalign_attention_guided",
        lambda x, backend: _qalign(x, backend, refinement="guided", strength=STRENGTH),
        check_guided,
        lambda sizes: _match_flops(sizes) + attention_flops(sizes),
    ),
    Op(
        "qalign_attention_warped_output",
        lambda x, backend: _qalign(x, backend, refinement="warped_output"),
        check_warped_output,
        lambda sizes: _match_flops(sizes) + attention_flops(sizes),
        match_map=lambda x, output, backend: joint_map(x, backend).index,
    ),
    Op(
        "qalign_attention_topk",
        lambda x, backend: _qalign(x, backend, refinement="topk", topk=TOPK),
        check_topk_attention,
        _topk_flops,
    ),
]


def op_named(name: str) -> Op:
    return next(op for op in OPS if op.name == name)


def draw(op: Op, sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    """Draw the inputs of an op in the memory layout of attention processors."""
    fraction = MATCHED_FRACTION if op.correlated else None
    return in_processor_layout(draw_inputs(sizes, dtype, device, matched_fraction=fraction))


def build(provider: str, op: Op, inputs: Inputs) -> Callable[[], Any]:
    """Make a function without arguments that runs the op on a backend, or SDPA on the same tensors."""
    if provider == SDPA:
        return lambda: scaled_dot_product_attention(inputs.query, inputs.key, inputs.value)
    return lambda: op.run(inputs, provider)


def prepare(provider: str, op_name: str, sizes: Sizes, dtype: torch.dtype) -> Callable[[], Any]:
    """Build a call on the CPU after a small one, so that the measurement has no one-time loading."""
    op = op_named(op_name)
    small = sizes._replace(batch=1, tokens=WARM_UP_TOKENS, key_tokens=WARM_UP_TOKENS)
    build(provider, op, draw(op, small, dtype, "cpu"))()
    return build(provider, op, draw(op, sizes, dtype, "cpu"))
