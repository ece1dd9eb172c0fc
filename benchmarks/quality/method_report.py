"""Figures of methods for each case, written to disk after every one.

A run that was interrupted continues where it stopped.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalign_kernels._files import Files, is_stream
from qalign_kernels.bench import measure

from ..suite.rows import write


def files(options: argparse.Namespace) -> Files:
    """Name the files that a command with --json and --sheet writes."""
    return Files(
        writes=[
            (f"--{name}", path) for name in ("json", "sheet") if (path := getattr(options, name)) is not None
        ]
    )


@dataclass(frozen=True)
class MethodReport:
    """The figures so far.

    Args:
        kind: what a case is, such as "pairs".
        settings: the settings of the run; a report on disk must have the same.
        path: the file of the report; None keeps it in memory only.
        cases: each with "methods", the figures by method.
    """

    kind: str
    settings: dict[str, Any]
    path: Path | None
    cases: list[dict[str, Any]]

    @classmethod
    def open(cls, kind: str, settings: dict[str, Any], path: Path | None) -> "MethodReport":
        """Read the report at `path`, or start an empty one.

        Raises:
            ValueError: the file is another report, or one of other settings.
        """
        if path is None or not path.is_file():
            return cls(kind, settings, path, [])
        try:
            found = json.loads(path.read_text())
            found["settings"], found[kind]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(
                f"--json: expected a report of {kind} and their settings, got another file: {path}"
            ) from None
        if found["settings"] != settings:
            raise ValueError(f"--json: expected a report of {settings}, got one of {found['settings']}")
        return cls(kind, settings, path, found[kind])

    def methods(self, number: int, case: Mapping[str, Any]) -> dict[str, Any]:
        """Give the figures of a case by method; `case` describes a new case."""
        if number == len(self.cases):
            self.cases.append({**case, "methods": {}})
        return self.cases[number]["methods"]

    def save(self, *, complete: bool = False) -> None:
        """Write the report so far. A pipe or another stream gets the complete one alone."""
        if self.path is not None and (complete or not is_stream(self.path)):
            write(self.path, {"settings": self.settings, self.kind: self.cases})

    def table(self, methods: Sequence[str], figures: Mapping[str, str]) -> str:
        """Lay out means over the cases: a row for each method, a column for each figure."""
        rows = []
        for name in methods:
            found = [case["methods"][name] for case in self.cases if name in case["methods"]]
            means = {
                figure: sum(each[figure] for each in found) / len(found)
                for figure in figures
                if found and figure in found[0]
            }
            rows.append(
                [
                    name,
                    len(found),
                    *(f"{means[figure]:.3g}" if figure in means else "-" for figure in figures),
                ]
            )
        return measure.aligned(["method", self.kind, *figures.values()], rows)
