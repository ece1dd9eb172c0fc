"""The published methods: their settings, and how they compute attention from queries, keys and values.

`_names` lists them once. Their modules are imported when they are used, because they import torch.
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from . import _names

if TYPE_CHECKING:
    from ._classes import *  # noqa: F403
    from ._editing import Card as Card
    from ._editing import Editing as Editing
    from ._editing import Hook as Hook
    from ._editing import Method as Method
    from ._editing import Project as Project
    from ._editing import Wrapped as Wrapped
    from ._editing import require_method as require_method

_MODULES = {
    **_names.MODULES,
    **dict.fromkeys(
        ("Card", "Editing", "Hook", "Method", "Project", "Wrapped", "require_method"), "_editing"
    ),
}


class _Classes(Mapping[str, Any]):
    """Classes by the name of the method; each is imported when it is read."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._paths = paths

    def __getitem__(self, name: str) -> Any:
        return __getattr__(self._paths[name].split(".")[1])

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


TRANSFERS: Mapping[str, "type[Method]"] = _Classes(_names.TRANSFERS)  # the methods with an appearance row
METHODS: Mapping[str, "type[Method]"] = _Classes(_names.TRANSFERS | _names.OTHERS)

if not TYPE_CHECKING:
    __all__ = sorted(["METHODS", "TRANSFERS", *_MODULES])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
