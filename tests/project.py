"""The project as files: its root, and what setup.py declares."""

import functools
import runpy
import shutil
import subprocess
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


def own_files() -> list[Path]:
    """List the files that git tracks or would track; skip the test where there is no checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for path in map(ROOT.joinpath, names) if path.is_file()]
