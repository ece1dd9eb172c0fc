"""The cases of every validated op: the call, its inputs and how its result is judged."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._choices import REFINEMENTS
from ..attention import attention, attention_with_lse
from ..distillation import distillation_loss
from ..probe import label_mass, mean_attention_map
from ..qalign_attention import qalign_attention
from ..rearrange import match_counts, rearrange_kv
from ..reference.similarity import scores
from ..segments import Segment
from ..similarity import similarity_argmax, similarity_topk
from ..testing import random_features
from .draw import SMALL, Draw, Shape

CONTRAST = 1.67


class Case(NamedTuple):
    """One call with its inputs.

    Attributes:
        description: the text for the table of failures.
        inputs: the tensors.
        call: `call(inputs, backend)` gives the outputs.
        reduction: the length of the longest sum in an output element.
        exact: no error is allowed.
        tables: `tables(inputs)` gives all scores of a match; None for a call that is no match.
        packed: the scores of the match have lost seven mantissa bits.
    """

    description: str
    inputs: SimpleNamespace
    call: Callable[[SimpleNamespace, str], tuple[Tensor, ...]]
    reduction: int
    exact: bool = False
    tables: Callable[[SimpleNamespace], Tensor] | None = None
    packed: bool = False


Cases = Callable[[Draw], Iterator[Case]]


def _match_cases(draw: Draw, packed: bool, k: int | None) -> Iterator[Case]:
    shape = draw.shape
    k = None if k is None else min(k, shape.key_tokens)
    settings = (
        ("cosine", "joint", ""),
        ("dot", "per_head", "labels"),
        ("cosine", "per_head", "batch_index"),
        ("dot", "joint", ""),
    )
    for similarity, heads, option in draw.share(settings):
        inputs = draw.attention(2 if option == "batch_index" else None)
        query_labels, key_labels = (
            (draw.labels(shape.query_tokens), draw.labels(shape.key_tokens))
            if option == "labels"
            else (None, None)
        )
        rows = draw.rows() if option == "batch_index" else None
        labels = {"query_labels": query_labels, "reference_labels": key_labels, "batch_index": rows}

        def call(x, backend, similarity=similarity, heads=heads, labels=labels):
            if k is not None:
                return similarity_topk(
                    x.query, x.key, k, similarity=similarity, heads=heads, backend=backend, **labels
                )
            return similarity_argmax(
                x.query,
                x.key,
                similarity=similarity,
                heads=heads,
                exact=not packed,
                backend=backend,
                **labels,
            )

        def tables(x, similarity=similarity, heads=heads, labels=labels):
            return scores(x.query, x.key, similarity, heads == "joint", **labels)

        reduction = shape.head_dim * (shape.heads if heads == "joint" else 1)
        yield Case(
            f"{shape} {similarity} {heads} {option}".rstrip(),
            inputs,
            call,
            reduction,
            tables=tables,
            packed=packed,
        )


def _counts_cases(draw: Draw) -> Iterator[Case]:
    shape = draw.shape
    for heads in (1, shape.heads):
        inputs = SimpleNamespace(
            index=draw.integers(-1, shape.key_tokens, shape.batch, heads, shape.query_tokens)
        )
        call = lambda x, backend: (match_counts(x.index, shape.key_tokens, backend=backend),)  # noqa: E731
        yield Case(f"{shape} G={heads}", inputs, call, 1, exact=True)


def _gather_cases(draw: Draw) -> Iterator[Case]:
    shape = draw.shape
    for heads in (1, shape.heads):
        inputs = draw.attention()
        inputs.index = draw.integers(-1, shape.key_tokens, shape.batch, heads, shape.query_tokens)
        yield Case(
            f"{shape} G={heads}",
            inputs,
            lambda x, backend: rearrange_kv(x.key, x.value, x.index, backend=backend),
            1,
            exact=True,
        )


def _attention_cases(draw: Draw, option: str) -> Iterator[Case]:
    shape = draw.shape
    inputs = draw.attention(2 if option == "batch_index" else None)
    segment: dict[str, Any] = {}
    other: dict[str, Any] | None = None
    contrast, query_labels = CONTRAST if "contrast" in option else 1.0, None
    if "counts" in option:
        segment["counts"] = draw.counts(1 if shape.head_dim in (40, 160) else shape.heads, shape.key_tokens)
    if option in ("labels", "segments"):
        query_labels = draw.labels(shape.query_tokens)
        segment["labels"] = draw.labels(shape.key_tokens)
    if option == "batch_index":
        segment["batch_index"] = draw.rows()
    if option == "segments":
        segment |= {"logit_scale": 1.2, "logit_shift": 0.7}
        more = draw.features(shape.batch, 19, shape.head_dim), draw.features(shape.batch, 19, shape.value_dim)
        inputs.other_key, inputs.other_value = more
        other = {"counts": draw.counts(1, 19)}

    def call(x, backend):
        segments = [Segment(x.key, x.value, **segment)]
        if other is not None:
            segments.append(Segment(x.other_key, x.other_value, **other))
        return attention_with_lse(
            x.query, segments, contrast=contrast, query_labels=query_labels, backend=backend
        )

    def call_without_lse(x, backend):
        return (attention(x.query, Segment(x.key, x.value), backend=backend),)

    yield Case(
        f"{shape} {option}".rstrip(),
        inputs,
        call if option else call_without_lse,
        max(shape.head_dim, shape.key_tokens),
    )


def _qalign_cases(
    draw: Draw,
    refinement: str,
    similarity: str = "cosine",
    strengths: tuple[float, ...] = (20.0, 5.0),
    contrast: float = CONTRAST,
) -> Iterator[Case]:
    shape = draw.shape
    reduction = max(shape.heads * shape.head_dim, shape.key_tokens, shape.query_tokens)
    unit = 1.0 if similarity == "cosine" else shape.head_dim**-0.5
    settings = ("joint", 1.0, False, unit * strengths[0]), ("per_head", contrast, True, unit * strengths[1])
    for heads, contrast, labelled, strength in draw.share(settings):
        inputs = draw.matching(refinement)
        arguments = {
            "refinement": refinement,
            "similarity": similarity,
            "heads": heads,
            "contrast": contrast,
            "strength": strength,
            "topk": min(4, shape.key_tokens),
        }
        if labelled:  # a query has the labels of the token that it copies
            ref_labels = draw.integers(1, 4, shape.batch, shape.key_tokens)
            arguments |= {
                "ref_labels": ref_labels,
                "query_labels": ref_labels.take_along_dim(inputs.index.squeeze(1).long(), dim=1),
            }

        def call(x, backend, arguments=arguments):
            return (
                qalign_attention(
                    x.query,
                    x.ref_query,
                    x.ref_key,
                    x.ref_value,
                    own_key=x.own_key,
                    backend=backend,
                    **arguments,
                ),
            )

        yield Case(
            f"{shape} {heads} contrast={contrast}{' labels' if labelled else ''}", inputs, call, reduction
        )


def _distillation_cases(draw: Draw, labelled: bool, apart: bool = False) -> Iterator[Case]:
    """With `apart`, output and ideal are so far apart that rounding changes no sign."""
    shape = draw.shape
    inputs = draw.attention(1)
    inputs.output = draw.features(shape.batch, shape.query_tokens, shape.value_dim)
    labels: dict[str, Any] = dict.fromkeys(("query_labels", "ref_labels"))
    if labelled:
        labels = {
            "query_labels": draw.labels(shape.query_tokens),
            "ref_labels": draw.labels(shape.key_tokens),
        }
    if apart:
        whole = (x.expand(shape.batch, -1, -1, -1) for x in (inputs.key, inputs.value))
        ideal = attention(
            inputs.query,
            Segment(*whole, labels=labels["ref_labels"]),
            query_labels=labels["query_labels"],
            backend="reference",
        )
        inputs.output = ideal + inputs.output + inputs.output.sign()

    def call(x, backend):
        # the ideal output has the dtype of the inputs, so the loss has its precision
        return (
            distillation_loss(x.output, x.query, x.key, x.value, backend=backend, **labels).to(
                x.output.dtype
            ),
        )

    yield Case(f"{shape}{' labels' if labelled else ''}", inputs, call, max(shape.head_dim, shape.key_tokens))


def _mass_cases(draw: Draw) -> Iterator[Case]:
    shape = draw.shape
    inputs = draw.attention()
    key_labels, counts = draw.integers(-1, 5, shape.batch, shape.key_tokens), draw.counts(1, shape.key_tokens)
    for name, multiplicity in (("", None), (" counts", counts)):

        def call(x, backend, multiplicity=multiplicity):
            return (label_mass(x.query, x.key, key_labels, 5, counts=multiplicity, backend=backend),)

        yield Case(f"{shape}{name}", inputs, call, max(shape.head_dim, shape.key_tokens))


def _map_cases(draw: Draw) -> Iterator[Case]:
    shape = draw.shape
    call = lambda x, backend: (mean_attention_map(x.query, x.key, backend=backend),)  # noqa: E731
    yield Case(f"{shape}", draw.attention(), call, max(shape.head_dim, shape.key_tokens))


def _gradient_cases(draw: Draw, cases: Cases) -> Iterator[Case]:
    """Gradients of randomly weighted outputs with respect to every float input."""
    for case in cases(draw):
        names = [name for name, x in vars(case.inputs).items() if x is not None and x.is_floating_point()]
        with torch.no_grad():
            outputs = [x for x in case.call(case.inputs, "reference") if x.is_floating_point()]
        draw.seed += 1
        weights = [
            random_features(*x.shape, seed=draw.seed, device=draw.device).to(draw.dtype) for x in outputs
        ]
        inputs = SimpleNamespace(**vars(case.inputs), weights=weights)

        def call(x, backend, case=case, names=names):
            leaves = {name: getattr(x, name).detach().requires_grad_() for name in names}
            outputs = [
                y for y in case.call(SimpleNamespace(**(vars(x) | leaves)), backend) if y.is_floating_point()
            ]
            # a row that sees no key has lse -inf and no gradient
            loss = sum(
                (y.masked_fill(y == float("-inf"), 0) * weight).sum() for y, weight in zip(outputs, x.weights)
            )
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            return tuple(gradient for gradient in gradients if gradient is not None)

        yield Case(f"{case.description} gradient", inputs, call, 4 * case.reduction)


class Op(NamedTuple):
    """A row of the table: its cases, the small shapes that they use, and the backends that serve it."""

    cases: Cases
    shapes: Sequence[Shape] = SMALL
    backends: tuple[str, ...] = ("triton", "tiled", "reference")


def _rotated(start: int) -> tuple[Shape, ...]:
    """Three small shapes. The options of an op start elsewhere, so that together they use all head dims."""
    return tuple(SMALL[(start + 3 * i) % len(SMALL)] for i in range(3))


TRITON_GRADIENTS = (
    "attention",
    "attention_with_lse",
    "attention counts",
    "attention labels",
    "attention segments",
    "attention batch_index",
    "qalign_attention rearranged",
    "distillation_loss",
    "distillation_loss labels",
    "label_mass",
)


def _ops() -> dict[str, Op]:
    ops = {
        "similarity_argmax": Op(partial(_match_cases, packed=False, k=None)),
        "similarity_argmax packed": Op(partial(_match_cases, packed=True, k=None), _rotated(0), ("triton",)),
        "similarity_topk": Op(partial(_match_cases, packed=False, k=6), _rotated(1)),
        "match_counts": Op(_counts_cases),
        "rearrange_kv": Op(_gather_cases),
        "attention": Op(partial(_attention_cases, option="")),
    }
    for i, option in enumerate(
        ("with_lse", "contrast", "counts", "counts contrast", "labels", "segments", "batch_index")
    ):
        name = "attention_with_lse" if option == "with_lse" else f"attention {option}"
        ops[name] = Op(partial(_attention_cases, option=option), _rotated(i))
    for i, refinement in enumerate(REFINEMENTS):
        ops[f"qalign_attention {refinement}"] = Op(partial(_qalign_cases, refinement=refinement), _rotated(i))
    for i, name in enumerate(("distillation_loss", "distillation_loss labels")):
        ops[name] = Op(partial(_distillation_cases, labelled=i == 1), _rotated(3 + i))
    ops["label_mass"] = Op(_mass_cases, _rotated(2))
    ops["mean_attention_map"] = Op(_map_cases, _rotated(4))
    others, last = (
        ("similarity_argmax packed", "similarity_topk", "match_counts"),
        ("attention", "distillation_loss", "distillation_loss labels"),
    )
    differentiable = [name for name in ops if name not in (*others, *last)] + list(last)
    for i, name in enumerate(differentiable):
        cases = ops[name].cases
        if name in ("qalign_attention guided", "qalign_attention soft"):
            # A saturated softmax has no gradient, so the strengths are small. The gradient of a cosine keeps
            # only the rounding errors of its radial part, so the similarity is "dot".
            cases = partial(
                _qalign_cases, refinement=name.split()[1], similarity="dot", strengths=(0.3, 0.15)
            )
        if name == "qalign_attention rearranged":
            cases = partial(
                _qalign_cases, refinement="rearranged", contrast=1.0
            )  # with a contrast it is not Triton's
        if name.startswith("distillation_loss"):
            cases = partial(_distillation_cases, labelled="labels" in name, apart=True)
        backends = ("triton", "tiled", "reference") if name in TRITON_GRADIENTS else ("tiled", "reference")
        ops[f"{name} gradient"] = Op(partial(_gradient_cases, cases=cases), _rotated(i)[:2], backends)
    return ops


OPS = _ops()
