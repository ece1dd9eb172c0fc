"""`python -m benchmarks static`: every kernel compiled for every architecture and held against budgets."""

from .command import READINGS, add_arguments, files, run

__all__ = ["READINGS", "add_arguments", "files", "run"]
