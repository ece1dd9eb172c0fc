"""Checks of arguments that several modules share."""

from typing import Any


def require_count(name: str, number: Any, least: int = 0) -> None:
    """Check that the argument `name` is an integer of at least `least`. A bool or a float is not an integer.

    Raises:
        ValueError: `number` is something else.
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {number!r}")
