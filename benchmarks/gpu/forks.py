"""Functions in processes of their own, forked from a server that has everything imported and no device."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from . import processes

STEMS = (
    "attention",
    "attention_backward",
    "distillation",
    "probe",
    "qalign_attention",
    "rearrange",
    "similarity",
)
PRELOADED = (
    "benchmarks.gpu.right",
    "benchmarks.gpu.validation",
    *(f"qalign_kernels._triton.{stem}" for stem in STEMS),
)


class Answer(NamedTuple):
    """What the function returned, or why there is nothing."""

    value: Any = None
    error: str | None = None


def preload() -> None:
    """Say what the server imports, before the first `ask`."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))


def ask(function: Callable[..., Any], *arguments: Any, log: Path, seconds: float) -> Answer:
    """Call a function of an importable module in a new process, whose output is appended to `log`.

    What raises, ends its process or is still running after `seconds` is an error.
    """
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, log, function, arguments))
    process.start()
    sender.close()
    try:
        if receiver.poll(max(seconds, 0)):
            return Answer(*receiver.recv())
        return Answer(error=f"did not come to an end in {seconds:.0f} s")
    except EOFError:
        process.join()
        return Answer(error=f"ended its process with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, log: Path, function: Callable[..., Any], arguments: tuple) -> None:
    processes.end_with_parent()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        sender.send(Answer(function(*arguments)))
    except Exception as error:  # kernels and compilers raise anything
        sender.send(Answer(error=" ".join(f"{type(error).__name__}: {error}".split())[:400]))
