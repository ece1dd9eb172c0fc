"""The command `python -m qalign_kernels.validate`; `qalign_kernels.validation` does the work."""

import sys

from .validation.command import main

if __name__ == "__main__":
    sys.exit(main())
