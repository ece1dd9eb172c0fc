"""Checks of arguments that several callers make."""

from typing import Any


def require_count(name: str, number: Any, least: int = 0) -> None:
    """The argument `name` has to be an integer of at least `least`; True and 7.0 are none.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {number!r}")
