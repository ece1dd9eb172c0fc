"""What all command lines share: errors of one line, types of options, checks before a run, exit status.

A command is a module with `add_arguments(parser)` and `run(options)`, which returns the exit status. It may
also have `files(options)`, the `Files` that it reads and writes, and `READINGS`, the conditions under which
it uses its options. `main` checks both before the run. If the run fails, its exit status is 2 for bad input,
3 for an internal error or too little memory, 130 for Ctrl-C and 141 for a closed pipe. This module needs no
torch.
"""

import argparse
import functools
import math
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from ._files import Files, check

REFUSED, FAILED, INTERRUPTED, UNREAD = 2, 3, 130, 141
SEEDS = 2**32
_OUR_WORDS = re.compile(r"([\w -]+: )?expected ")


class Reading(NamedTuple):
    """Options that a command uses only under a condition.

    Attributes:
        names: attributes of the parsed options.
        when: the condition, a function of the parsed options.
        expected: the condition in words, such as "with --mode sample".
    """

    names: tuple[str, ...]
    when: Callable[[argparse.Namespace], bool]
    expected: str


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


def add_command(parser: argparse.ArgumentParser, command: Any) -> None:
    """Add the arguments of a command and --debug to `parser`, and what `main` needs to run the command."""
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(checked_run=functools.partial(_checked_run, parser, command))


def main(
    make_parser: Callable[[], argparse.ArgumentParser],
    arguments: Sequence[str] | None = None,
    prepare: Callable[[argparse.Namespace], None] = lambda options: None,
) -> int:
    """Parse the command line, prepare, check and run; returns the exit status.

    An error is one line on stderr; --debug adds the traceback. The text of a `KeyboardInterrupt(text)` that
    `run` raises becomes part of that line.
    """
    name, debug = "", False
    try:
        try:
            parser = make_parser()
            name = parser.prog.removeprefix("python -m ")
            options = parser.parse_args(arguments)
            name, debug = getattr(options, "command", name), options.debug
            prepare(options)
            return options.checked_run(options)
        finally:
            sys.stdout.flush()  # so that a closed pipe raises here, not when Python ends
    except BrokenPipeError:
        _discard_output()
        return UNREAD
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"{name}: interrupted{f'; {interrupt}' if str(interrupt) else ''}\n")
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        status, text = describe(error)
        sys.stderr.write(f"{name}: {text}\n")
        return status


def describe(error: Exception) -> tuple[int, str]:
    """The exit status of an error and its text in one line."""
    text = " ".join(str(error).split())
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in text
    ):
        return (
            FAILED,
            f"out of memory: expected enough memory for this run, got {text.split('.')[0] or 'none'}",
        )
    if isinstance(error, OSError) and error.filename is not None:
        return REFUSED, f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)) or _OUR_WORDS.match(text):
        return REFUSED, text
    return FAILED, f"internal error: {type(error).__name__}: {text} (--debug shows the traceback)"


def _checked_run(parser: argparse.ArgumentParser, command: Any, options: argparse.Namespace) -> int:
    check_read(options, getattr(command, "READINGS", ()), parser)
    files: Callable[[argparse.Namespace], Files] | None = getattr(command, "files", None)
    if files is not None:
        check(files(options))
    return command.run(options)


def check_read(
    options: argparse.Namespace, readings: Sequence[Reading], parser: argparse.ArgumentParser
) -> None:
    """Check that every option that is given has an effect.

    Raises:
        ValueError: an option has no effect; the message names its condition.
    """
    for reading in readings:
        for name in reading.names:
            value = getattr(options, name)
            if value != parser.get_default(name) and not reading.when(options):
                option = f"--{name.replace('_', '-')}"
                given = (
                    " ".join(map(str, value))
                    if isinstance(value, list | tuple)
                    else option
                    if value is True
                    else value
                )
                raise ValueError(
                    f"{option}: expected {reading.expected}, got {given}, which has no effect here"
                )


def _discard_output() -> None:
    """Avoid a second error about the closed pipe when Python ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # stdout may have no file descriptor
        pass


def whole(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 1."""
    if whole(text) == 0:
        raise argparse.ArgumentTypeError("expected a number above zero, got 0")
    return int(text)


def seed(text: str) -> int:
    """A whole number below 2^32."""
    if whole(text) >= SEEDS:
        raise argparse.ArgumentTypeError(f"expected a whole number below {SEEDS}, got {text}")
    return int(text)


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    if number(text) <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above zero, got {text}")
    return float(text)


def fraction(text: str) -> float:
    """A number from 0 to below 1."""
    if not 0 <= number(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a fraction from 0 to below 1, got {text}")
    return float(text)


def require_device(name: str) -> None:
    """Check that torch can compute on a device.

    Raises:
        ValueError: it cannot; the message has the reason.
    """
    import torch

    try:
        (torch.ones(1, device=name) + 1).item()
    except Exception as error:  # a missing driver, another build of torch and an unknown name differ in type
        reason = textwrap.shorten(str(error), 80, placeholder=" ...")
        raise ValueError(
            f"--device: expected a device that torch can use here, such as cpu, got {name!r} ({reason})"
        ) from error
