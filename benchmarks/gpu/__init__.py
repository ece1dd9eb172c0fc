"""`python -m benchmarks gpu`: all that a GPU can show, measured by one command within a few minutes."""

from .command import add_arguments, files, run

__all__ = ["add_arguments", "files", "run"]
