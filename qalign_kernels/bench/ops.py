"""The ops as they are measured: our call, its check against float64 on sampled rows, its FLOPs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import qalign_kernels as qk

from .. import Segment, _backends, testing
from ..attention import Guide
from ..qalign_attention import unit
from .measure import NUM_LABELS, Inputs, Sizes, draw_inputs, in_processor_layout

CHECKED_ROWS = 256
TOPK, STRENGTH, CONTRAST = 8, 20.0, 1.67
MATCHED_FRACTION = 0.55  # of the reference tokens, where queries are correlated with them
SDPA = "sdpa"
WARM_UP_TOKENS = 64


class Op(NamedTuple):
    """`run(inputs, backend)` is ours; `check(inputs, result, backend)` holds it against float64; FLOPs are of the definition, whoever runs it.
    `learned`: it takes gradients, for which something is saved."""

    name: str
    run: Callable[[Inputs, str], Any]
    check: Callable[[Inputs, Any, str], bool]
    flops: Callable[[Sizes], float] | None
    correlated: bool = False
    match_map: Callable[[Inputs, Any, str], Tensor] | None = None
    learned: bool = False


def sampled_rows(x: Inputs) -> Tensor:
    """Sampled query rows, the first and the last among them."""
    tokens = x.query.shape[2]
    return torch.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS), device=x.query.device).long()


def _double(*tensors: Tensor) -> list[Tensor]:
    return [x.double() for x in tensors]


def _reference(stem: str) -> Any:
    return _backends.implementation("reference", stem)


def _scores(x: Inputs, similarity: str, joint: bool, labels: bool) -> tuple[Tensor, Tensor]:
    """Scores of the sampled rows in the input dtype and in float64."""
    rows = sampled_rows(x)
    query, sets = x.query[:, :, rows], (x.query_bit_sets[:, rows], x.bit_sets) if labels else ()
    return tuple(
        _reference("similarity").scores(*pair, similarity, joint, *sets)
        for pair in ((query, x.ref_query), _double(query, x.ref_query))
    )


def check_match(
    x: Inputs, match: Any, similarity: str, joint: bool, packed: bool = False, labels: bool = False
) -> bool:
    reduction = x.query.shape[3] * (x.query.shape[1] if joint else 1)
    index, score = (part[:, :, sampled_rows(x)] for part in match)
    return testing.judge_match(
        index, score, *_scores(x, similarity, joint, labels), reduction, packed=packed
    ).passed


def check_attention(
    x: Inputs,
    output: Tensor,
    segments: list[Segment],
    contrast: float = 1.0,
    labels: Tensor | None = None,
    guide: Guide | None = None,
) -> bool:
    rows = sampled_rows(x)
    query = x.query[:, :, rows]
    seen = {"query_labels": None if labels is None else labels[:, rows]}
    scale, reduction = query.shape[-1] ** -0.5, sum(s.key.shape[2] for s in segments)
    results = []
    for dtype in (query.dtype, torch.float64):
        parts = [
            Segment(s.key.to(dtype), s.value.to(dtype), counts=s.counts, labels=s.labels) for s in segments
        ]
        guided = (
            None
            if guide is None
            else Guide(guide.query[:, :, rows].to(dtype), guide.key.to(dtype), guide.strength)
        )
        results.append(
            _reference("attention").attention(
                query.to(dtype), parts, scale=scale, contrast=contrast, guide=guided, **seen
            )[0]
        )
    same, truth = results
    return testing.judge(output[:, :, rows], same, truth, reduction).passed


def _check_counted(x: Inputs, output: Tensor, index: Tensor) -> bool:
    counts = torch.zeros((*index.shape[:2], x.key.shape[2]), device=index.device, dtype=torch.int32)
    counts.scatter_add_(2, index.long(), torch.ones_like(index))
    return check_attention(x, output, [_segment(x, counts=counts)])


def _joint_map(x: Inputs, backend: str) -> qk.Match:
    return qk.similarity_argmax(x.query, x.ref_query, backend=backend)


def _qalign(x: Inputs, backend: str, **how: Any) -> Tensor:
    return qk.qalign_attention(x.query, x.ref_query, x.key, x.value, backend=backend, **how)


def _check_qalign(x: Inputs, output: Tensor, backend: str) -> bool:
    match = _joint_map(x, backend)
    return check_match(x, match, "cosine", True) and _check_counted(x, output, match.index)


def _check_warped_output(x: Inputs, output: Tensor, backend: str) -> bool:
    match, rows = _joint_map(x, backend), sampled_rows(x)
    index = match.index[:, :, rows].long().unsqueeze(-1)
    asking = x.ref_query.gather(2, index.expand(-1, x.ref_query.shape[1], -1, x.ref_query.shape[3]))
    reference, scale = _reference("attention").attention, x.query.shape[3] ** -0.5
    parts = (asking, x.key, x.value)
    same, truth = (
        reference(query, [Segment(key, value)], scale=scale)[0]
        for query, key, value in (parts, _double(*parts))
    )
    return (
        check_match(x, match, "cosine", True)
        and testing.judge(output[:, :, rows], same, truth, x.query.shape[3] + x.key.shape[2]).passed
    )


def _check_guided(x: Inputs, output: Tensor, backend: str) -> bool:
    return check_attention(
        x, output, [Segment(x.key, x.value)], guide=Guide(unit(x.query), unit(x.ref_query), STRENGTH)
    )


def _check_topk_attention(x: Inputs, output: Tensor, backend: str) -> bool:
    match = qk.similarity_topk(x.query, x.ref_query, TOPK, backend=backend)
    rows = sampled_rows(x)
    index, reference, scale = (
        match.index[:, :, rows],
        _reference("qalign_attention").topk_attention,
        x.query.shape[3] ** -0.5,
    )
    parts = (x.query[:, :, rows], x.key, x.value)
    same, truth = reference(*parts, index, scale=scale), reference(*_double(*parts), index, scale=scale)
    return (
        check_match(x, match, "cosine", True) and testing.judge(output[:, :, rows], same, truth, TOPK).passed
    )


def _check_probe(x: Inputs, result: Tensor, name: str, *more: Any, token_axis: int) -> bool:
    rows, function, scale = sampled_rows(x), getattr(_reference("probe"), name), x.query.shape[3] ** -0.5
    query = x.query[:, :, rows]
    same, truth = (
        function(query, x.key, *more, scale=scale),
        function(*_double(query, x.key), *more, scale=scale),
    )
    return testing.judge(result.index_select(token_axis, rows), same, truth, x.key.shape[2]).passed


def _check_gather(x: Inputs, result: tuple[Tensor, Tensor], backend: str) -> bool:
    truth = _reference("rearrange").rearrange_kv(x.key, x.value, x.match_map)
    return all(torch.equal(mine, theirs) for mine, theirs in zip(result, truth))


def gradient(x: Inputs, backend: str, shared: bool = False) -> tuple[Tensor, ...]:
    """Of query, key and value, for an output weighted by `output_gradient`; `shared`: each query row reads its
    keys through a batch index."""
    leaves = learned(x.query, x.key, x.value)
    batch_index = torch.arange(x.query.shape[0], device=x.query.device, dtype=torch.int32) if shared else None
    with torch.enable_grad():
        output = qk.attention(leaves[0], Segment(*leaves[1:], batch_index=batch_index), backend=backend)
        return torch.autograd.grad(output, leaves, grad_outputs=x.output_gradient)


def check_gradient(x: Inputs, gradients: tuple[Tensor, ...], backend: str, shared: bool = False) -> bool:
    """Of sampled queries; of keys and values, which sum over all queries, in a second call that has the sampled ones alone."""
    rows = sampled_rows(x)
    few = x._replace(query=x.query[:, :, rows], output_gradient=x.output_gradient[:, :, rows])
    names = ("query", "key", "value", "output_gradient")
    doubled = few._replace(**{name: getattr(few, name).double() for name in names})
    ours = (gradients[0][:, :, rows], *gradient(few, backend, shared)[1:])
    return all(
        testing.judge(*three, 4 * x.key.shape[2]).passed
        for three in zip(ours, gradient(few, "reference"), gradient(doubled, "reference"))
    )


def _distillation_step(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    """The gradients of query, key and value, and the loss of their attention against the reference's.

    The loss is scaled as `_loss_scale` says, and its gradients are.
    """
    leaves = learned(x.query, x.key, x.value)
    with torch.enable_grad():
        output = qk.attention(leaves[0], Segment(*leaves[1:]), backend=backend)
        loss = qk.distillation_loss(output, x.query, x.ref_query, x.value, backend=backend)
        return *torch.autograd.grad(loss * _loss_scale(x), leaves), loss.detach()


def _loss_scale(x: Inputs) -> float:
    """What float16 needs, whose smallest number is 6e-8, and what torch's GradScaler begins with."""
    return 65536.0 if x.query.dtype == torch.float16 else 1.0


