"""What a worker has begun, finished and found, line by line on disk, so that its successor knows where it ended."""

import json
from pathlib import Path
from typing import Any


class Journal:
    """Entries are `begin` (of a first visit), `end` (of it), `group` (finished), `note` (a peer that shows no figure) and `failure` (of ours)."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, kind: str, text: str) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps([kind, text]) + "\n")

    def entries(self) -> list[tuple[str, str]]:
        if not self._path.is_file():
            return []
        lines: list[Any] = []
        for line in self._path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # the writer was stopped within the line
        return [(kind, text) for kind, text in lines]

    def texts(self, kind: str) -> list[str]:
        return [text for found, text in self.entries() if found == kind]

    def open_visit(self) -> str | None:
        """The first visit that was begun and did not end: what ended the process, or let it hang."""
        visits = [(kind, text) for kind, text in self.entries() if kind in ("begin", "end")]
        return visits[-1][1] if visits and visits[-1][0] == "begin" else None

    def changed_at(self) -> float:
        return self._path.stat().st_mtime if self._path.is_file() else 0.0
