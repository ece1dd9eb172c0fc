"""`python -m benchmarks tune`: tiles that are faster on this GPU, into the table that the kernels read."""

from .command import add_arguments, files, run

__all__ = ["add_arguments", "files", "run"]