def _check_step(x: Inputs, result: tuple[Tensor, ...], backend: str) -> bool:
    """The gradients for the signs that the backend itself finds, the loss in the precision of the ideal output."""
    leaves = learned(
        x.query, x.key, x.value
    )  # attention that learns may differ in bits from attention that does not
    with torch.enable_grad():
        output = qk.attention(leaves[0], Segment(*leaves[1:]), backend=backend).detach().requires_grad_()
        loss = qk.distillation_loss(output, x.query, x.ref_query, x.value, backend=backend)
        (signs,) = torch.autograd.grad(loss * _loss_scale(x), output)
    rows = sampled_rows(x)
    few = output.detach()[:, :, rows], x.query[:, :, rows], x.ref_query, x.value
    ours, same, truth = (
        qk.distillation_loss(*parts, backend=name).to(parts[0].dtype)
        for parts, name in ((few, backend), (few, "reference"), (_double(*few), "reference"))
    )
    right = testing.judge(ours, same, truth, x.key.shape[2]).passed and bool(result[3].isfinite())
    return right and check_gradient(x._replace(output_gradient=signs), result[:3], backend)


def _segment(x: Inputs, **how: Any) -> Segment:
    return Segment(x.key, x.value, **how)


def learned(*tensors: Tensor) -> list[Tensor]:
    """Leaves of the same values that take gradients."""
    return [x.detach().requires_grad_() for x in tensors]


