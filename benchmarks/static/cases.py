"""Every launcher of the Triton backend in every variant, on meta tensors: the static gate compiles these."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qalign_kernels import Segment
from qalign_kernels.attention import Guide

BATCH, NUM_HEADS, TOPK, NUM_LABELS = 2, 8, 8, 4


class Case(NamedTuple):
    """A named way to launch kernels: `run(head_dim, dtype, tokens)` inside `_launch.recording`.

    Core cases represent the others where time is short.
    """

    name: str
    run: Callable[[int, torch.dtype, int], Any]
    core: bool = False


def _module(stem: str) -> Any:
    from qalign_kernels import _backends

    return _backends.implementation("triton", stem)


def _features(head_dim: int, dtype: torch.dtype, tokens: int, count: int) -> list[Tensor]:
    """Make [B, H, N, D] views of [B, N, H, D] storage, the layout of attention processors."""
    return [
        torch.empty((BATCH, tokens, NUM_HEADS, head_dim), dtype=dtype, device="meta").transpose(1, 2)
        for _ in range(count)
    ]


def _integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")


def _argmax(similarity: str, joint: bool, exact: bool, labelled: bool) -> Case:
    def run(head_dim: int, dtype: torch.dtype, tokens: int) -> Any:
        query, reference = _features(head_dim, dtype, tokens, 2)
        labels = (_integers(BATCH, tokens), _integers(BATCH, tokens)) if labelled else (None, None)
        return _module("similarity").similarity_argmax(
            query, reference, similarity, joint, *labels, None, exact=exact
        )

    words = [
        "similarity_argmax",
        similarity,
        "joint" if joint else "per_head",
        "exact" if exact else "packed",
        "labels" if labelled else "",
    ]
    return Case(" ".join(words).strip(), run)


def _topk(similarity: str, joint: bool, k: int, labelled: bool) -> Case:
    def run(head_dim: int, dtype: torch.dtype, tokens: int) -> Any:
        query, reference = _features(head_dim, dtype, tokens, 2)
        labels = (_integers(BATCH, tokens), _integers(BATCH, tokens)) if labelled else (None, None)
        return _module("similarity").similarity_topk(query, reference, k, similarity, joint, *labels, None)

    words = [
        "similarity_topk",
        similarity,
        "joint" if joint else "per_head",
        f"k={k}",
        "labels" if labelled else "",
    ]
    return Case(" ".join(words).strip(), run)


def _attention(
    name: str,
    *,
    counts: bool = False,
    labels: bool = False,
    contrast: float = 1.0,
    segments: int = 1,
    guided: bool = False,
    lse: bool = False,
    rows: bool = False,
    value_dim: int | None = None,
) -> Case:
    def run(head_dim: int, dtype: torch.dtype, tokens: int) -> Any:
        query, key, guide_query, guide_key = _features(head_dim, dtype, tokens, 4)
        (value,) = _features(value_dim or head_dim, dtype, tokens, 1)
        parts = [
            Segment(
                key,
                value,
                counts=_integers(BATCH, 1, tokens) if counts and position == 0 else None,
                labels=_integers(BATCH, tokens) if labels else None,
                logit_scale=1.0 + position,
                logit_shift=0.5 * position,
                batch_index=_integers(BATCH) if rows else None,
            )
            for position in range(segments)
        ]
        return _module("attention").attention(
            query,
            parts,
            scale=head_dim**-0.5,
            contrast=contrast,
            query_labels=_integers(BATCH, tokens) if labels else None,
            guide=Guide(guide_query, guide_key, 20.0) if guided else None,
            need_lse=lse,
        )

    return Case(f"attention {name}", run)


def _gradient(
    name: str = "",
    *,
    counts: bool = False,
    labels: bool = False,
    segments: int = 1,
    rows: bool = False,
    value_dim: int | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> Case:
    """Make a case of the backward pass; `needs` says which of query, keys and values need a gradient."""

    def run(head_dim: int, dtype: torch.dtype, tokens: int) -> Any:
        query, key = _features(head_dim, dtype, tokens, 2)
        value, grad_output = _features(value_dim or head_dim, dtype, tokens, 2)
        lse = torch.empty((BATCH, NUM_HEADS, tokens), device="meta")
        parts = [
            Segment(
                key,
                value,
                counts=_integers(BATCH, 1, tokens) if counts and position == 0 else None,
                labels=_integers(BATCH, tokens) if labels else None,
                logit_scale=1.0 + position,
                batch_index=_integers(BATCH) if rows else None,
            )
            for position in range(segments)
        ]
        output = torch.empty(grad_output.shape, dtype=dtype, device="meta")
        return _module("attention").attention_backward(
            grad_output,
            None,
            output,
            lse,
            query,
            parts,
            scale=head_dim**-0.5,
            contrast=1.0,
            guide=None,
            query_labels=_integers(BATCH, tokens) if labels else None,
            needs=[needs[0], *[needs[1]] * segments, *[needs[2]] * segments],
        )

    return Case(f"attention_backward {name}".strip(), run)


def _distillation(name: str = "", *, labels: bool = False, images: int = 1) -> Case:
    def run(head_dim: int, dtype: torch.dtype, tokens: int) -> Any:
        output, query, key, value = _features(head_dim, dtype, tokens, 4)
        parts = [
            Segment(key, value, labels=_integers(BATCH, tokens) if labels else None) for _ in range(images)
        ]
        return _module("distillation").distillation_loss(
            output,
            query,
            parts,
            scale=head_dim**-0.5,
            query_labels=_integers(BATCH, tokens) if labels else None,
            need_signs=True,
        )

    return Case(f"distillation_loss {name}".strip(), run)


def _match_counts(head_dim: int, dtype: torch.dtype, tokens: int) -> Any:
    return _module("rearrange").match_counts(_integers(BATCH, 1, tokens), tokens)


def _compact(head_dim: int, dtype: torch.dtype, tokens: int) -> Any:
    return _module("rearrange").compact(_integers(BATCH, 1, tokens))


def _take_chosen(head_dim: int, dtype: torch.dtype, tokens: int) -> Any:
    """Take rows of so many tokens that a program has several tiles of them."""
    sources = _features(head_dim, dtype, 4 * tokens, 2)
    return _module("rearrange").take_chosen(sources, _integers(BATCH, 1, 4 * tokens), None)


def _take_rows(head_dim: int, dtype: torch.dtype, tokens: int) -> Any:
    return _module("rearrange").take_rows(*_features(head_dim, dtype, tokens, 1), _integers(BATCH, 1, tokens))


def _rearranged(
    name: str,
    *,
    similarity: str = "cosine",
    joint: bool = True,
    contrast: float = 1.0,
    labelled: bool = False,
) -> Case:
    def run(head_dim: int, dtype: torch.dtype, tokens: int) -> Any:
        labels = {f"{side}_labels": _integers(BATCH, tokens) for side in ("query", "ref")} if labelled else {}
        return _module("qalign_attention").rearranged_attention(
            *_features(head_dim, dtype, tokens, 5),
            similarity,
            joint,
            scale=head_dim**-0.5,
            contrast=contrast,
            **labels,
        )

    return Case(f"rearranged_attention {name}".strip(), run)


def _unit_features(head_dim: int, dtype: torch.dtype, tokens: int) -> Any:
    return _module("qalign_attention").unit_features(*_features(head_dim, dtype, tokens, 2))


def _label_mass(counts: bool) -> Case:
    def run(head_dim: int, dtype: torch.dtype, tokens: int) -> Any:
        query, key = _features(head_dim, dtype, tokens, 2)
        multiplicity = _integers(BATCH, 1, tokens) if counts else None
        labels = _integers(BATCH, tokens)
        return _module("probe").label_mass(
            query, key, labels, NUM_LABELS, scale=head_dim**-0.5, counts=multiplicity
        )

    return Case("label_mass counts" if counts else "label_mass", run)


def _label_mass_gradient(head_dim: int, dtype: torch.dtype, tokens: int) -> Any:
    query, key = _features(head_dim, dtype, tokens, 2)
    mass = torch.empty((BATCH, NUM_HEADS, tokens, NUM_LABELS), device="meta")
    return _module("probe").label_mass_backward(
        mass,
        mass,
        query,
        key,
        _integers(BATCH, tokens),
        NUM_LABELS,
        scale=head_dim**-0.5,
        counts=None,
        needs=[True, True],
    )


def _mean_attention_map(head_dim: int, dtype: torch.dtype, tokens: int) -> Any:
    return _module("probe").mean_attention_map(*_features(head_dim, dtype, tokens, 2), scale=head_dim**-0.5)


def _topk_attention(contrast: float) -> Case:
    def run(head_dim: int, dtype: torch.dtype, tokens: int) -> Any:
        index = _integers(BATCH, 1, tokens, TOPK)
        return _module("qalign_attention").topk_attention(
            *_features(head_dim, dtype, tokens, 3),
            index,
            scale=head_dim**-0.5,
            contrast=contrast,
            batch_index=None,
        )

    return Case("topk_attention contrast" if contrast != 1.0 else "topk_attention", run)


_CORE = {
    "similarity_argmax dot per_head exact",
    "similarity_argmax dot per_head packed",
    "similarity_argmax cosine joint exact",
    "similarity_topk cosine joint k=8",
    "match_counts",
    "compact",
    "take_chosen",
    "unit_features",
    "rearrange_kv",
    "attention counts",
    "attention contrast",
    "label_mass",
    "mean_attention_map",
    "topk_attention",
    "rearranged_attention",
    "distillation_loss",
    "attention_backward",
}
_ALL = [
    *(
        _argmax(similarity, joint, exact, False)
        for similarity in ("dot", "cosine")
        for joint in (False, True)
        for exact in (True, False)
    ),
    *(_argmax("cosine", joint, exact, True) for joint in (False, True) for exact in (True, False)),
    _topk("dot", False, TOPK, False),
    _topk("cosine", True, TOPK, False),
    _topk("cosine", True, TOPK, True),
    _topk("cosine", True, 64, False),
    Case("match_counts", _match_counts),
    Case("compact", _compact),
    Case("take_chosen", _take_chosen),
    Case("unit_features", _unit_features),
    Case("rearrange_kv", _take_rows),
    _attention("plain"),
    _attention("lse", lse=True),
    _attention("counts", counts=True),
    _attention("labels", labels=True),
    _attention("counts labels", counts=True, labels=True),
    _attention("batch_index", rows=True),
    _attention("narrow value", value_dim=32),
    _attention("segments", segments=2),
    _attention("segments counts labels", segments=2, counts=True, labels=True),
    _attention("contrast", contrast=1.67),
    _attention("contrast counts", contrast=1.67, counts=True),
    _attention("contrast labels", contrast=1.67, labels=True),
    _attention("contrast segments", contrast=1.67, segments=2),
    _attention("guided", guided=True),
    _attention("guided labels", guided=True, labels=True),
    _gradient(),
    _gradient("keys only", needs=(False, True, False)),
    _gradient("values only", needs=(False, False, True)),
    _gradient("counts", counts=True),
    _gradient("batch_index", rows=True),
    _gradient("narrow value", value_dim=32),
    _gradient("segments counts labels", segments=2, counts=True, labels=True),
    _distillation(),
    _distillation("labels", labels=True),
    _distillation("images", images=2),
    _label_mass(False),
    _label_mass(True),
    Case("label_mass_backward", _label_mass_gradient),
    Case("mean_attention_map", _mean_attention_map),
    _topk_attention(1.0),
    _topk_attention(1.67),
    _rearranged(""),
    _rearranged("per_head", joint=False),
    _rearranged("dot", similarity="dot"),
    _rearranged("contrast", contrast=1.67),
    _rearranged("labels", labelled=True),
]
CASES = [case._replace(core=case.name in _CORE) for case in _ALL]
