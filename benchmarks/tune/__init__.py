"""`python -m benchmarks tune`: write tiles that are faster on this GPU into the table of the kernels."""

from .command import add_arguments, files, run

__all__ = ["add_arguments", "files", "run"]
