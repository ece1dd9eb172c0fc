"""The project as files: its root, and what pyproject.toml declares."""

import functools
import importlib
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def packaging_arguments() -> dict[str, Any]:
    """Read what pyproject.toml declares, under setuptools' names; extras within extras are resolved."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, tool = declared["project"], declared["tool"]["setuptools"]
    module, _, name = tool["dynamic"]["version"]["attr"].rpartition(".")
    return {
        "name": project["name"],
        "version": getattr(importlib.import_module(module), name),
        "urls": project["urls"],
        "install_requires": project["dependencies"],
        "extras_require": {extra: _resolved(project, extra) for extra in project["optional-dependencies"]},
        "package_data": tool["package-data"],
    }


def _resolved(project: dict[str, Any], extra: str) -> list[str]:
    found: list[str] = []
    for text in project["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            found += [inner for name in sorted(requirement.extras) for inner in _resolved(project, name)]
        else:
            found.append(text)
    return found


def own_files() -> list[Path]:
    """List the files that git tracks or would track; skip the test where there is no checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for path in map(ROOT.joinpath, names) if path.is_file()]
