"""`python -m benchmarks static | speed | host | gpu | report | pages | tune | bounded | distillation | distillation_step`."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from qalign_kernels import _command_line

MODULES = {
    "host": "gpu.host",
    "bounded": "quality.bounded",
    "distillation": "quality.distillation",
    "distillation_step": "quality.distillation_step",
}  # of commands whose module is not of their name
COMMANDS = {
    "static": "compile every kernel for every architecture and hold registers, spills, memory and instructions against budgets; needs no GPU",
    "speed": "time and memory of every op against its reference, eager PyTorch, SDPA and their compiled forms, on this machine",
    "host": "time of the host's part of one call, launches replayed and not, over a driver that does nothing; needs no GPU",
    "gpu": "what one GPU can show: with --first in 300 s what decides most, then accuracy and speed against every peer; JSON and a report",
    "report": "Markdown tables and a plot from the files that speed wrote",
    "pages": "fill the generated blocks of README.md and docs/; with --check say which pages are stale",
    "tune": "sweep tiles on this GPU and rewrite the table that the kernels take them from, where a tile is 2 %% faster",
    "bounded": "bounded attention on the embedded model: two creatures in boxes, with masks alone and with guidance",
    "distillation": "attention distillation on held-out scenes, beside key and value injection: loss, colours, layout",
    "distillation_step": "one optimisation step through a whole UNet, beside stock processors, SDPA and an L1: time, peak and saved memory",
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
