"""`python -m qalign COMMAND`: the command line of the diffusers layer; `COMMANDS` below are all there are."""

import argparse
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

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
After an error, `python -X dev -m qalign ...` shows where it came from."""
NEEDS = ("diffusers", "transformers", "PIL")  # of a command that names none; OPTION_NEEDS: of one option


class Parser(argparse.ArgumentParser):
    """Errors of one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help says more)\n")


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    top = Parser(prog="python -m qalign", description="Q-Align on diffusers models.", epilog=EPILOG, formatter_class=formatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"{__package__}.commands.{name}")
        command = commands.add_parser(name, help=summary, description=module.__doc__, formatter_class=formatter)
        module.add_arguments(command)
        needs = {"": getattr(module, "NEEDS", NEEDS), **getattr(module, "OPTION_NEEDS", {})}
        command.set_defaults(run=module.run, needs=needs)
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
    options = parser().parse_args(arguments)
    if refusal := missing_packages(options):
        sys.stderr.write(f"{options.command}: {refusal}: pip install 'qalign-kernels[demo]'\n")
        return 2
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")  # read at import; otherwise they say what they would rather have installed
    warnings.simplefilter("ignore", FutureWarning)  # between those libraries: nothing that a user of the command line could change
    try:
        return options.run(options)
    except (ValueError, RuntimeError, ImportError, OSError, FloatingPointError) as error:
        if sys.flags.dev_mode:
            raise
        sys.stderr.write(f"{options.command}: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{options.command}: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
