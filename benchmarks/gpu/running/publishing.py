"""Publish a run while it goes on: a few files, each replaced as a whole, so that a sudden end loses little.

The stages write into a folder of their own beside many logs. A thread copies the files that changed.
"""

import contextlib
import io
import json
import tarfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from qalign_kernels._files import replacing

from ...suite import rows

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_ARCHIVES = 15.0


class Layout(NamedTuple):
    """The published files of a run.

    Attributes:
        whole: the file with the contents of all `parts`, by name; parts are JSON files of stages.
        copies: files of stages that are copied unchanged.
        archive: the file with the logs.
    """

    whole: str
    parts: tuple[str, ...]
    copies: tuple[str, ...]
    archive: str

    @property
    def files(self) -> tuple[str, ...]:
        """Name every published file."""
        return self.whole, *self.copies, self.archive


class Publisher:
    """Inside, `out` follows `work`: results half a second later, logs every 15 s."""

    def __init__(self, work: Path, out: Path, layout: Layout) -> None:
        self._work, self._out, self._layout = work, out, layout
        self._seen: dict[str, tuple[int, ...]] = {}
        self._shown: dict[str, tuple[int, ...]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Publisher":
        self._out.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.show()
        self.archive()

    def show(self) -> None:
        """Replace the files whose contents have changed."""
        layout = self._layout
        if self._changed(layout.whole, layout.parts):
            contents = {Path(part).stem: _content(self._work / part) for part in layout.parts}
            found = {name: content for name, content in contents.items() if content is not None}
            self._write(layout.whole, rows.text({"stage": Path(layout.whole).stem, **found}))
        for name in layout.copies:
            if self._changed(name, (name,)):
                self._write(name, (self._work / name).read_text())

    def archive(self) -> None:
        """Replace the archive of the logs."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for log in sorted((self._work / "logs").glob("*")):
                content = (
                    log.read_bytes()
                )  # a copy, because a log that grows while it is packed breaks the archive
                entry = tarfile.TarInfo(f"logs/{log.name}")
                entry.size, entry.mtime = len(content), int(time.time())
                archive.addfile(entry, io.BytesIO(content))
        with replacing(self._out / self._layout.archive) as unfinished:
            unfinished.write_bytes(packed.getvalue())

    def _follow(self) -> None:
        archived = time.monotonic()
        while not self._stop.wait(SECONDS_BETWEEN_LOOKS):
            with contextlib.suppress(
                OSError
            ):  # a disk that is full now may have room later; the last call raises
                self.show()
                if time.monotonic() - archived > SECONDS_BETWEEN_ARCHIVES:
                    self.archive()
                    archived = time.monotonic()

    def _changed(self, name: str, sources: Sequence[str]) -> bool:
        """Whether a source was written after `name` was published."""
        files = [self._work / source for source in sources]
        state = tuple(file.stat().st_mtime_ns if file.is_file() else 0 for file in files)
        self._seen[name] = state
        return any(state) and state != self._shown.get(name)

    def _write(self, name: str, text: str) -> None:
        with replacing(self._out / name) as unfinished:
            unfinished.write_text(text)
        self._shown[name] = self._seen[name]


def _content(file: Path) -> Any:
    return json.loads(file.read_text()) if file.is_file() else None
