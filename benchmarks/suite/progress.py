"""Progress on stderr: one line that is overwritten on a terminal, a line every few seconds elsewhere."""

import sys
import time

SECONDS_BETWEEN_LINES = 5.0
_last = float("-inf")


def show(done: int, total: int, text: str) -> None:
    global _last
    line = f"[{done}/{total}] {text}"
    if sys.stderr.isatty():
        print(f"\r{line:<110.110}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == total or time.monotonic() - _last >= SECONDS_BETWEEN_LINES:
        _last = time.monotonic()
        print(line, file=sys.stderr, flush=True)
