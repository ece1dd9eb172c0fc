"""For each row of the tile table: the op that times it, and the other calls that use the same tile."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import qalign_kernels as qk
from qalign_kernels import Segment, _backends, testing
from qalign_kernels._triton._configs import LISTED_WORK, Key
from qalign_kernels.attention import Guide, guided_attention
from qalign_kernels.bench.checks import (
    STRENGTH,
    TOPK,
    check_attention,
    check_gradient,
    check_match,
    gradient,
    sampled_rows,
)
from qalign_kernels.bench.measure import FEATURES, NUM_LABELS, Inputs, processor_layout
from qalign_kernels.bench.ops import CONTRAST, OPS, Op
from qalign_kernels.unit_features import unit

from ..suite import shapes
from ..suite.shapes import FOLDED_HEAD_DIM, Shape

LABELS = ("bit_sets", "half_sets", "query_bit_sets", "query_half_sets", "classes")
HEADS = {40: 8, 64: 10, 80: 8, 128: 24, 160: 8}  # heads by head dim, as in the models
USUAL_TOKENS = (4096, 1024, 16384, 256)  # the most usual first
LARGE_K = 64
LISTED_ARCHITECTURE = "sm_90"
LISTED_HEAD_DIMS = {
    ("attention", "softmax hopper"): (64, 128),
    ("attention", "counted softmax hopper"): (64, 128),
    ("similarity", "joint hopper"): (FOLDED_HEAD_DIM,),
}


class Call(NamedTuple):
    """A call like an `Op`: `run(inputs, backend)`, and `check(inputs, result, backend)` against float64."""

    run: Callable[[Inputs, str], Any]
    check: Callable[[Inputs, Any, str], bool]


class Trial(NamedTuple):
    """The calls for one (op, mode) of the table.

    Attributes:
        timed: decides which tile is the fastest.
        others: further variants that use the same tile; they must stay right.
    """

    op: str
    mode: str
    timed: Op | Call
    others: tuple[Op | Call, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op} {self.mode}"

    @property
    def listed(self) -> bool:
        """Whether its kernel serves only keys with a row in the table; the general kernel serves the rest."""
        return (self.op, self.mode) in LISTED_WORK

    def serves(self, architecture: str, head_dim: int) -> bool:
        """Whether a kernel of this mode exists for an architecture and a head dim."""
        if not self.listed:
            return True
        widths = LISTED_HEAD_DIMS[self.op, self.mode]
        return architecture == LISTED_ARCHITECTURE and head_dim in widths


def make_inputs(key: Key, device: str = "cuda") -> Inputs:
    """Draw correlated inputs for a key: its dtype, head dim and largest number of tokens."""
    tokens = key.tokens or USUAL_TOKENS[0]
    batch = 2 if tokens <= 4096 and key.head_dim < 128 else 1
    shape = Shape("", batch, HEADS[key.head_dim], tokens, key.head_dim)
    return _laid_out(shapes.make_inputs(shape, True, getattr(torch, key.dtype), device), key)


def make_ragged(inputs: Inputs, key: Key) -> Inputs:
    """Cut the last tokens, so that no tile divides their number."""
    tokens = inputs.query.shape[2] - 7
    index = inputs.match_map[:, :, :tokens].clamp(max=tokens - 1)
    counts = torch.zeros_like(index).scatter_add_(2, index.long(), torch.ones_like(index))
    features = {name: getattr(inputs, name)[:, :, :tokens] for name in FEATURES}
    labels = {name: getattr(inputs, name)[:, :tokens].contiguous() for name in LABELS}
    return _laid_out(inputs._replace(match_map=index.contiguous(), counts=counts, **features, **labels), key)


def _laid_out(inputs: Inputs, key: Key) -> Inputs:
    """Store [B, N, H, D] as attention processors do, unless that would fold the heads."""
    unfolded = key.op == "similarity" and key.mode in ("joint", "topk") and key.head_dim != FOLDED_HEAD_DIM
    features = {name: getattr(inputs, name) for name in FEATURES}
    lay_out = Tensor.contiguous if unfolded else processor_layout
    return inputs._replace(**{name: lay_out(x) for name, x in features.items()})


def _attention(
    *,
    counts: bool = False,
    labels: bool = False,
    segments: int = 1,
    contrast: float = 1.0,
    guided: bool = False,
) -> Call:
    def parts(x: Inputs) -> list[Segment]:
        first = Segment(
            x.key, x.value, counts=x.counts if counts else None, labels=x.bit_sets if labels else None
        )
        return [
            first,
            *(
                Segment(x.ref_query, x.value, labels=x.bit_sets if labels else None)
                for _ in range(segments - 1)
            ),
        ]

    def guide(x: Inputs) -> Guide | None:
        return Guide(unit(x.query), unit(x.ref_query), STRENGTH) if guided else None

    def run(x: Inputs, backend: str) -> Tensor:
        how: dict[str, Any] = {
            "contrast": contrast,
            "query_labels": x.bit_sets if labels else None,
            "backend": backend,
        }
        guidance = guide(x)
        if guidance is not None:
            return guided_attention(x.query, parts(x)[0], guidance, **how)
        return qk.attention(x.query, parts(x), **how)

    return Call(
        run,
        lambda x, output, backend: check_attention(
            x, output, parts(x), contrast, x.bit_sets if labels else None, guide(x)
        ),
    )


def _match(similarity: str, joint: bool, k: int | None = None, labels: bool = False) -> Call:
    def run(x: Inputs, backend: str) -> qk.Match:
        sets = {"query_labels": x.bit_sets, "reference_labels": x.bit_sets} if labels else {}
        how: dict[str, Any] = {
            "similarity": similarity,
            "heads": "joint" if joint else "per_head",
            "backend": backend,
            **sets,
        }
        return (
            qk.similarity_argmax(x.query, x.ref_query, **how)
            if k is None
            else qk.similarity_topk(x.query, x.ref_query, k, **how)
        )

    def check(x: Inputs, match: Any, backend: str) -> bool:
        return check_match(x, match, similarity, joint, labels=labels)

    return Call(run, check)


def _candidates(x: Inputs) -> Tensor:
    """Give the match of each query and TOPK - 1 tokens at equal distances from it, int32 [B, 1, N, K]."""
    tokens = x.key.shape[2]
    offsets = torch.arange(TOPK, device=x.match_map.device) * (tokens // TOPK)
    return ((x.match_map.unsqueeze(-1) + offsets) % tokens).int()


def _topk_attention(contrast: float) -> Call:
    def attend(stem: Any, x: Inputs, index: Tensor) -> Tensor:
        return stem.topk_attention(
            x.query, x.key, x.value, index, scale=x.query.shape[3] ** -0.5, contrast=contrast
        )

    def run(x: Inputs, backend: str) -> Tensor:
        return attend(_backends.implementation(backend, "qalign_attention"), x, _candidates(x))

    def check(x: Inputs, output: Tensor, backend: str) -> bool:
        rows, reference = sampled_rows(x), _backends.implementation("reference", "qalign_attention")
        index, x = _candidates(x)[:, :, rows], x._replace(query=x.query[:, :, rows])
        doubled = x._replace(query=x.query.double(), key=x.key.double(), value=x.value.double())
        return testing.judge(
            output[:, :, rows], attend(reference, x, index), attend(reference, doubled, index), TOPK
        ).passed

    return Call(run, check)


def _counted_mass(x: Inputs, backend: str) -> Tensor:
    return qk.label_mass(x.query, x.key, x.classes, NUM_LABELS, counts=x.counts, backend=backend)


def _check_counted_mass(x: Inputs, mass: Tensor, backend: str) -> bool:
    rows, reference, scale = (
        sampled_rows(x),
        _backends.implementation("reference", "probe").label_mass,
        x.query.shape[3] ** -0.5,
    )
    query = x.query[:, :, rows]
    same = reference(query, x.key, x.classes, NUM_LABELS, scale=scale, counts=x.counts)
    truth = reference(query.double(), x.key.double(), x.classes, NUM_LABELS, scale=scale, counts=x.counts)
    return testing.judge(mass[:, :, rows], same, truth, x.key.shape[2]).passed


_OPS = {op.name: op for op in OPS}
_CONTRASTED = _attention(contrast=CONTRAST)
_SHARED_GRADIENT = Call(
    functools.partial(gradient, shared=True), functools.partial(check_gradient, shared=True)
)
# the calls that Q-Align makes for every layer come first
TRIALS = (
    Trial(
        "similarity",
        "joint",
        _OPS["similarity_argmax"],
        (_match("cosine", True, labels=True), _match("dot", True)),
    ),
    Trial("attention", "counted softmax", _OPS["attention_counts"]),
    Trial("attention", "softmax", _attention(), (_attention(segments=2),)),
    Trial(
        "attention",
        "contrast",
        _attention(counts=True, contrast=CONTRAST),
        (_CONTRASTED, _attention(contrast=CONTRAST, segments=2)),
    ),
    Trial(
        "attention",
        "guided",
        _OPS["qalign_attention_guided"],
        (_attention(guided=True, labels=True, contrast=CONTRAST),),
    ),
    Trial(
        "similarity",
        "topk",
        _OPS["similarity_topk"],
        (
            _match("cosine", True, LARGE_K),
            _match("cosine", True, TOPK, labels=True),
            _match("dot", False, TOPK),
        ),
    ),
    Trial("topk_attention", "softmax", _topk_attention(1.0)),
    Trial("topk_attention", "contrast", _topk_attention(CONTRAST)),
    Trial(
        "attention",
        "lse",
        _CONTRASTED,
        (_attention(contrast=CONTRAST, counts=True, labels=True), _OPS["mean_attention_map"]),
    ),
    Trial("similarity", "exact", _OPS["similarity_argmax_per_head"], (_match("cosine", False, labels=True),)),
    Trial("similarity", "packed", _OPS["similarity_argmax_packed"]),
    Trial(
        "attention",
        "busy softmax",
        _OPS["attention_labels"],
        (_attention(counts=True, labels=True, segments=2), _OPS["distillation_step"]),
    ),
    Trial(
        "attention",
        "busy contrast",
        _attention(labels=True, contrast=CONTRAST),
        (_attention(counts=True, labels=True, segments=2, contrast=CONTRAST),),
    ),
    Trial("attention", "exact", _OPS["label_mass"], (Call(_counted_mass, _check_counted_mass),)),
    Trial("attention", "map", _OPS["mean_attention_map"]),
    Trial("attention_backward", "queries", _OPS["attention_gradient"]),
    Trial("attention_backward", "keys", _OPS["attention_gradient"]),
    Trial("attention_backward", "shared keys", _SHARED_GRADIENT),
    # kernels in Gluon for sm_90; they serve only keys with a row in the table
    Trial("similarity", "joint hopper", _OPS["similarity_argmax"], (_match("dot", True),)),
    Trial("attention", "counted softmax hopper", _OPS["attention_counts"], (_OPS["qalign_attention"],)),
    Trial("attention", "softmax hopper", _attention()),
)


def trial_named(name: str) -> Trial:
    """Look up a trial, such as "similarity joint"."""
    return next(trial for trial in TRIALS if trial.name == name)


CORE = (
    "similarity joint",
    "attention counted softmax",
    "attention softmax",
    "attention contrast",
    "attention guided",
    "similarity topk",
    "similarity joint hopper",
    "attention counted softmax hopper",
    "attention softmax hopper",
)
CORE_HEAD_DIMS = (64, 40, 128)


def order(trial: Trial, key: Key) -> tuple:
    """Sort keys by importance: bfloat16, then the ops of Q-Align at usual head dims and numbers of tokens."""
    folded = trial.name in ("similarity joint", "similarity topk") and key.head_dim != FOLDED_HEAD_DIM
    minor = trial.name not in CORE or key.head_dim not in CORE_HEAD_DIMS or folded
    return (
        key.dtype != "bfloat16",
        minor,
        USUAL_TOKENS.index(key.tokens or USUAL_TOKENS[0]),
        TRIALS.index(trial),
        (*CORE_HEAD_DIMS, *HEADS).index(key.head_dim),
    )
