"""`python -m benchmarks static`: compile every kernel for every architecture, and hold it to budgets."""

from .command import READINGS, add_arguments, files, run

__all__ = ["READINGS", "add_arguments", "files", "run"]
