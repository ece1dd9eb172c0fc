"""`python -m benchmarks speed`: time and memory of every op beside its peers, on this machine."""

from .command import add_arguments, files, run

__all__ = ["add_arguments", "files", "run"]
