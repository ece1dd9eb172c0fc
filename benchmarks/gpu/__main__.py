"""Run one stage in a process of its own: `python -m benchmarks.gpu MODULE --out DIR --seconds S`."""

import importlib
import os
import sys

from .running import processes


def main() -> int:
    """Run the stage of the module that the first argument names; it ends when its parent process ends."""
    processes.end_with_parent(int(os.environ.get(processes.PARENT, os.getppid())))
    return importlib.import_module(f"benchmarks.gpu.stages.{sys.argv.pop(1)}").main()


if __name__ == "__main__":
    sys.exit(main())
