"""Argument checks: one clear line naming the argument, what was expected and what came. No check reads a tensor's values."""

import math
import reprlib
from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(value: object) -> str:
    """What came, in the form that error messages use: `float32 [1, 8, 64, 40]`, or the type of what is no tensor and the value, in one line."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value is None:
        return "None"
    return f"{type(value).__name__} {' '.join(reprlib.repr(value).split())}"


def fail(argument: str, expected: str, got: object, *, error: type[Exception] = ValueError) -> None:
    raise error(f"{argument}: expected {expected}, got {describe(got)}")


def check_features(argument: str, value: Tensor) -> None:
    """A float tensor [B, H, N, D], none of them zero."""
    if not isinstance(value, Tensor):
        fail(argument, "a tensor [B, H, N, D]", value, error=TypeError)
    if value.dtype not in FLOAT_DTYPES:
        fail(argument, "float16, bfloat16, float32 or float64", value, error=TypeError)
    if value.dim() != 4 or any(size == 0 for size in value.shape):
        fail(argument, "[B, H, N, D] with every size at least 1", value)


def check_like(argument: str, value: Tensor, model_argument: str, model: Tensor) -> None:
    """Same dtype and device as `model`."""
    if value.dtype != model.dtype:
        fail(
            argument,
            f"the dtype of {model_argument}, {str(model.dtype).removeprefix('torch.')}",
            value,
            error=TypeError,
        )
    if value.device != model.device:
        raise ValueError(
            f"{argument}: expected the device of {model_argument}, {model.device}, got {value.device}"
        )


def check_sizes(argument: str, value: Tensor, **expected: int) -> None:
    """Named sizes of a [B, H, N, D] tensor, e.g. `check_sizes("key", key, heads=8, head_dim=40)`."""
    axes = {"batch": 0, "heads": 1, "tokens": 2, "head_dim": 3}
    for name, size in expected.items():
        if value.shape[axes[name]] != size:
            fail(argument, f"{name}={size}", value)


def check_integers(
    argument: str, value: Tensor, sizes: Sequence[tuple[str, int]], device: torch.device
) -> None:
    """An int32 tensor on `device`; `sizes` gives each axis as words for the message and its size; an axis that may be 1 says so in its words."""
    if not isinstance(value, Tensor) or value.dtype != torch.int32:
        fail(argument, _int32(sizes), value, error=TypeError)
    if value.dim() != len(sizes):
        fail(argument, _int32(sizes), value)
    for given, (name, size) in zip(value.shape, sizes):
        if given != size and not (given == 1 and "1" in name):
            fail(argument, _int32(sizes), value)
    if value.device != device:
        raise ValueError(f"{argument}: expected device {device}, got {value.device}")


def _int32(sizes: Sequence[tuple[str, int]]) -> str:
    """Built where a check fails only: to write a size down fixes it for torch.compile."""
    return "int32 [" + ", ".join(name.format(size) for name, size in sizes) + "]"


def check_token_labels(
    argument: str, value: Tensor, batch: int, tokens: int, tokens_name: str, device: torch.device
) -> None:
    sizes = [("B={} or 1", batch), (f"{tokens_name}={{}}", tokens)]
    check_integers(argument, value, sizes, device)


def check_counts(
    argument: str, value: Tensor, batch: int, heads: int, tokens: int, device: torch.device
) -> None:
    sizes = [("B={}", batch), ("1 or H={}", heads), ("N_k={}", tokens)]
    check_integers(argument, value, sizes, device)


def check_batch_index(
    argument: str, value: Tensor | None, query: Tensor, rows: int, rows_argument: str
) -> None:
    """Either an int32 [B] that names rows, or one row for each query row."""
    if value is not None:
        check_integers(argument, value, [("B={}", query.shape[0])], query.device)
    elif rows != query.shape[0]:
        raise ValueError(
            f"{rows_argument}: expected batch={query.shape[0]} as query has, or a {argument}, got batch={rows}"
        )


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{argument}: expected one of {', '.join(choices)}, got {value!r}")


def check_number(argument: str, value: object, *, above: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument}: expected a number, got {describe(value)}")
    if not -math.inf < value < math.inf or (above is not None and value <= above):
        raise ValueError(
            f"{argument}: expected a finite number{'' if above is None else f' above {above}'}, got {value!r}"
        )


def check_count(argument: str, value: object, limit_name: str = "", limit: int | None = None) -> None:
    """An int of at least 1 and at most `limit`."""
    inside = (
        isinstance(value, int)
        and not isinstance(value, bool)
        and value >= 1
        and (limit is None or value <= limit)
    )
    if not inside:
        fail(
            argument,
            "an integer of at least 1" if limit is None else f"an integer from 1 to {limit_name}={limit}",
            value,
        )


def check_label_sets(
    query: Tensor,
    reference: Tensor,
    query_labels: Tensor | None,
    query_name: str,
    reference_labels: Tensor | None,
    reference_name: str,
) -> None:
    """Both bit sets or neither, each given per query row."""
    if query_labels is None and reference_labels is None:
        return
    if query_labels is None or reference_labels is None:
        missing, given = (
            (query_name, reference_name) if query_labels is None else (reference_name, query_name)
        )
        raise ValueError(f"{missing}: expected int32 bit sets because {given} came, got None")
    check_token_labels(query_name, query_labels, query.shape[0], query.shape[2], "N_q", query.device)
    check_token_labels(
        reference_name, reference_labels, query.shape[0], reference.shape[2], "N_k", query.device
    )
