"""The arguments of every stage: the folder for its files, and its time."""

import argparse
import time
from pathlib import Path
from typing import Any

from ...suite import rows


class Clock:
    """The seconds that a stage has left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()


def parser(description: str | None) -> argparse.ArgumentParser:
    """Make the parser of a stage."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--out", type=Path, required=True, metavar="DIR")
    result.add_argument("--seconds", type=float, required=True, metavar="S")
    return result


def write(folder: Path, stage: str, **content: Any) -> None:
    """Write the JSON of a stage; its key "stage" distinguishes it from files of rows."""
    rows.write(folder / f"{stage}.json", {"stage": stage, **content})
