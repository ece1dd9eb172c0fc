"""What every stage is told: where its files go and how long it may take."""

import argparse
import json
import time
from pathlib import Path
from typing import Any


class Clock:
    """The seconds that are left of a stage."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()


def parser(description: str | None) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--out", type=Path, required=True, metavar="DIR")
    result.add_argument("--seconds", type=float, required=True, metavar="S")
    return result


def write(folder: Path, stage: str, **content: Any) -> None:
    """The stage's JSON; the key "stage" tells it from files of rows."""
    (folder / f"{stage}.json").write_text(json.dumps({"stage": stage, **content}, indent=1) + "\n")
