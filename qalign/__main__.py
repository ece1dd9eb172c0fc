"""`python -m qalign demo`: the command line of the diffusers layer."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

DEMO_NEEDS = ("diffusers", "psutil", "skimage", "matplotlib")


def size(text: str) -> int:
    """A picture size: a multiple of 32 pixels, so that two halvings of the latent grid come out even."""
    value = int(text) if text.isdigit() else 0
    if value < 64 or value % 32:
        raise argparse.ArgumentTypeError(f"expected a multiple of 32 from 64, got {text!r}")
    return value


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m qalign", description="Q-Align on diffusers models.")
    commands = top.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="one denoising step over two photographs: stock, Q-Align materialised, Q-Align as shipped")
    demo.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="for the picture and its figures (default: %(default)s)")
    demo.add_argument("--size", type=size, default=512, metavar="PIXELS", help="side of the photographs, a multiple of 32 (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of weights and noise (default: %(default)s)")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    missing = [name for name in DEMO_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(f"demo: expected {', '.join(DEMO_NEEDS)} to be installed, found no {', '.join(missing)}: pip install -e '.[demo]'\n")
        return 2
    from . import demo

    demo.run(options.out, size=options.size, seed=options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
