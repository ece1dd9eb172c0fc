"""`python -m qalign COMMAND`: the command line of the diffusers layer. `COMMANDS` lists its commands."""

import argparse
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence

from .commands import _shared

COMMANDS = {
    "demo": "show Q-Align in a few minutes: its cost, its pictures and its leakage",
    "transfer": "give one or more pictures the appearance of another picture",
    "distill": "give a picture the textures of another picture by attention distillation",
    "texture": "make a texture of any size by attention distillation",
    "bound": "draw a picture with each subject in a box, by bounded attention",
    "compare": "compare all transfer methods on one pair: pictures, time, memory, leakage",
    "methods": "list all methods: paper, what they edit, what they cost",
    "leakage": "measure attention leakage of Cross-Image, Q-Align and QAlignWarp on many scenes",
    "correspond": "draw which tokens of two pictures match, as lines and heat maps",
    "scenes": "write sample pictures for the model inside the package, with part labels",
}
DESCRIPTION = """\
Transfer the appearance of one picture to the structure of another, with diffusers models.
The method is Q-Align, or another one that `methods` lists. Start with `demo`, then `transfer`."""
EPILOG = """\
examples:
  python -m qalign demo --out demo_out
  python -m qalign scenes --count 12 --held-out --out scenes
  python -m qalign transfer --appearance scenes/0001.png --structure scenes/0003.png --out out.png
  python -m qalign correspond --scenes 0 --out matches
  python -m qalign leakage --pairs 12

Every command runs on the small model inside the package, and --model chooses another one.
`python -m qalign COMMAND --help` explains a command. --debug after a command shows the source of an error."""
NEEDS = ("diffusers", "transformers", "PIL")  # the packages of a command that has no NEEDS of its own


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    top = _shared.Parser(
        prog="python -m qalign",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=formatter,
    )
    commands = top.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
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
    """Name the packages that the command, or a given option, needs and that are not installed."""
    for option, names in options.needs.items():
        lacking = [name for name in names if importlib.util.find_spec(name) is None]
        if lacking and (not option or getattr(options, option) is not None):
            place = f"--{option}: " if option else ""
            return f"{place}expected {', '.join(names)} to be installed, found no {', '.join(lacking)}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    return _shared.main(parser, arguments, prepare)


def prepare(options: argparse.Namespace) -> None:
    """Check that the packages of a command are installed, and silence messages of libraries.

    Raises:
        ImportError: a package is missing. The text says what installs it.
    """
    if refusal := missing_packages(options):
        raise ImportError(f"{refusal}: pip install 'qalign-kernels[demo]'")
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")  # the library reads this when it is imported
    warnings.simplefilter("ignore", FutureWarning)  # about these libraries; a user cannot change the cause


if __name__ == "__main__":
    sys.exit(main())
