"""`python -m qalign COMMAND`: the command line of the diffusers layer; `COMMANDS` below are all there are."""

import argparse
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence

from .commands import _shared

COMMANDS = {
    "demo": "one denoising step over two photographs, then appearance transfer between two scenes, measured",
    "transfer": "give one or more pictures the appearance of another",
    "distill": "give a picture the textures of another by attention distillation: its latents are optimised",
    "texture": "grow a texture to any size by attention distillation, window by window",
    "bound": "draw a picture with each subject in its box, by bounded attention",
    "compare": "all methods of transfer on one pair: pictures, time, memory and leakage side by side",
    "methods": "all methods: papers, what they edit, what they cost",
    "leakage": "where attention goes on held-out scenes: Cross-Image and Q-Align, with intervals",
    "correspond": "which tokens of two pictures match, as lines and heat maps",
    "scenes": "sample pictures of the embedded model's world, with their labels",
}
EPILOG = """\
examples:
  python -m qalign demo --out demo_out
  python -m qalign scenes --count 12 --held-out --out scenes
  python -m qalign transfer --appearance scenes/0001.png --structure scenes/0003.png --out out.png
  python -m qalign correspond --scenes 0 --out matches
  python -m qalign leakage --pairs 12

Everything runs on the model inside the package unless --model names another. `python -m qalign COMMAND --help` says more.
After an error, --debug behind the command shows where it came from."""
NEEDS = ("diffusers", "transformers", "PIL")  # of a command that names none; OPTION_NEEDS: of one option


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    top = _shared.Parser(
        prog="python -m qalign",
        description="Q-Align on diffusers models.",
        epilog=EPILOG,
        formatter_class=formatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"{__package__}.commands.{name}")
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=formatter
        )
        _shared.add_command(command, module)
        needs = {"": getattr(module, "NEEDS", NEEDS), **getattr(module, "OPTION_NEEDS", {})}
        command.set_defaults(needs=needs)
    return top


def missing_packages(options: argparse.Namespace) -> str | None:
    """Say which packages the command, or an option that was given, needs and does not find, if any."""
    for option, names in options.needs.items():
        lacking = [name for name in names if importlib.util.find_spec(name) is None]
        if lacking and (not option or getattr(options, option) is not None):
            place = f"--{option}: " if option else ""
            return f"{place}expected {', '.join(names)} to be installed, found no {', '.join(lacking)}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    return _shared.main(parser, arguments, prepare)


def prepare(options: argparse.Namespace) -> None:
    """Before a command: what it needs is installed, and the libraries below are quiet.

    Raises:
        ImportError: something is not installed, and what installs it.
    """
    if refusal := missing_packages(options):
        raise ImportError(f"{refusal}: pip install 'qalign-kernels[demo]'")
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(
            f"{library}_VERBOSITY", "error"
        )  # read at import; otherwise they say what they would rather have installed
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # between those libraries: nothing that a user of the command line could change


if __name__ == "__main__":
    sys.exit(main())
