"""Run the workers that measure, one after the other.

If a worker dies or hangs, the next one leaves out the visit that caused it.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..must_show import OURS
from ..running import arguments, processes
from ..running.journal import Journal

WORKERS = 6
STALL_SECONDS = 60.0
SECONDS_TO_END = 4.0
WORKER_OF = {
    "core": "worker",
    "kernels": "details",
    "tiles": "details",
    "must_show": "worker",
    "speed": "worker",
}


def supervise(
    command: Sequence[str], journal: Journal, clock: arguments.Clock, stall_seconds: float = STALL_SECONDS
) -> int:
    """Start workers until one finishes or time is up. `command` gets `--seconds S`.

    Returns:
        0 where a worker finished or measured until its time was up, else 1.
    """
    for number in range(WORKERS):
        with journal.path.with_name(f"{journal.path.stem}-{number}.log").open("w") as output:
            seconds = max(0.0, clock.left() - SECONDS_TO_END)
            process = subprocess.Popen(
                (*command, "--seconds", f"{seconds:.1f}"),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=processes.environment(),
            )
            code = _wait(process, journal, clock, stall_seconds)
        if code == 0:
            return 0
        if clock.left() < 0:
            journal.add("note", f"stopped at the end of its time in {journal.left_open() or 'no visit'}")
            return 0
        _leave_out(journal, code)
    journal.add("failure", f"{WORKERS} workers ended early, the last with exit code {code}")
    return 1


def _wait(
    process: subprocess.Popen, journal: Journal, clock: arguments.Clock, stall_seconds: float
) -> int | None:
    """Give the exit code, or None where the worker wrote nothing for too long or time was up."""
    started = time.time()
    while True:
        try:
            return process.wait(0.2)
        except subprocess.TimeoutExpired:
            idle = time.time() - max(started, journal.changed_at())
            if idle > stall_seconds or clock.left() < 0:
                process.kill()
                process.wait()
                return None


def _leave_out(journal: Journal, code: int | None) -> None:
    """Skip the worker's last visit from now on; it is a failure where the provider is ours."""
    how = "did not finish" if code is None else f"ended the process with exit code {code}"
    place = journal.left_open()
    if place is None:
        journal.add(
            "failure", f"a worker {how} outside of any visit: {processes.last_line(_newest_log(journal))}"
        )
        return
    of_peer = not place.startswith("[") and f" {OURS} [" not in place
    journal.add("note" if of_peer else "failure", f"{place}: {how}")
    journal.add("skip", place)
    journal.add("end", place)


def _newest_log(journal: Journal) -> Path:
    return max(journal.path.parent.glob(f"{journal.path.stem}-*.log"), key=lambda log: log.stat().st_mtime)


def compile_all(folder: Path, clock: arguments.Clock) -> None:
    """Compile everything on all cores, before anything is timed."""
    from ..plan import compile_parts

    def part(number: int) -> None:
        command = (
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "worker",
            "--out",
            str(folder),
            "--compile-part",
            str(number),
        )
        left = clock.left()
        if left > 0:
            processes.run(
                (*command, "--seconds", f"{left - 2:.1f}"), folder / "logs" / f"compile-{number}.log", left
            )

    count = len(compile_parts())
    with ThreadPoolExecutor(max(1, min(count, os.cpu_count() or 1))) as pool:
        list(pool.map(part, range(count)))


def main() -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--plan", choices=WORKER_OF, default="speed")
    options = parser.parse_args()
    clock = arguments.Clock(options.seconds)
    logs = options.out / "logs"
    if options.compile:
        compile_all(options.out, clock)
        return 0
    plan = options.plan
    journal_file = logs / f"{plan}.journal"
    for old in (journal_file, options.out / f"{plan}.json"):
        old.unlink(missing_ok=True)
    journal = Journal(journal_file)
    command = (sys.executable, "-m", "benchmarks.gpu", WORKER_OF[plan], "--out", str(options.out))
    code = supervise((*command, "--plan", plan), journal, clock)
    failures = journal.texts("failure")
    for failure in failures:
        print(failure)
    if not (options.out / f"{plan}.json").is_file():
        print("no figure")
        return 1
    return 1 if failures else code
