"""The project as files: its root, and what setup.py declares."""

import functools
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def packaging_arguments() -> dict[str, Any]:
    """Read the arguments that setup.py gives to setuptools."""
    given: dict[str, Any] = {}
    fake = SimpleNamespace(setup=given.update, find_packages=lambda include: include)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", fake)
        runpy.run_path(str(ROOT / "setup.py"))
    return given
