"""Stage 4: compute-sanitizer's memcheck and racecheck over one small call of every op, where that program is installed."""

import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import arguments, processes

TOOLS = ("memcheck", "racecheck")
ERROR_CODE = 99


def program() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [f"{home}/{place}" for home in homes if home for place in ("bin", "compute-sanitizer", "extras/compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def check(sanitizer: str, tool: str, folder: Path, seconds: float) -> dict[str, Any]:
    """One tool's verdict: its own summary line and the exit code."""
    log, start = folder / "logs" / f"{tool}.log", time.monotonic()
    command = (sanitizer, "--tool", tool, "--error-exitcode", str(ERROR_CODE), sys.executable, "-m", "benchmarks.gpu.small_calls")
    code = processes.run(command, log, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    text = log.read_text(errors="replace")
    done = re.findall(r"^called (.+)$", text, re.MULTILINE)
    if code is None:
        verdict = f"not ended after {seconds:.0f} s, no finding in {len(done)} calls" if "=========     at " not in text else "findings, not ended"
    else:
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.+)", text)
        verdict = summary[-1] if summary else processes.last_line(log)
    return {"tool": tool, "code": code, "verdict": verdict, "calls": len(done), "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    options = arguments.parser(__doc__).parse_args()
    sanitizer = program()
    if sanitizer is None:
        arguments.write(options.out, "sanitizer", note="compute-sanitizer is not installed", rows=[])
        print("compute-sanitizer is not installed")
        return 0
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        rows = list(pool.map(lambda tool: check(sanitizer, tool, options.out, options.seconds - 1), TOOLS))
    arguments.write(options.out, "sanitizer", note=sanitizer, rows=rows)
    for row in rows:
        print(f"{row['tool']}: {row['verdict']}")
    return 0 if all(row["code"] in (0, None) and "findings" not in row["verdict"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
