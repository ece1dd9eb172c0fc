"""Stage "validate": `qalign_kernels.validate --quick` on the device, in one process per core.

A process has one op in one dtype. Core ops come first, then bfloat16. The file is written after each result.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qalign_kernels import _backends
from qalign_kernels.bench import measure
from qalign_kernels.validation import command as validate

from ...suite.rows import write
from ..running import arguments, forks

DTYPES = ("bfloat16", "float16", "float32")
CORE = (
    "qalign_attention rearranged",
    "similarity_argmax",
    "attention counts",
    "attention",
    "attention contrast",
    "similarity_argmax packed",
    "similarity_topk",
    "rearrange_kv",
    "match_counts",
)
SECONDS_TO_START = 8.0


class Job(NamedTuple):
    """One op in one dtype."""

    dtype: str
    op: str

    @property
    def name(self) -> str:
        return f"{self.dtype} {self.op}"

    def log(self, folder: Path) -> Path:
        """Name the log; the rows are beside it."""
        return folder / "logs" / f"validate-{self.name.replace(' ', '_')}.log"


def jobs(core: bool) -> list[Job]:
    """List core ops by dtype, or all the others by dtype."""
    names = [name for name in (CORE if core else validate.OPS) if core or name not in CORE]
    return [Job(dtype, name) for dtype in DTYPES for name in names]


def rows(job: Job) -> dict[str, Any]:
    """Validate one op in one dtype on the device."""
    device = torch.device("cuda", 0)
    probe = torch.empty(1, dtype=validate.DTYPES[job.dtype], device=device)
    backends = [
        name for name in ("triton", "tiled") if name == "tiled" or _backends.triton_refusal(probe, ()) is None
    ]
    found = validate.run_op(job.op, backends, job.dtype, device, quick=True)
    return {"rows": [row._asdict() for row in found.rows], "dropped": found.dropped}


def run(job: Job, folder: Path, clock: arguments.Clock) -> forks.Answer:
    """Run a job in a process and give its rows."""
    if clock.left() < SECONDS_TO_START:
        return forks.Answer(error="not started, no time left")
    return forks.ask(rows, job, log=job.log(folder), seconds=clock.left())


def run_all(
    chosen: list[Job], folder: Path, clock: arguments.Clock, workers: int
) -> Iterator[tuple[Job, forks.Answer]]:
    """Yield each job as it ends."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(run, job, folder, clock): job for job in chosen}
        for future in as_completed(waiting):
            yield waiting[future], future.result()


class Merged:
    """The file validate.json, like that of `validate --json`, with a reason for each unfinished job."""

    def __init__(self, folder: Path, chosen: list[Job], device: str) -> None:
        self._file = folder / "validate.json"
        nothing: dict[str, Any] = {"device": [device], "rows": [], "dropped": [], "unfinished": {}}
        self._before = json.loads(self._file.read_text()) if self._file.is_file() else nothing
        self._answers = {job: forks.Answer(error="stopped") for job in chosen}

    @property
    def content(self) -> dict[str, Any]:
        """Join the rows of earlier stages with the last answer of every job."""
        found = [self._before, *(answer.value for answer in self._answers.values() if answer.value)]
        missing = {job.name: answer.error for job, answer in self._answers.items() if not answer.value}
        joined = {name: [item for part in found for item in part[name]] for name in ("rows", "dropped")}
        return {
            "device": self._before["device"],
            **joined,
            "unfinished": self._before["unfinished"] | missing,
        }

    def add(self, job: Job, answer: forks.Answer) -> None:
        """Replace the answer of a job."""
        self._answers[job] = answer
        write(self._file, self.content)

    def without_memory(self) -> list[Job]:
        """List the jobs that dropped a case for lack of memory."""
        return [job for job, answer in self._answers.items() if answer.value and answer.value["dropped"]]

    def conclude(self) -> int:
        """Print the sums, and give 1 where a case failed or a job is unfinished."""
        content = self.content
        failures = [failure for row in content["rows"] for failure in row["failures"]]
        lines = [f"FAILED {failure}" for failure in failures]
        lines += [f"not run for lack of memory: {case}" for case in content["dropped"]]
        lines += [f"unfinished: {name}, {reason}" for name, reason in content["unfinished"].items()]
        cases = sum(row["cases"] for row in content["rows"])
        print(*lines, sep="\n")
        print(f"{cases} cases, {len(failures)} failed, {len(content['unfinished'])} ops unfinished")
        return 1 if failures or content["unfinished"] or not content["rows"] else 0


def main() -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("--core", action="store_true")
    options = parser.parse_args()
    clock = arguments.Clock(options.seconds)
    chosen = jobs(options.core)
    merged = Merged(options.out, chosen, f"{measure.device_name('cuda')}, torch {torch.__version__}")
    forks.preload()
    for job, answer in run_all(chosen, options.out, clock, os.cpu_count() or 1):
        merged.add(job, answer)
    for job, answer in run_all(
        merged.without_memory(), options.out, clock, workers=1
    ):  # one at a time, with all of the memory
        if answer.value:
            merged.add(job, answer)
    return merged.conclude()
