"""Stage 3: `qalign_kernels.validate --quick` on the device, its parts side by side, since most of its time is compilation."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import arguments, processes

DTYPES = ("bfloat16", "float16", "float32")
PARTS = (
    ("attention",), ("qalign_attention",), ("similarity",), ("match_counts", "rearrange_kv", "label_mass", "mean_attention_map", "distillation_loss"),
)  # fmt: skip
GIB_OF_A_PART = 16  # the float64 truth at 4096 tokens


def _memory_gib() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory >> 30


def main() -> int:
    options = arguments.parser(__doc__).parse_args()
    clock = arguments.Clock(options.seconds)
    jobs: list[tuple[str, tuple[str, ...]]] = [(dtype, part) for part in PARTS for dtype in DTYPES]

    def run(job: tuple[str, tuple[str, ...]]) -> tuple[int | None, dict[str, Any] | None]:
        dtype, part = job
        stem = options.out / "logs" / f"validate-{dtype}-{part[0]}"
        result = Path(f"{stem}.json")
        result.unlink(missing_ok=True)
        command = (sys.executable, "-m", "qalign_kernels.validate", "--quick", "--device", "cuda", "--dtype", dtype, "--op", *part)
        code = processes.run((*command, "--json", str(result)), Path(f"{stem}.log"), clock.left())
        return code, _content(result)

    with ThreadPoolExecutor(max(1, min(len(jobs), os.cpu_count() or 1, _memory_gib() // GIB_OF_A_PART))) as pool:
        results = list(pool.map(run, jobs))
    return conclude(options.out, jobs, results)


def _content(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):  # stopped before the first row, or within one
        return None


def conclude(folder: Path, jobs: list[tuple[str, tuple[str, ...]]], results: list[tuple[int | None, dict[str, Any] | None]]) -> int:
    """One file like that of `validate --json` out of those of the parts; 1 where a part failed, or has not ended."""
    found = [content for _, content in results if content]
    rows = [row for content in found for row in content["rows"]]
    unfinished = [f"{dtype} {part[0]}" for (dtype, part), (code, _) in zip(jobs, results) if code not in (0, 1)]
    failed = [failure for row in rows for failure in row["failures"]]
    merged = {"device": found[0]["device"] if found else [], "rows": rows, "unfinished": unfinished}
    (folder / "validate.json").write_text(json.dumps(merged, indent=1) + "\n")
    for failure in failed:
        print(f"FAILED {failure}")
    text = f"{sum(row['cases'] for row in rows)} cases, {len(failed)} failed"
    print(f"{text}; not ended: {', '.join(unfinished)}" if unfinished else text)
    return 1 if failed or unfinished or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
