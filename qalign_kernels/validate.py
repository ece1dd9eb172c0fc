"""Every op, on every backend and dtype of this machine, against float64: `python -m qalign_kernels.validate`.

Each row of the table is an op, a backend and a dtype over a grid of shapes. An error is the largest absolute difference from the
reference formula in float64; its budget is the error of the same formula in plain PyTorch in the dtype under test, plus slack derived
from eps and the length of the sums (`qalign_kernels.testing`). Memory that an op allocates is filled with NaN first. On a GPU each call
is repeated on plain memory, held against the budget again, and must repeat bit by bit.

Without a GPU the Triton kernels run in Triton's interpreter, in float32 and float16. Exit code: 0 all within budget, 1 not,
2 bad arguments, 130 Ctrl-C. The file of --json is written after every op, so that Ctrl-C keeps the rows so far.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import __version__, _backends, _command_line
from ._choices import REFINEMENTS
from ._files import Files, replacing
from .attention import Segment, attention, attention_with_lse
from .distillation import distillation_loss
from .probe import label_mass, mean_attention_map
from .qalign_attention import qalign_attention
from .rearrange import match_counts, rearrange_kv
from .reference.similarity import scores
from .similarity import similarity_argmax, similarity_topk
from .testing import (
    Verdict,
    judge,
    judge_exact,
    judge_match,
    matched_queries,
    poisoned_memory,
    random_features,
    random_integers,
)

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
CONTRAST = 1.67
COLUMNS = "{:42s} {:9s} {:8s} {:>5}  {:>9s}  {:>9s}  {:>12s}  {:7s} {:>6s}"


class Shape(NamedTuple):
    """Sizes of one case, and how its features lie in memory: contiguous, transposed, sliced or shared (stride-0 batch)."""

    batch: int
    heads: int
    query_tokens: int
    key_tokens: int
    head_dim: int
    value_dim: int
    layout: str

    def __str__(self) -> str:
        return f"B={self.batch} H={self.heads} N_q={self.query_tokens} N_k={self.key_tokens} D={self.head_dim} D_v={self.value_dim} {self.layout}"


SMALL = (
    Shape(1, 2, 33, 70, 40, 40, "transposed"),
    Shape(2, 1, 70, 33, 64, 64, "shared"),
    Shape(1, 2, 17, 65, 160, 160, "contiguous"),
    Shape(2, 2, 40, 40, 80, 48, "sliced"),
    Shape(1, 2, 1, 50, 128, 128, "transposed"),
    Shape(1, 1, 65, 31, 96, 96, "contiguous"),
    Shape(2, 2, 64, 64, 32, 32, "contiguous"),
)
LARGE = (
    Shape(1, 8, 4096, 4096, 40, 40, "transposed"),
    Shape(2, 10, 1000, 1117, 64, 64, "shared"),
    Shape(3, 8, 1024, 1024, 80, 80, "transposed"),
    Shape(1, 24, 1500, 513, 128, 128, "contiguous"),
    Shape(3, 8, 256, 256, 160, 160, "sliced"),
)


class Case(NamedTuple):
    """One call with its inputs. `call(inputs, backend)` gives the outputs; `tables(inputs)` the scores that a match is judged by."""

    description: str
    inputs: SimpleNamespace
    call: Callable[[SimpleNamespace, str], tuple[Tensor, ...]]
    reduction: int
    exact: bool = False
    tables: Callable[[SimpleNamespace], Tensor] | None = None
    packed: bool = False


class Draw:
    """Seeded inputs of one shape in one dtype on one device."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device, self.seed = (
            shape,
            dtype,
            device,
            1000 * shape.head_dim + shape.query_tokens,
        )

    def features(self, batch: int, tokens: int, dim: int) -> Tensor:
        """[batch, H, tokens, dim] in the layout of the shape."""
        self.seed += 1
        draw = partial(random_features, seed=self.seed, dtype=self.dtype, device=self.device)
        heads = self.shape.heads
        match self.shape.layout:
            case "transposed":
                return draw(batch, tokens, heads, dim).transpose(1, 2)
            case "sliced":
                return draw(batch, heads, tokens, dim + 8)[..., 3 : dim + 3]
            case "shared":
                return draw(1, heads, tokens, dim).expand(batch, -1, -1, -1)
            case _:
                return draw(batch, heads, tokens, dim)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        self.seed += 1
        return random_integers(low, high, *shape, seed=self.seed, device=self.device)

    def share(self, settings: Sequence[Any]) -> Sequence[Any]:
        """All settings on a GPU; on the CPU, where the interpreter is slow, every other one, so that neighbouring shapes have them all."""
        return settings if self.device.type == "cuda" else settings[SMALL.index(self.shape) % 2 :: 2]

    def labels(self, tokens: int) -> Tensor:
        """Bit sets [B, tokens]; token 0 has none: it sees nothing and nothing sees it."""
        labels = self.integers(1, 8, self.shape.batch, tokens)
        labels[:, 0] = 0
        return labels

    def counts(self, heads: int, tokens: int) -> Tensor:
        """Multiplicities [B, heads, tokens] from 0 to 3."""
        return self.integers(0, 4, self.shape.batch, heads, tokens)

    def rows(self) -> Tensor:
        """A batch index [B] into two rows."""
        return self.integers(0, 2, self.shape.batch)

    def attention(self, key_batch: int | None = None) -> SimpleNamespace:
        """query, key and value."""
        shape, batch = self.shape, self.shape.batch if key_batch is None else key_batch
        return SimpleNamespace(
            query=self.features(shape.batch, shape.query_tokens, shape.head_dim),
            key=self.features(batch, shape.key_tokens, shape.head_dim),
            value=self.features(batch, shape.key_tokens, shape.value_dim),
        )

    def matching(self, refinement: str = "rearranged") -> SimpleNamespace:
        """query, ref_query, ref_key, ref_value and own_key. Every query is a noisy copy of one reference token, so that each precision
        takes the same match map."""
        shape = self.shape
        inputs = SimpleNamespace(
            ref_query=self.features(shape.batch, shape.key_tokens, shape.head_dim),
            ref_key=self.features(shape.batch, shape.key_tokens, shape.head_dim),
            ref_value=self.features(shape.batch, shape.key_tokens, shape.value_dim),
            own_key=self.features(shape.batch, shape.query_tokens, shape.head_dim)
            if refinement == "warped_values"
            else None,
        )
        self.seed += 2
        inputs.query, inputs.index = matched_queries(inputs.ref_query, shape.query_tokens, seed=self.seed)
        return inputs


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
        if labelled:  # a query carries the set of the token that it copies
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
    """`apart`: the output is so far from the ideal one that no sign hangs on rounding."""
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
        # the ideal is of the inputs' precision, and so is the distance to it
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
    """The gradients of the floating outputs, each weighted by random numbers, in every float input."""
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
            # a row that sees nothing has lse -inf, which carries no gradient
            loss = sum(
                (y.masked_fill(y == float("-inf"), 0) * weight).sum() for y, weight in zip(outputs, x.weights)
            )
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            return tuple(gradient for gradient in gradients if gradient is not None)

        yield Case(f"{case.description} gradient", inputs, call, 4 * case.reduction)


