"""Stage "validate": `qalign_kernels.validate --quick` on the device, op by op in as many processes as there are cores.

Core ops and bfloat16 come first; a second call takes what the first has not ended. The file has what is known so far.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qalign_kernels import _backends, validate
from qalign_kernels.bench import measure

from . import arguments, forks

DTYPES = ("bfloat16", "float16", "float32")
CORE = (
    "qalign_attention rearranged", "similarity_argmax", "attention counts", "attention", "attention contrast", "similarity_argmax packed",
    "similarity_topk", "rearrange_kv", "match_counts",
)  # fmt: skip
GIB_OF_A_JOB = 4  # the float64 truth of one case at 4096 tokens, most of the time less
SECONDS_TO_START = 8.0


class Job(NamedTuple):
    """One op in one dtype."""

    dtype: str
    op: str

    @property
    def name(self) -> str:
        return f"{self.dtype} {self.op}"

    def log(self, folder: Path) -> Path:
        """Name the log, beside which the rows lie."""
        return folder / "logs" / f"validate-{self.name.replace(' ', '_')}.log"


def jobs(core: bool) -> list[Job]:
    """List core ops by dtype, or all the others by dtype."""
    names = [name for name in (CORE if core else validate.OPS) if core or name not in CORE]
    return [Job(dtype, name) for dtype in DTYPES for name in names]


def _memory_gib() -> int:
    return torch.cuda.get_device_properties(0).total_memory >> 30


def rows(job: Job) -> dict[str, Any]:
    """Validate one op in one dtype on the device."""
    device = torch.device("cuda", 0)
    probe = torch.empty(1, dtype=validate.DTYPES[job.dtype], device=device)
    backends = [name for name in ("triton", "tiled") if name == "tiled" or _backends.triton_refusal(probe, ()) is None]
    found = validate.run_op(job.op, backends, job.dtype, device, quick=True)
    return {"rows": [row._asdict() for row in found.rows], "dropped": found.dropped}


def run(job: Job, folder: Path, clock: arguments.Clock) -> forks.Answer:
    """Ask a process for the rows of a job."""
    if clock.left() < SECONDS_TO_START:
        return forks.Answer(error="not started for want of time")
    return forks.ask(rows, job, log=job.log(folder), seconds=clock.left())


def run_all(chosen: list[Job], folder: Path, clock: arguments.Clock) -> Iterator[tuple[Job, forks.Answer]]:
    """Yield each job as it ends."""
    forks.preload()
    workers = min(len(chosen), os.cpu_count() or 1, _memory_gib() // GIB_OF_A_JOB)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting = {pool.submit(run, job, folder, clock): job for job in chosen}
        for future in as_completed(waiting):
            yield waiting[future], future.result()


class Merged:
    """validate.json: one file like that of `validate --json`, and the names of what has not ended, with the reason."""

    def __init__(self, folder: Path, chosen: list[Job], device: str) -> None:
        self._file = folder / "validate.json"
        nothing: dict[str, Any] = {"device": [device], "rows": [], "dropped": [], "unfinished": {}}
        self.content = json.loads(self._file.read_text()) if self._file.is_file() else nothing
        self.content["unfinished"] |= {job.name: "stopped" for job in chosen}

    def add(self, job: Job, answer: forks.Answer) -> None:
        """Take what a job gave."""
        if answer.value:
            self.content["rows"] += answer.value["rows"]
            self.content["dropped"] += answer.value["dropped"]
            del self.content["unfinished"][job.name]
        else:
            self.content["unfinished"][job.name] = answer.error
        arguments.write_json(self._file, self.content)

    def conclude(self) -> int:
        """Print the sums; 1 where a case failed, or a job has not ended."""
        failures = [failure for row in self.content["rows"] for failure in row["failures"]]
        for failure in failures:
            print(f"FAILED {failure}")
        for case in self.content["dropped"]:
            print(f"not run for want of memory: {case}")
        for name, reason in self.content["unfinished"].items():
            print(f"not ended: {name}, {reason}")
        cases, unfinished = sum(row["cases"] for row in self.content["rows"]), len(self.content["unfinished"])
        print(f"{cases} cases, {len(failures)} failed, {unfinished} ops not ended")
        return 1 if failures or unfinished or not self.content["rows"] else 0


def main() -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("--core", action="store_true")
    options = parser.parse_args()
    chosen = jobs(options.core)
    merged = Merged(options.out, chosen, f"{measure.device_name('cuda')}, torch {torch.__version__}")
    for job, answer in run_all(chosen, options.out, arguments.Clock(options.seconds)):
        merged.add(job, answer)
    return merged.conclude()
