"""One stage in a process of its own: `python -m benchmarks.gpu MODULE --out DIR --seconds S`."""

import importlib
import sys


def main() -> int:
    """Run the stage of the module that the first argument names."""
    return importlib.import_module(f"benchmarks.gpu.{sys.argv.pop(1)}").main()


if __name__ == "__main__":
    sys.exit(main())