class Op(NamedTuple):
    """A row of the table: how its cases are drawn, on which small shapes, and the backends that it is held to."""

    cases: Cases
    shapes: Sequence[Shape] = SMALL
    backends: tuple[str, ...] = ("triton", "tiled", "reference")


def _rotated(start: int) -> tuple[Shape, ...]:
    """Three small shapes: the options of an op share the head dims among them."""
    return tuple(SMALL[(start + 3 * i) % len(SMALL)] for i in range(3))


TRITON_GRADIENTS = (
    "attention", "attention_with_lse", "attention counts", "attention labels", "attention segments", "attention batch_index",
    "qalign_attention rearranged", "distillation_loss", "distillation_loss labels", "label_mass",
)  # fmt: skip


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
            # weak, as a saturated softmax has no gradient to measure; dot, as cosine's takes out the radial part and leaves its rounding
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


class Found(NamedTuple):
    """What one op in one dtype showed.

    Attributes:
        rows: one for each backend that ran a case.
        dropped: the cases that ran nowhere, because their float64 truth wants more memory than there is.
    """

    rows: list["Row"]
    dropped: list[str]


class Row(NamedTuple):
    """One line of the table. `error` and `budget` are those of the case with the largest ratio of the two."""

    op: str
    backend: str
    dtype: str
    cases: int
    error: float
    budget: float
    ratio: float
    passed: bool
    failures: tuple[str, ...]
    seconds: float


def _map_tensors(inputs: SimpleNamespace, convert: Callable[[Tensor], Tensor]) -> SimpleNamespace:
    def apply(x):
        if isinstance(x, list):
            return [apply(y) for y in x]
        return convert(x) if x is not None and x.is_floating_point() else x

    return SimpleNamespace(**{name: apply(x) for name, x in vars(inputs).items()})


def _ratio(verdict: Verdict) -> float:
    return (
        verdict.error / verdict.budget
        if verdict.budget > 0
        else (0.0 if verdict.error == 0 else float("inf"))
    )


def _same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(
        torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))
        for a, b in zip(first, second, strict=True)
    )


