"""The published methods: their settings, and how they compute attention from queries, keys and values.

`_names` lists them once. Their modules are imported when they are used, because they import torch.
"""

import importlib
import inspect
import re
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
    __all__ = sorted(["METHODS", "TRANSFERS", "find_method", *_MODULES])


def find_method(name: str, known: Mapping[str, "type[Method]"] = METHODS) -> "type[Method]":
    """Find the class of a method by its name, also of a method outside this package.

    >>> from qalign.methods import find_method
    >>> find_method("qalign").__name__, find_method("qalign.methods.qalign:QAlignWarp").__name__
    ('QAlign', 'QAlignWarp')

    Args:
        name: a key of `known`, or "package.module:Class" for a class in any module that can be imported.
        known: the methods that have a name.

    Raises:
        ValueError: an unknown name, a module that cannot be imported, a class that is missing, is no method,
            or has a setting without a default.
    """
    if name in known:
        return known[name]
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        expected = f"a method, 'package.module:Class' or one of {', '.join(known)}"
        raise ValueError(f"method: expected {expected}, got {name!r}")
    module, kind = name.split(":")
    try:
        found = vars(importlib.import_module(module)).get(kind)
    except ImportError as error:
        raise ValueError(
            f"method: expected a module to import, got {module!r} of {name!r} ({error})"
        ) from error
    if found is None:
        raise ValueError(f"method: expected a class of {module}, got {kind!r}, which it does not define")
    base = __getattr__("Method")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"method: expected a class that extends qalign.Editing, got {name!r}: {found!r}")
    settings = inspect.signature(found).parameters.values()
    unset = [
        each.name for each in settings if each.default is each.empty and each.kind is not each.VAR_KEYWORD
    ]
    if unset:
        raise ValueError(
            f"method: expected settings with defaults in {name!r}, got none for {', '.join(unset)}"
        )
    return found


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
