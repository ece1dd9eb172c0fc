"""`python -m benchmarks gpu`: measure one GPU, first in 300 s, then everything in a few minutes."""

from .command import READINGS, add_arguments, files, run

__all__ = ["READINGS", "add_arguments", "files", "run"]
