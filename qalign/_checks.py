"""Checks of arguments that several modules share."""

from typing import Any


def require_count(name: str, number: Any, least: int = 0) -> None:
    """Check that the argument `name` is an integer of at least `least`. A bool or a float is not an integer.

    Raises:
        ValueError: `number` is something else.
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {number!r}")


def require_uninterrupted(pipe: Any, work: str) -> None:
    """Check that `pipe._interrupt` did not ask for the end of work that leaves nothing when it is cut short.

    Raises:
        RuntimeError: it did.
    """
    if getattr(pipe, "interrupt", False):
        raise RuntimeError(f"interrupt: expected {work} to run to its end, got pipe._interrupt = True before")
