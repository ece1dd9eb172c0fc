"""`python -m benchmarks gpu`: what a GPU can show, first in 300 s, then everything in a few minutes."""

from .command import READINGS, add_arguments, files, run

__all__ = ["READINGS", "add_arguments", "files", "run"]
