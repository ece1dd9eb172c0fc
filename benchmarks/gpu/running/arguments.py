"""What every stage is told: where its files go and how long it may take."""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from qalign_kernels._files import replacing


class Clock:
    """The seconds that are left of a stage."""

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
    """Write the stage's JSON; the key "stage" tells it from files of rows."""
    write_json(folder / f"{stage}.json", {"stage": stage, **content})


def write_json(file: Path, content: Any) -> None:
    """Replace the file as a whole; what is not finite, which JSON has no word for, is null."""
    with replacing(file) as unfinished:
        unfinished.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
