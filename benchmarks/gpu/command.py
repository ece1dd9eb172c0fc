"""The command `gpu`: it runs the stages in order, writes the report after each, and sets the exit code."""

import argparse
import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from qalign_kernels import _command_line
from qalign_kernels._files import Files, replacing

from .running.publishing import Layout, Publisher
from .running.sequence import Outcome, Stage, run_all

MINUTES = 7.0
LEAST_MINUTES = 1.0
FIRST_SECONDS = 285.0
READINGS = (_command_line.Reading(("minutes",), lambda options: not options.first, "without --first"),)
FIRST = Layout(
    whole="first.json",
    parts=(
        "stages.json",
        "environment.json",
        "right.json",
        "core.json",
        "kernels.json",
        "tiles.json",
        "gluon.json",
    ),
    copies=(),
    archive="first.tar.gz",
)
WHOLE = Layout(
    whole="run.json",
    parts=("stages.json", "environment.json", "ceilings.json", "sanitizer.json"),
    copies=("report.md", "must_show.json", "speed.json", "validate.json"),
    archive="logs.tar.gz",
)
Report = Callable[[Path, Sequence[Outcome]], str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for at most 8 files")
    parser.add_argument(
        "--first",
        action="store_true",
        help="in 300 s: is each op right, how fast are the main ops, is another tile faster",
    )
    parser.add_argument(
        "--minutes",
        type=_command_line.number,
        default=MINUTES,
        metavar="M",
        help=f"time of the whole run, which comes after one with --first (default {MINUTES:g})",
    )


def _stage(
    folder: Path, name: str, module: str, seconds: float, least_seconds: float, *arguments: str
) -> Stage:
    command = (sys.executable, "-m", "benchmarks.gpu", module, "--out", str(folder), *arguments)
    return Stage(name, command, seconds, least_seconds)


def first_stages(folder: Path) -> list[Stage]:
    """List the stages of `--first`, the most important first; a stage that may hang is last."""
    return [
        _stage(folder, "environment", "environment", 20, 5),
        _stage(folder, "right", "right", 105, 20),
        _stage(folder, "core", "measure", 55, 25, "--plan", "core"),
        _stage(folder, "kernels", "measure", 30, 15, "--plan", "kernels"),
        _stage(folder, "tiles", "measure", 90, 20, "--plan", "tiles"),
        _stage(folder, "gluon", "gluon_joint", 45, 30),
    ]


def stages(folder: Path) -> list[Stage]:
    """List the stages of the whole run; the table of the report comes first."""
    return [
        _stage(folder, "environment", "environment", 20, 5),
        _stage(folder, "compile", "measure", 60, 10, "--compile"),
        _stage(folder, "must_show", "measure", 130, 40, "--plan", "must_show"),
        _stage(folder, "validate", "validation", 50, 15, "--core"),
        _stage(folder, "ceilings", "ceilings", 20, 10),
        _stage(folder, "speed", "measure", 400, 20, "--plan", "speed"),
        _stage(folder, "validate rest", "validation", 60, 20),
        _stage(folder, "sanitizer", "sanitizer", 45, 10),
    ]


def files(arguments: argparse.Namespace) -> Files:
    layout = FIRST if arguments.first else WHOLE
    return Files(
        writes=[("--out", arguments.out / name) for name in layout.files], folders=[("--out", arguments.out)]
    )


def run(arguments: argparse.Namespace) -> int:
    from . import first_report, report

    if arguments.minutes < LEAST_MINUTES:
        raise ValueError(f"--minutes: expected at least {LEAST_MINUTES:g}, got {arguments.minutes:g}")
    require_gpu()
    out = arguments.out.resolve()
    layout = FIRST if arguments.first else WHOLE
    with _work_folder() as work, _ending_when_terminated(), Publisher(work, out, layout):
        if arguments.first:
            code = execute(first_stages(work), work, FIRST_SECONDS, first_report.text)
            print((work / "report.md").read_text())
        else:
            code = execute(stages(work), work, 60 * arguments.minutes, report.text)
    print(f"wrote {', '.join(name for name in layout.files if (out / name).exists())} to {out}")
    return code


def require_gpu() -> None:
    import torch

    from qalign_kernels import _backends

    if not torch.cuda.is_available():
        raise RuntimeError(f"expected a GPU that torch can use, got torch {torch.__version__} without one")
    if problem := _backends.triton_problem():
        raise RuntimeError(f"expected a Triton that imports, got {problem}")


@contextlib.contextmanager
def _work_folder() -> Iterator[Path]:
    """Make a folder for this run; the end of the run removes it."""
    folder = Path(tempfile.mkdtemp(prefix="qalign-gpu-"))
    (folder / "logs").mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _ending_when_terminated() -> Iterator[None]:
    """Inside, SIGTERM stops the stages and shows the results so far, as Ctrl-C does."""

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def execute(plan: list[Stage], folder: Path, seconds: float, report: Report) -> int:
    """Run the stages and write the report after each.

    Returns:
        0 where every stage succeeded, else 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []

    def after_each(outcomes: list[Outcome]) -> None:
        last = outcomes[-1]
        note = f" ({last.note})" if last.note else ""
        print(
            f"[{len(outcomes)}/{len(plan)}] {last.stage}: {last.status}, {last.seconds:.0f} s{note}",
            flush=True,
        )
        problems[:] = _write_report(folder, outcomes, report)

    outcomes = run_all(plan, folder, seconds, after_each)
    for problem in problems:
        print(f"report: {problem}")
    return 1 if problems or any(outcome.status != "ok" for outcome in outcomes) else 0


def _write_report(folder: Path, outcomes: list[Outcome], report: Report) -> list[str]:
    problems = []
    try:
        text = report(folder, outcomes)
    except Exception as error:  # the measurements are beside it as JSON
        problems.append(f"{type(error).__name__}: {error}")
        text = f"The report could not be written: {problems[0]}\n"
    with replacing(folder / "report.md") as unfinished:
        unfinished.write_text(text)
    return problems
