"""The journal of a worker, line by line on disk, so that the next worker knows where it stopped."""

import json
from pathlib import Path
from typing import Any


class Journal:
    """The entries of one plan, by kind.

    `begin` and `end` surround a first visit or the timing of a group. `group` is a finished group. `skip` is
    left out from now on. `note` names a peer without a figure, and `failure` an error of our own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, kind: str, text: str) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([kind, text]) + "\n")

    def entries(self) -> list[tuple[str, str]]:
        if not self.path.is_file():
            return []
        lines: list[Any] = []
        for line in self.path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # the writer stopped within the line
        return [(kind, text) for kind, text in lines]

    def texts(self, kind: str) -> list[str]:
        return [text for found, text in self.entries() if found == kind]

    def left_open(self) -> str | None:
        """Give what began and did not end: it ended the process, or it hung."""
        marks = [(kind, text) for kind, text in self.entries() if kind in ("begin", "end")]
        return marks[-1][1] if marks and marks[-1][0] == "begin" else None

    def changed_at(self) -> float:
        return self.path.stat().st_mtime if self.path.is_file() else 0.0
