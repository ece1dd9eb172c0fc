"""Run stages in order under one deadline. Each is a process, and a failure does not stop the rest."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import arguments, processes

SECONDS_TO_REPORT = 5.0


class Stage(NamedTuple):
    """A command that gets `--seconds S` and must end by itself after S seconds; it is stopped a little later.

    S is at most `seconds`. With less than `least_seconds` left the stage is skipped, and earlier stages keep
    that much time free for it.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    least_seconds: float


class Outcome(NamedTuple):
    """How a stage ended: ok, failed (exit code), stopped (time limit) or skipped (no time left)."""

    stage: str
    status: str
    seconds: float
    note: str


def run_all(
    stages: Sequence[Stage], folder: Path, seconds: float, after_each: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Run the stages one after the other within `seconds`; stages.json in `folder` has the outcomes."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds - SECONDS_TO_REPORT
    outcomes: list[Outcome] = []
    for position, stage in enumerate(stages):
        reserved = sum(later.least_seconds for later in stages[position + 1 :])
        outcomes.append(
            _run(stage, folder / "logs" / f"{stage.name}.log", deadline - time.monotonic(), reserved)
        )
        arguments.write(folder, "stages", outcomes=[outcome._asdict() for outcome in outcomes])
        after_each(outcomes)
    return outcomes


def _run(stage: Stage, log: Path, left: float, reserved: float) -> Outcome:
    if left < stage.least_seconds:
        return Outcome(
            stage.name,
            "skipped",
            0.0,
            f"{max(left, 0):.0f} s left, it wants at least {stage.least_seconds:.0f}",
        )
    granted = min(stage.seconds, max(stage.least_seconds, left - reserved))
    shortened = f"shortened to {granted:.0f} of {stage.seconds:.0f} s" if granted < stage.seconds else ""
    start = time.monotonic()
    code = processes.run_group(
        (*stage.command, "--seconds", f"{granted:.1f}"), log, granted + min(SECONDS_TO_REPORT, 0.1 * granted)
    )
    took = round(time.monotonic() - start, 1)
    if code is None:
        return Outcome(
            stage.name, "stopped", took, f"still running after {took:.0f} s; what it had written counts"
        )
    if code != 0:
        return Outcome(stage.name, "failed", took, f"exit code {code}: {processes.last_line(log)}")
    return Outcome(stage.name, "ok", took, shortened)
