"""Checks of arguments that several modules share."""

import math
from typing import Any


def require_count(name: str, number: Any, least: int = 0) -> None:
    """Check that the argument `name` is an integer of at least `least`. A bool or a float is not an integer.

    Raises:
        ValueError: `number` is something else.
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {number!r}")


def require_number(name: str, number: Any, *, least: float = -math.inf, most: float = math.inf) -> None:
    """Check that the argument `name` is a finite number of `least` to `most`. A bool or a str is none.

    Raises:
        TypeError: `number` is no number.
        ValueError: it is not finite, or out of range.
    """
    try:
        value = None if isinstance(number, (str, bytes, bool)) else float(number)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        value = None
    bounds = "" if (least, most) == (-math.inf, math.inf) else f" of {least:g} to {most:g}"
    if value is None:
        raise TypeError(f"{name}: expected a number{bounds}, got {number!r}")
    if not math.isfinite(value) or not least <= value <= most:
        raise ValueError(f"{name}: expected a finite number{bounds}, got {number!r}")


def require_uninterrupted(pipe: Any, work: str) -> None:
    """Check that `pipe._interrupt` did not ask for the end of work that leaves nothing when it is cut short.

    Raises:
        RuntimeError: it did.
    """
    if getattr(pipe, "interrupt", False):
        raise RuntimeError(f"interrupt: expected {work} to run to its end, got pipe._interrupt = True before")
