"""Keep the results of a long run on disk one by one, so that a stopped run can continue."""

import dataclasses
import io
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from qalign_kernels._files import replacing

_log = logging.getLogger("qalign")
Item = TypeVar("Item")
Result = TypeVar("Result")


class KeptResults:
    """A folder with one file for each result, all of the same settings. Processes may share it.

    >>> import tempfile
    >>> from dataclasses import make_dataclass
    >>> Item, Result = make_dataclass("Item", ["seed"]), make_dataclass("Result", ["value"])
    >>> kept = KeptResults(Path(tempfile.mkdtemp()) / "report.json.partial", {"steps": 20})
    >>> work = kept.keeping("square", lambda item: Result(item.seed**2), Result)
    >>> [work(Item(seed)).value for seed in (2, 3, 2)]  # the third is read from its file
    [4, 9, 4]
    >>> len(kept)
    2
    >>> kept.remove()

    Args:
        folder: made with the first result.
        settings: plain values that decide the results.

    Raises:
        ValueError: the folder holds results of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        if not self._file.is_file():
            return
        try:
            found = dict(json.loads(self._file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{self._file}: expected settings of results, got {error}") from error
        for name in sorted({*found, *self.settings}):
            if (there := found.get(name)) != (wanted := self.settings.get(name)):
                got = f"{len(self)} of {name} {there}; delete it to begin anew"
                raise ValueError(f"{folder}: expected results of {name} {wanted}, got {got}")

    @property
    def _file(self) -> Path:
        return self.folder / "settings.json"

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.pt")))

    def keeping(
        self, name: str, work: Callable[[Item], Result], kind: Callable[..., Result]
    ) -> Callable[[Item], Result]:
        """Return a `work` that reads the result of an item from its file, or computes it and keeps it.

        Args:
            name: of this work. One folder may hold the results of several works.
            work: takes items that are dataclasses of numbers.
            kind: the dataclass of its results. Its fields hold plain values and tensors.
        """

        def keep(item: Item) -> Result:
            numbers = dataclasses.astuple(item)  # type: ignore[call-overload]
            path = self.folder / f"{name}-{'-'.join(map(str, numbers))}.pt"
            if (known := _read(path)) is not None:
                return kind(**known)
            result, content = work(item), io.BytesIO()
            torch.save(vars(result), content)
            with replacing(self._file) as unfinished:
                unfinished.write_text(json.dumps(self.settings, indent=1) + "\n", encoding="utf-8")
            with replacing(path) as unfinished:
                unfinished.write_bytes(content.getvalue())
            return result

        return keep

    def remove(self) -> None:
        """Remove the folder when the report is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path) -> dict[str, Any] | None:
    """The fields of a kept result, or None if there is no file or a damaged one."""
    if not path.is_file():
        return None
    try:
        return dict(torch.load(path, weights_only=True))
    except Exception as error:  # torch.load raises any kind
        _log.warning("the result in %s cannot be read and is made again (%s)", path, type(error).__name__)
        return None


def keeping(
    kept: KeptResults | None, name: str, work: Callable[[Any], Result], kind: Callable[..., Result]
) -> Callable[[Any], Result]:
    """`work` with its results kept, or `work` itself if nothing keeps them."""
    return work if kept is None else kept.keeping(name, work, kind)
