"""Measure the kernels: `python -m benchmarks COMMAND`, see COMMANDS."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from qalign_kernels import _command_line

MODULES = {  # of commands whose module has another name
    "host": "gpu.host",
    "bounded": "quality.bounded",
    "distillation": "quality.distillation",
    "distillation_step": "quality.distillation_step",
}
COMMANDS = {
    "static": (
        "compile every kernel for every architecture, and hold registers, spills, shared memory and "
        "instructions to budgets; needs no GPU"
    ),
    "speed": (
        "time and memory of every op on this machine, beside its reference, eager PyTorch, SDPA and "
        "their compiled forms"
    ),
    "host": (
        "time that the host takes for one call, with replayed launches and without, over a driver that "
        "does nothing; needs no GPU"
    ),
    "gpu": (
        "measure one GPU: with --first the most important figures in 300 s, else accuracy and speed "
        "beside every peer; writes JSON and a report"
    ),
    "report": "Markdown tables and a plot from result files",
    "pages": "fill the generated blocks of README.md and docs/; --check only says which pages are stale",
    "tune": "sweep tiles on this GPU, and rewrite the table of the kernels where a tile is 2 %% faster",
    "bounded": "bounded attention on the embedded model: two creatures in boxes, with masks alone and guided",
    "distillation": (
        "attention distillation on held-out scenes, beside key and value injection: loss, colours and layout"
    ),
    "distillation_step": (
        "one optimisation step through a whole UNet, beside stock processors, SDPA and an L1: time, peak "
        "memory and saved memory"
    ),
}


def parser() -> argparse.ArgumentParser:
    top = _command_line.Parser(prog="python -m benchmarks", description="Measure the kernels.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        _command_line.add_command(command, importlib.import_module(f"benchmarks.{MODULES.get(name, name)}"))
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    return _command_line.main(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
