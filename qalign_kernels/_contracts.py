"""Checks of arguments. An error names the argument, what was expected and what was given, in one line.

No check reads the values of a tensor.
"""

import math
import numbers
import operator
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NUMBER_DTYPES = (*FLOAT_DTYPES, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LARGEST_NUMBER = 2.0**127  # kernels multiply numbers by log2 e in float32
NUMBER_RANGE = "a number between -2^127 and 2^127"
LARGEST_COUNT = 2**31 - 1  # an index is int32


def describe(value: object) -> str:
    """Describe a value in one line: `float32 [1, 8, 64, 40]` for a tensor, type and value for others."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if value.is_nested:
            return f"{dtype} nested tensor"
        layout = "" if value.layout is torch.strided else f" of layout {value.layout}"
        return f"{dtype} {list(value.shape)}{layout}"
    if value is None:
        return "None"
    if isinstance(value, int) and abs(value) > LARGEST_COUNT**4:  # Python writes at most 4300 digits
        return f"{type(value).__name__} of {value.bit_length()} bits"
    return f"{type(value).__name__} {' '.join(reprlib.repr(value).split())}"


def fail(argument: str, expected: str, got: object, *, error: type[Exception] = ValueError) -> None:
    """Raise `error` with argument, expectation and value."""
    raise error(f"{argument}: expected {expected}, got {describe(got)}")


def check_dense(argument: str, value: Tensor) -> None:
    """Check that a tensor is neither sparse nor nested."""
    if value.layout is not torch.strided or value.is_nested:
        fail(argument, "a dense tensor, of layout torch.strided", value, error=TypeError)


def check_features(argument: str, value: Tensor) -> None:
    """Check for a dense float tensor [B, H, N, D] without an empty axis."""
    if not isinstance(value, Tensor):
        fail(argument, "a tensor [B, H, N, D]", value, error=TypeError)
    check_dense(argument, value)
    if value.dtype not in FLOAT_DTYPES:
        fail(argument, "float16, bfloat16, float32 or float64", value, error=TypeError)
    if value.dim() != 4 or any(size == 0 for size in value.shape):
        fail(argument, "[B, H, N, D] with every size at least 1", value)


def check_like(argument: str, value: Tensor, model_argument: str, model: Tensor) -> None:
    """Check for the dtype and the device of another argument, `model`."""
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
    """Check sizes of a [B, H, N, D] tensor by name: `check_sizes("key", key, heads=8, head_dim=40)`."""
    axes = {"batch": 0, "heads": 1, "tokens": 2, "head_dim": 3}
    for name, size in expected.items():
        if value.shape[axes[name]] != size:
            fail(argument, f"{name}={size}", value)


def check_integers(
    argument: str, value: Tensor, sizes: Sequence[tuple[str, int]], device: torch.device
) -> None:
    """Check for an int32 tensor on `device`.

    `sizes` has (text for the message, size) for each axis. An axis may be 1 if its text says so.
    """
    if not isinstance(value, Tensor) or value.dtype != torch.int32:
        fail(argument, _int32(sizes), value, error=TypeError)
    check_dense(argument, value)
    if value.dim() != len(sizes):
        fail(argument, _int32(sizes), value)
    for given, (name, size) in zip(value.shape, sizes):
        if given != size and not (given == 1 and "1" in name):
            fail(argument, _int32(sizes), value)
    if value.device != device:
        raise ValueError(f"{argument}: expected device {device}, got {value.device}")


def _int32(sizes: Sequence[tuple[str, int]]) -> str:
    """The shape for a message. Only a failed check writes sizes down: torch.compile would fix them."""
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
    """Check for an int32 [B], or for one row for each query row if there is no index."""
    if value is not None:
        check_integers(argument, value, [("B={}", query.shape[0])], query.device)
    elif rows != query.shape[0]:
        raise ValueError(
            f"{rows_argument}: expected batch={query.shape[0]}, that of query, or a {argument}, "
            f"got batch={rows}"
        )


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        got = repr(value) if isinstance(value, (str, int, float, type(None))) else describe(value)
        raise ValueError(f"{argument}: expected one of {', '.join(choices)}, got {got}")


def number(argument: str, value: object, *, above: float | None = None) -> float:
    """Check for a finite number, which float32 must hold, and convert it.

    As for SDPA, it may be a numpy scalar or a tensor with one element, no dimension and no gradient.
    """
    found = value if type(value) is float else _float(argument, value)
    if not -math.inf < found < math.inf or (above is not None and found <= above):
        raise ValueError(
            f"{argument}: expected a finite number{'' if above is None else f' above {above}'}, got {value!r}"
        )
    if not -LARGEST_NUMBER <= found <= LARGEST_NUMBER:
        fail(argument, NUMBER_RANGE, value)
    return found


def _float(argument: str, value: Any) -> float:
    if isinstance(value, Tensor):
        valid = value.dim() == 0 and not value.requires_grad and value.dtype in NUMBER_DTYPES
    else:
        valid = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not valid:
        raise TypeError(f"{argument}: expected a number, got {describe(value)}")
    try:
        return float(value)
    except OverflowError:
        fail(argument, NUMBER_RANGE, value)
        raise


def count(argument: str, value: Any, limit_name: str = "", limit: int | None = None) -> int:
    """Check for an integer from 1 to `limit`, and convert it from a numpy scalar or a tensor without axes."""
    found = value if type(value) is int else _integer(value)
    if found is None or found < 1 or found > (LARGEST_COUNT if limit is None else limit):
        expected = "an integer of at least 1"
        if limit is not None:
            expected = f"an integer from 1 to {limit_name}={limit}"
        elif found is not None and found > LARGEST_COUNT:
            expected = f"an integer of at most {LARGEST_COUNT}"
        fail(argument, expected, value)
    return found  # type: ignore[return-value]


def _integer(value: Any) -> int | None:
    """An int; None for what is none, such as a bool."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or (isinstance(value, Tensor) and (value.dim() or value.dtype == torch.bool)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def require_query_labels(query_labels: Tensor | None, labels_argument: str, batch: int, tokens: int) -> None:
    """Check that queries have labels, because keys have."""
    if query_labels is None:
        raise ValueError(
            f"query_labels: expected int32 bit sets [B={batch} or 1, N_q={tokens}], "
            f"because {labels_argument} is given, got None"
        )


def check_label_sets(
    query: Tensor,
    reference: Tensor,
    query_labels: Tensor | None,
    query_name: str,
    reference_labels: Tensor | None,
    reference_name: str,
) -> None:
    """Check that both label tensors are given, or neither, and their shapes."""
    if query_labels is None and reference_labels is None:
        return
    if query_labels is None or reference_labels is None:
        missing, given = (
            (query_name, reference_name) if query_labels is None else (reference_name, query_name)
        )
        raise ValueError(f"{missing}: expected int32 bit sets, because {given} is given, got None")
    check_token_labels(query_name, query_labels, query.shape[0], query.shape[2], "N_q", query.device)
    check_token_labels(
        reference_name, reference_labels, query.shape[0], reference.shape[2], "N_k", query.device
    )