def _match_flops(sizes: Sizes) -> float:
    """One product of queries with keys: 2·E·D."""
    return 2 * sizes.scores * sizes.head_dim


def attention_flops(sizes: Sizes) -> float:
    """The products with keys and with values: 2·E·(D + D_v)."""
    return 2 * sizes.scores * (sizes.head_dim + sizes.value_dim)


def _attention_op(name: str, how: Callable[[Inputs], dict], contrast: float = 1.0) -> Op:
    """`how` gives what the segment holds beside keys and values, and with its labels those of the queries."""

    def parts(x: Inputs) -> tuple[Segment, Tensor | None]:
        held = how(x)
        query_labels = held.pop("query_labels", None)
        return _segment(x, **held), query_labels

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
        _check_gather,
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
        _distillation_step,
        _check_step,
        lambda x: 4.5 * attention_flops(x),
        learned=True,
    ),
    Op(
        "label_mass",
        lambda x, backend: qk.label_mass(x.query, x.key, x.classes, NUM_LABELS, backend=backend),
        lambda x, mass, backend: _check_probe(x, mass, "label_mass", x.classes, NUM_LABELS, token_axis=2),
        lambda sizes: _match_flops(sizes) + 2 * sizes.scores * NUM_LABELS,
    ),
    Op(
        "mean_attention_map",
        lambda x, backend: qk.mean_attention_map(x.query, x.key, backend=backend),
        lambda x, mean, backend: _check_probe(x, mean, "mean_attention_map", token_axis=1),
        _match_flops,
    ),
    *(
        Op(
            name,
            lambda x, backend: _qalign(x, backend),
            _check_qalign,
            lambda sizes: _match_flops(sizes) + attention_flops(sizes),
            correlated=correlated,
            match_map=lambda x, output, backend: _joint_map(x, backend).index,
        )
        for name, correlated in (("qalign_attention", False), ("qalign_attention_correlated", True))
    ),
    Op(
        "qalign_attention_guided",
        lambda x, backend: _qalign(x, backend, refinement="guided", strength=STRENGTH),
        _check_guided,
        lambda sizes: _match_flops(sizes) + attention_flops(sizes),
    ),
    Op(
        "qalign_attention_warped_output",
        lambda x, backend: _qalign(x, backend, refinement="warped_output"),
        _check_warped_output,
        lambda sizes: _match_flops(sizes) + attention_flops(sizes),
        match_map=lambda x, output, backend: _joint_map(x, backend).index,
    ),
    Op(
        "qalign_attention_topk",
        lambda x, backend: _qalign(x, backend, refinement="topk", topk=TOPK),
        _check_topk_attention,
        _topk_flops,
    ),
]


def op_named(name: str) -> Op:
    return next(op for op in OPS if op.name == name)


def draw(op: Op, sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    """Draw the inputs of an op in the layout of attention processors."""
    fraction = MATCHED_FRACTION if op.correlated else None
    return in_processor_layout(draw_inputs(sizes, dtype, device, matched_fraction=fraction))


def build(provider: str, op: Op, inputs: Inputs) -> Callable[[], Any]:
    """Make a function without arguments that does the op once on a backend, or SDPA on the same tensors."""
    if provider == SDPA:
        return lambda: scaled_dot_product_attention(inputs.query, inputs.key, inputs.value)
    return lambda: op.run(inputs, provider)


def prepare(provider: str, op_name: str, sizes: Sizes, dtype: torch.dtype) -> Callable[[], Any]:
    """Build a call on the CPU after a small one, so that what the first call loads is not measured."""
    op = op_named(op_name)
    small = sizes._replace(batch=1, tokens=WARM_UP_TOKENS, key_tokens=WARM_UP_TOKENS)
    build(provider, op, draw(op, small, dtype, "cpu"))()
    return build(provider, op, draw(op, sizes, dtype, "cpu"))
