"""Child processes with a time limit: their output goes to a log, and their process group ends with them."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[3]
SECONDS_TO_END = 2.0


PARENT = "QALIGN_GPU_PARENT"  # the variable with the process id of the parent
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_parent(parent: int | None = None) -> None:
    """Let the system stop this process when its parent ends, for any reason.

    Args:
        parent: the process id of the parent; a parent that has already ended ends this process at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def environment() -> dict[str, str]:
    """Copy the environment, with the checkout on the path and one compiler thread for FlexAttention."""
    return {
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        **os.environ,
        PARENT: str(os.getpid()),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }


def run(command: Sequence[str], log: Path, seconds: float, **variables: str) -> int | None:
    """Run a command in the process group of its parent.

    Returns:
        The exit code, or None where the command was stopped after `seconds`.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment() | variables
        )
        try:
            return process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None


def run_group(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """As `run`, in a process group of its own; no process of the group is left when this returns."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )
        try:
            return process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            _signal_group(process.pid, signal.SIGTERM)
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                pass
            return None
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
