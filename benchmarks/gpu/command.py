"""The command: its stages in order, the report after each of them, the exit code."""

import argparse
import sys
from pathlib import Path

from qalign_kernels import _command_line
from qalign_kernels._files import Files

from .stages import Outcome, Stage, run_all

MINUTES = 9.0
LEAST_MINUTES = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="JSON rows of each stage, logs and report.md go there")
    parser.add_argument("--minutes", type=_command_line.number, default=MINUTES, metavar="M", help=f"time for all stages (default {MINUTES:g})")


def stages(folder: Path) -> list[Stage]:
    """What is measured, the table of the report first; the sum of the least times fits in two minutes."""

    def stage(name: str, module: str, seconds: float, least_seconds: float, *arguments: str) -> Stage:
        command = (sys.executable, "-m", f"benchmarks.gpu.{module}", "--out", str(folder), *arguments)
        return Stage(name, command, seconds, least_seconds)

    return [
        stage("environment", "environment", 30, 5),
        stage("ceilings", "ceilings", 45, 10),
        stage("validate", "validation", 110, 10),
        stage("sanitizer", "sanitizer", 60, 5),
        stage("compile", "measure", 70, 10, "--compile"),
        stage("must_show", "measure", 150, 40, "--must-show"),
        stage("speed", "measure", 400, 20),
    ]


def files(arguments: argparse.Namespace) -> Files:
    return Files(writes=[("--out", arguments.out / "report.md")], folders=[("--out", arguments.out)])


def run(arguments: argparse.Namespace) -> int:
    if arguments.minutes < LEAST_MINUTES:
        raise ValueError(f"--minutes: expected at least {LEAST_MINUTES:g}, got {arguments.minutes:g}")
    require_gpu()
    folder = arguments.out.resolve()
    return execute(stages(folder), folder, 60 * arguments.minutes)


def require_gpu() -> None:
    import torch

    from qalign_kernels import _backends

    if not torch.cuda.is_available():
        raise RuntimeError(f"expected a GPU that torch can use, got torch {torch.__version__} without one")
    if problem := _backends.triton_problem():
        raise RuntimeError(f"expected a Triton that imports, got {problem}")


def execute(plan: list[Stage], folder: Path, seconds: float) -> int:
    """0 where every stage ended well, else 1; the report stands in either case."""
    folder.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []

    def after_each(outcomes: list[Outcome]) -> None:
        last = outcomes[-1]
        print(f"[{len(outcomes)}/{len(plan)}] {last.stage}: {last.status}, {last.seconds:.0f} s{f' ({last.note})' if last.note else ''}", flush=True)
        problems[:] = _write_report(folder, outcomes)

    outcomes = run_all(plan, folder, seconds, after_each)
    for problem in problems:
        print(f"report: {problem}")
    print(f"wrote {folder / 'report.md'}")
    return 1 if problems or any(outcome.status != "ok" for outcome in outcomes) else 0


def _write_report(folder: Path, outcomes: list[Outcome]) -> list[str]:
    from . import report

    try:
        (folder / "report.md").write_text(report.text(folder, outcomes))
    except Exception as error:  # what was measured lies beside it as JSON
        (folder / "report.md").write_text(f"The report could not be written: {type(error).__name__}: {error}\n")
        return [f"{type(error).__name__}: {error}"]
    return []
