"""Stage "sanitizer": memcheck and racecheck of compute-sanitizer, over one small call of every op."""

import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..running import arguments, processes

TOOLS = ("memcheck", "racecheck")
PARTS = 4  # parallel parts of the ops; most of the time is process start and compilation
ERROR_CODE = 99
FINDING = "=========     at "


def program() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [
        f"{home}/{place}"
        for home in homes
        if home
        for place in ("bin", "compute-sanitizer", "extras/compute-sanitizer")
    ]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(places)
    )


def check(sanitizer: str, tool: str, part: int, folder: Path, seconds: float) -> dict[str, Any]:
    """Run one tool on a part of the ops, and give its summary line and whether it passed."""
    log, start = folder / "logs" / f"{tool}-{part}.log", time.monotonic()
    calls = (sys.executable, "-m", "benchmarks.gpu.stages.small_calls", str(part), str(PARTS))
    code = processes.run(
        (sanitizer, "--tool", tool, "--error-exitcode", str(ERROR_CODE), *calls),
        log,
        seconds,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    text = log.read_text(errors="replace")
    called = re.findall(r"^called (.+)$", text, re.MULTILINE)
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.+)", text)
    if code is None:
        findings = "with findings" if FINDING in text else "nothing found so far"
        verdict = f"still running after {seconds:.0f} s, {findings}"
    else:
        verdict = summary[-1] if summary else processes.last_line(log)
    passed = code == 0 or code is None and FINDING not in text
    return {
        "tool": tool,
        "part": part,
        "passed": passed,
        "verdict": verdict,
        "calls": called,
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> int:
    options = arguments.parser(__doc__).parse_args()
    clock = arguments.Clock(options.seconds)
    sanitizer = program()
    if sanitizer is None:
        arguments.write(options.out, "sanitizer", note="compute-sanitizer is not installed", rows=[])
        print("compute-sanitizer is not installed")
        return 0
    jobs = [(tool, part) for tool in TOOLS for part in range(PARTS)]
    with ThreadPoolExecutor(min(len(jobs), max(2, os.cpu_count() or 2))) as pool:
        rows = list(
            pool.map(lambda job: check(sanitizer, job[0], job[1], options.out, clock.left() - 1), jobs)
        )
    arguments.write(options.out, "sanitizer", note=sanitizer, rows=rows)
    for row in rows:
        print(f"{row['tool']} {row['part']}: {row['verdict']}")
    return 0 if all(row["passed"] for row in rows) else 1
