"""Checkpoints of one training run, which carry the settings of the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qalign_kernels._files import replacing

ADVICE = "delete it or take another folder"


class Checkpoints:
    """A folder with one file for each stage of a run.

    Args:
        folder: made if it is missing.
        settings: plain values that decide the result of the run.
        device: of the loaded tensors.

    Raises:
        ValueError: the folder has checkpoints of other settings, or files that are none.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], device: torch.device) -> None:
        self.folder, self.settings, self.device = folder, dict(settings), device
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.pt")):
            self._read(path, mmap=True)  # the settings alone are read

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        with replacing(self._path(name)) as unfinished:
            torch.save({**state, "settings": self.settings}, unfinished)

    def load(self, name: str) -> dict[str, Any] | None:
        """Return the last saved state, or None if there is none."""
        return self._read(self._path(name)) if name in self else None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"

    def _read(self, path: Path, mmap: bool = False) -> dict[str, Any]:
        try:
            where = "cpu" if mmap else self.device
            state = torch.load(path, map_location=where, weights_only=True, mmap=mmap)
            there = dict(state.pop("settings"))
        except Exception as error:  # torch.load raises any kind
            got = f"a file without its settings or a damaged one ({type(error).__name__}); {ADVICE}"
            raise ValueError(f"{path}: expected a checkpoint, got {got}") from error
        for name in sorted({*there, *self.settings}):
            found, wanted = there.get(name), self.settings.get(name)
            if found != wanted:
                raise ValueError(
                    f"{path}: expected a checkpoint of {name} {wanted}, got one of {name} {found}; {ADVICE}"
                )
        return state
