"""The commands of `python -m qalign`, one module each, as `qalign_kernels._command_line` describes."""

import importlib.util
import sys
from pathlib import Path


def _load_without_torch(name: str) -> None:
    """Import a module of `qalign_kernels` that needs no torch, but not its package, which imports torch.

    `--help` then answers at once. Later imports find the module under its own name.
    """
    if name in sys.modules:
        return
    package, stem = name.split(".")
    found = importlib.util.find_spec(package)
    folder = Path(found.submodule_search_locations[0])  # type: ignore[index,union-attr]
    spec = importlib.util.spec_from_file_location(name, folder / f"{stem}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]


for _name in ("qalign_kernels._choices", "qalign_kernels._files", "qalign_kernels._command_line"):
    _load_without_torch(_name)
