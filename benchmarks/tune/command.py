"""The command `tune`: sweep tiles on this machine, and write what beats the shipped tiles."""

import argparse
import contextlib
import json
import time
from pathlib import Path

import torch

from qalign_kernels import _command_line
from qalign_kernels._files import Files
from qalign_kernels._triton import _configs
from qalign_kernels._triton._configs import FILE, Key
from qalign_kernels.bench import measure

from ..suite.rows import write
from . import trials
from .candidates import candidate_tiles
from .sweep import GpuSubject, Sweep
from .table import Change, replace
from .trials import TRIALS, Trial

DTYPES = ("bfloat16", "float16")  # float32 does not use tensor cores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op",
        nargs="+",
        metavar="NAME",
        help=f"parts of names of {', '.join(trial.name for trial in TRIALS)}; default: all",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=FILE,
        metavar="FILE",
        help="write the table there (default: the one that the library reads)",
    )
    minutes = "stop after this time (default 10; all of it takes hours)"
    parser.add_argument("--minutes", type=_command_line.positive, default=10.0, metavar="M", help=minutes)


def choose_keys(words: list[str] | None, architecture: str, triton: str) -> list[tuple[Trial, Key]]:
    """List the keys in the order of the sweep."""
    chosen = [
        (trial, Key(trial.op, trial.mode, architecture, triton, dtype, tokens, head_dim))
        for trial in TRIALS
        if not words or any(word in trial.name for word in words)
        for dtype in DTYPES
        for tokens in _configs.TOKEN_BUCKETS
        for head_dim in trials.HEADS
        if trial.serves(architecture, head_dim)
    ]
    if not chosen:
        raise ValueError(
            f"--op: expected part of {', '.join(trial.name for trial in TRIALS)}, got {' '.join(words or ())}"
        )
    return sorted(chosen, key=lambda pair: trials.order(*pair))


def files(arguments: argparse.Namespace) -> Files:
    return Files(writes=[("--out", arguments.out)])


def run(arguments: argparse.Namespace) -> int:
    choose_keys(arguments.op, "", "")
    if not torch.cuda.is_available():
        raise RuntimeError("expected a GPU, because tiles are chosen by their time, got none")
    from qalign_kernels import _backends
    from qalign_kernels._triton._launch import target_of

    if refusal := _backends.triton_refusal(torch.empty(1, device="cuda"), ()):
        raise RuntimeError(f"expected Triton on the GPU, got none: {refusal}")
    if _backends.interpreted():
        raise ValueError(
            "TRITON_INTERPRET: expected unset, because interpreted kernels cannot be timed, got it set"
        )
    target, triton = target_of(torch.device("cuda", torch.cuda.current_device())), _configs.triton_minor()
    measure.use_cuda()
    chosen = choose_keys(arguments.op, target, triton)
    device, scope = torch.cuda.get_device_name(), f"{len(chosen)} keys, {arguments.minutes:g} minutes"
    print(f"{device}, {target}, Triton {triton}: {scope}", flush=True)
    with torch.no_grad():
        return sweep(chosen, arguments.out, arguments.minutes * 60)


def sweep(chosen: list[tuple[Trial, Key]], file: Path, seconds: float) -> int:
    """Sweep, write the table after each change, and print the changes."""
    rows = json.loads(FILE.read_text(encoding="utf-8"))
    write(file, rows)
    changes: list[Change] = []

    def keep(change: Change) -> None:
        changes.append(change)
        _configs.put(change.key, change.new)
        write(file, replace(rows, changes))
        print(change, flush=True)

    trial_of = {key: trial for trial, key in chosen}
    start = time.monotonic()
    found = Sweep(
        subject=lambda key: GpuSubject(key, trial_of[key]),
        late=lambda: time.monotonic() - start > seconds,
        keep=keep,
        settle=torch.cuda.synchronize,
        candidates=candidate_tiles,
    )
    interrupted = True
    with contextlib.suppress(KeyboardInterrupt):
        found.run(list(trial_of))
        interrupted = False
    for note in found.notes:
        print(note)
    sums = f"{found.swept} of {len(trial_of)} keys swept, {len(changes)} changed"
    tiles = f"{found.timed} timed, {found.skipped} did not compile or fit, {found.wrong} wrong"
    print(f"{'interrupted: ' if interrupted else ''}{sums}; tiles: {tiles}; wrote {file}")
    return 130 if interrupted else 1 if any("the shipped tile" in note for note in found.notes) else 0
