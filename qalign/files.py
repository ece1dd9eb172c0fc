"""Files that are written whole or not at all."""

from qalign_kernels._files import replacing

__all__ = ["replacing"]
