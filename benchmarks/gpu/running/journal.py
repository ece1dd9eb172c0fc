"""What a worker has begun, finished and found, line by line on disk, so that its successor knows where it ended."""

import json
from pathlib import Path
from typing import Any


class Journal:
    """Entries are `begin` and `end` of a first visit or of a group's timing, `group` (finished), `skip` (what is not to be tried again),
    `note` (a peer that shows no figure) and `failure` (of ours)."""

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
                continue  # the writer was stopped within the line
        return [(kind, text) for kind, text in lines]

    def texts(self, kind: str) -> list[str]:
        return [text for found, text in self.entries() if found == kind]

    def left_open(self) -> str | None:
        """What was begun and did not end: it ended the process, or let it hang."""
        marks = [(kind, text) for kind, text in self.entries() if kind in ("begin", "end")]
        return marks[-1][1] if marks and marks[-1][0] == "begin" else None

    def changed_at(self) -> float:
        return self.path.stat().st_mtime if self.path.is_file() else 0.0