class Truth:
    """The float64 outputs of a case and those of plain PyTorch in the dtype under test, computed once for all backends."""

    def __init__(self, case: Case) -> None:
        self.case = case
        doubled = _map_tensors(case.inputs, Tensor.double)
        self.truth, self.yardstick = self._compute(doubled), self._compute(case.inputs)

    def _compute(self, inputs: SimpleNamespace) -> tuple[Tensor, ...]:
        return (
            self.case.call(inputs, "reference") if self.case.tables is None else (self.case.tables(inputs),)
        )

    def judge(self, outputs: Sequence[Tensor]) -> Verdict:
        case = self.case
        if case.tables is not None:
            index, score = outputs
            return judge_match(
                index, score, self.yardstick[0], self.truth[0], case.reduction, packed=case.packed
            )
        if len(outputs) != len(self.truth):
            return Verdict(float("inf"), 0.0, False)
        if case.exact:
            verdicts = [judge_exact(actual, truth) for actual, truth in zip(outputs, self.truth)]
        else:
            verdicts = [judge(*three, case.reduction) for three in zip(outputs, self.yardstick, self.truth)]
        return max(verdicts, key=_ratio)


def _one_line(text: str, length: int = 240) -> str:
    """The beginning and the end of a message: compilers put the place first and the reason last."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def _run_case(truth: Truth, backend: str, device: torch.device) -> tuple[Verdict, str]:
    """The verdict on one case, and what is wrong with it, if anything."""
    case = truth.case
    try:
        with poisoned_memory():
            outputs = case.call(case.inputs, backend)
        verdict = truth.judge(outputs)
        if device.type == "cuda":
            repeats = [case.call(case.inputs, backend) for _ in range(2)]
            torch.cuda.synchronize(device)
            verdict = max(verdict, truth.judge(repeats[0]), key=_ratio)
            if not case.description.endswith("gradient") and not _same_bits(*repeats):
                return Verdict(verdict.error, verdict.budget, False), "two calls differ in bits"
    except Exception as error:  # the table is to be finished whatever one kernel does
        return Verdict(float("inf"), 0.0, False), _one_line(f"{type(error).__name__}: {error}")
    return verdict, "" if verdict.passed else f"error {verdict.error:.3g}, budget {verdict.budget:.3g}"


def _fits(shape: Shape, device: torch.device) -> bool:
    """Whether the float64 truth, some eight N×N tables, fits in half of the free memory."""
    free, _ = torch.cuda.mem_get_info(device)
    return 8 * 8 * shape.batch * shape.heads * shape.query_tokens * shape.key_tokens < free // 2


def run_op(
    name: str, backends: Sequence[str], dtype: str, device: torch.device, *, quick: bool = False
) -> Found:
    """Run the cases of one op in one dtype, on each backend that serves it.

    On a GPU a case is called once before its time is taken, so that no compilation counts.
    """
    op = OPS[name]
    backends = [backend for backend in backends if backend in op.backends]
    shapes = list(op.shapes[:1] if quick else op.shapes)
    dropped: list[str] = []
    if device.type == "cuda" and backends:
        large = LARGE[:1] if quick else LARGE
        dropped += [f"{name}, {dtype}, {shape}" for shape in large if not _fits(shape, device)]
        shapes += [shape for shape in large if _fits(shape, device)]
    verdicts: dict[str, list[Verdict]] = {backend: [] for backend in backends}
    failures: dict[str, list[str]] = {backend: [] for backend in backends}
    seconds = dict.fromkeys(backends, 0.0)
    for shape in shapes if backends else ():
        for case in op.cases(Draw(shape, DTYPES[dtype], device)):
            try:
                truth = Truth(case)
            except torch.OutOfMemoryError:  # other programs may hold the memory
                dropped.append(f"{name}, {dtype}, {case.description}")
                continue
            for backend in backends:
                if device.type == "cuda":
                    _compile(case, backend)
                start = time.perf_counter()
                verdict, problem = _run_case(truth, backend, device)
                seconds[backend] += time.perf_counter() - start
                verdicts[backend].append(verdict)
                if problem:
                    failures[backend].append(f"{name}, {backend}, {dtype}, {case.description}: {problem}")
    rows = []
    for backend in (name for name in backends if verdicts[name]):
        worst = max(verdicts[backend], key=_ratio)
        figures = (len(verdicts[backend]), worst.error, worst.budget, _ratio(worst))
        rows.append(
            Row(
                name,
                backend,
                dtype,
                *figures,
                not failures[backend],
                tuple(failures[backend]),
                seconds[backend],
            )
        )
    return Found(rows, dropped)


def _compile(case: Case, backend: str) -> None:
    """Call the case; what it raises, it raises again where it is judged."""
    with contextlib.suppress(Exception):
        case.call(case.inputs, backend)


def _device(name: str | None) -> torch.device:
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _triton_state(device: torch.device) -> tuple[str | None, str]:
    """Why Triton cannot run on `device`, if so, and the words for the header. Without a GPU the interpreter is switched on."""
    note = " in its interpreter (TRITON_INTERPRET is set)" if _backends.interpreted() else ""
    if device.type != "cuda":
        if "triton" not in sys.modules:
            os.environ.setdefault("TRITON_INTERPRET", "1")
            _backends.interpreted.cache_clear()
        note = " in its interpreter (no GPU is used: TRITON_INTERPRET=1 is set for this process)"
    problem = _backends.triton_problem()
    if problem is None:
        problem = _backends.triton_refusal(torch.empty(1, device=device), ())
    return (
        problem,
        f"Triton not run: {problem}" if problem else f"Triton {sys.modules['triton'].__version__}{note}",
    )


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    top = _command_line.Parser(
        "python -m qalign_kernels.validate", description="Hold every op against float64 on this machine."
    )
    _command_line.add_command(top, sys.modules[__name__])
    return top


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=_backends.BACKENDS[1:],
        metavar="NAME",
        help="triton, tiled, reference; default: the first two",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        metavar="NAME",
        help=f"of {', '.join(DTYPES)}; default: the first three",
    )
    parser.add_argument(
        "--op",
        nargs="+",
        metavar="NAME",
        help="ops whose name begins so, as the table writes them; default: all",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows to FILE, after every op"
    )


def files(options: argparse.Namespace) -> Files:
    return Files(writes=[("--json", options.json)] if options.json else [])


def _header(device: torch.device, triton: str) -> str:
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return f"qalign_kernels {__version__}, torch {torch.__version__}, {name}\n{triton}"


def _line(row: Row) -> str:
    figures = f"{row.error:.2e}", f"{row.budget:.2e}", f"{row.ratio:.2f}"
    return COLUMNS.format(
        row.op,
        row.backend,
        row.dtype,
        row.cases,
        *figures,
        "ok" if row.passed else "FAILED",
        f"{row.seconds:.1f}",
    )


def _shown(failures: Sequence[str], limit: int = 3) -> list[str]:
    more = [f"  ... and {len(failures) - limit} more"] if len(failures) > limit else []
    return [f"  FAILED {failure}" for failure in failures[:limit]] + more


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    return _command_line.main(parser, arguments)


def run(options: argparse.Namespace) -> int:
    """Validate and print the table; 0 where all is within budget."""
    if options.device == "cuda":
        _command_line.require_device("cuda")
    device = _device(options.device)
    names = [
        name for name in OPS if options.op is None or any(name.startswith(prefix) for prefix in options.op)
    ]
    if unknown := [prefix for prefix in options.op or () if not any(name.startswith(prefix) for name in OPS)]:
        raise ValueError(f"--op: expected the beginning of one of {', '.join(OPS)}, got {', '.join(unknown)}")
    problem, triton = _triton_state(device)
    if problem and "triton" in (options.backend or ()):
        raise ValueError(f"--backend: expected one that can run here, got triton: {problem}")
    backends = options.backend or (["tiled"] if problem else ["triton", "tiled"])

    print(_header(device, triton))
    print(
        COLUMNS.format(
            "op", "backend", "dtype", "cases", "error", "budget", "error/budget", "verdict", "time_s"
        ),
        flush=True,
    )
    rows: list[Row] = []
    dropped: list[str] = []
    start = time.perf_counter()
    for name in names:
        for dtype in options.dtype or list(DTYPES)[:3]:
            probe = torch.empty(1, dtype=DTYPES[dtype], device=device)
            served = [
                backend
                for backend in backends
                if backend != "triton" or _backends.triton_refusal(probe, ()) is None
            ]
            found = run_op(name, served, dtype, device, quick=options.quick)
            dropped += found.dropped
            for row in found.rows:
                rows.append(row)
                print(_line(row), *_shown(row.failures), sep="\n", flush=True)
            if options.json:  # after every op, so that a run that is stopped leaves what it found
                report = {
                    "device": _header(device, triton).splitlines(),
                    "rows": [row._asdict() for row in rows],
                    "dropped": dropped,
                }
                with replacing(options.json) as unfinished:
                    unfinished.write_text(json.dumps(report, indent=1), encoding="utf-8")
    for case in dropped:
        print(f"not run for want of memory: {case}")
    cases, failures = sum(row.cases for row in rows), sum(len(row.failures) for row in rows)
    print(f"{cases} cases in {len(rows)} rows, {failures} failed, {time.perf_counter() - start:.0f} s")
    return 1 if failures or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
