"""Call functions in other processes, forked from a server that has imported everything and uses no device."""

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
    "benchmarks.gpu.stages.right",
    "benchmarks.gpu.stages.validation",
    *(f"qalign_kernels._triton.{stem}" for stem in STEMS),
)


class Answer(NamedTuple):
    """The value that the function returned, or the reason why there is none."""

    value: Any = None
    error: str | None = None


def preload() -> None:
    """Set what the server imports; call it before the first `ask`."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))


def ask(function: Callable[..., Any], *arguments: Any, log: Path, seconds: float) -> Answer:
    """Call a function of an importable module in a new process; its output is appended to `log`.

    A call is an error if it raises, ends its process, or still runs after `seconds`.
    """
    worker = Worker()
    try:
        return worker.ask(function, *arguments, log=log, seconds=seconds)
    finally:
        worker.end()


class Worker:
    """A process that answers call after call. After a failed call, a new process takes its place.

    A process on a GPU takes seconds to start, and a failed call can break its device for the calls after it.
    """

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Any = None

    def ask(self, function: Callable[..., Any], *arguments: Any, log: Path, seconds: float) -> Answer:
        """See `forks.ask`."""
        if self._process is None:
            self._start()
        self._connection.send((log, function, arguments))
        answer = self._answer(seconds)
        if answer.error is not None:
            self.end()
        return answer

    def end(self) -> None:
        """Stop the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,))
        self._process.start()
        other.close()

    def _answer(self, seconds: float) -> Answer:
        try:
            if self._connection.poll(max(seconds, 0)):
                return Answer(*self._connection.recv())
            return Answer(error=f"did not finish in {seconds:.0f} s")
        except (EOFError, ConnectionError):
            self._process.join()
            return Answer(error=f"ended its process with exit code {self._process.exitcode}")


def _serve(connection: Connection) -> None:
    processes.end_with_parent()
    while True:
        log, function, arguments = connection.recv()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        try:
            connection.send(Answer(function(*arguments)))
        except Exception as error:  # kernels and compilers raise anything
            connection.send(Answer(error=" ".join(f"{type(error).__name__}: {error}".split())[:400]))
