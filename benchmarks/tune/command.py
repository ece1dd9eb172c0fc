"""Sweep of tiles on this machine: what beats the shipped tile, stays within the error budget and serves every variant replaces its row."""

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from qalign_kernels import _command_line, testing
from qalign_kernels._files import Files
from qalign_kernels._triton import _configs
from qalign_kernels._triton._configs import FILE, Key, Tile
from qalign_kernels.bench import measure

from ..suite import progress
from ..suite.rows import write
from . import candidates, trials
from .trials import TRIALS, Trial

DTYPES = ("bfloat16", "float16")  # float32 has no tensor cores to feed
KEPT_BELOW = 0.98  # of the shipped tile's time
ROUNDS = 20
FLUSHES = 8  # the host queues a call while the GPU empties its cache so often
BLOCKS, TEAMS, STAGES = range(16, 257), (4, 8), range(1, 6)
RING_COLUMNS, RING_BUFFERS = (64, 128, 256), range(2, 9)  # of the kernels in Gluon


Choice = Tile | None  # None leaves a key of a listed kernel to the general kernel


class Subject(Protocol):
    """A key on this machine. A tile that does not compile or fit raises."""

    def right(self, tile: Choice) -> bool:
        """Whether the timed call is within the error budget."""

    def serves(self, tile: Choice) -> bool:
        """Whether all calls that take the tile are, on ragged inputs too."""

    def seconds(self, tile: Choice) -> float:
        """Of one timed call."""


class Change(NamedTuple):
    """`ratio` is the new tile's time over the old one's; 0 where the old one does not run."""

    key: Key
    old: Choice
    new: Choice
    ratio: float

    def __str__(self) -> str:
        gain = f"{self.ratio:.3f} of its time" if self.ratio else "which did not run or was wrong"
        return f"{describe(self.key)}: {_cell(self.new)} instead of {_cell(self.old)}, {gain}"


def describe(key: Key) -> str:
    return f"{key.op} {key.mode} {key.architecture} {key.dtype} d={key.head_dim} tokens<={key.tokens}"


def _cell(tile: Choice) -> str:
    if tile is None:
        return "the general kernel"
    return f"{tile.block_m}x{tile.block_n} warps {tile.num_warps} stages {tile.num_stages}"


@dataclass
class Sweep:
    """Keys in order until `late`; `keep` is told each change as it is found."""

    subject: Callable[[Key], Subject]
    late: Callable[[], bool]
    keep: Callable[[Change], None]
    settle: Callable[[], None]  # raises where a candidate has broken the device
    candidates: Callable[[Key, Choice], list[Choice]]
    itemsize: int = 2
    swept: int = 0
    timed: int = 0
    skipped: int = 0
    wrong: int = 0
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self, keys: list[Key]) -> None:
        for key in keys:
            if self.late():
                return
            progress.show(self.swept + 1, len(keys), describe(key))
            try:
                change = self.improve(key)
            except TimeoutError:
                return
            except torch.OutOfMemoryError:
                self.notes.append(f"{describe(key)}: not swept, the device has too little memory")
                continue
            self.swept += 1
            if change:
                self.changes.append(change)
                self.keep(change)

    def improve(self, key: Key) -> Change | None:
        """The tile that beats the shipped one, in a screening and once more beside it alone; raises TimeoutError when it is late."""
        shipped, subject = shipped_tile(key, self.itemsize), self.subject(key)
        tiles = [
            tile for tile in (shipped, *self.candidates(key, shipped)) if self._passes(subject.right, tile)
        ]
        self.timed += len(tiles)
        first = medians(tiles, subject.seconds, ROUNDS)
        runs = shipped in first
        if not runs:
            self.notes.append(f"{describe(key)}: the shipped tile {_cell(shipped)} does not run or is wrong")
        for tile in sorted((tile for tile in tiles if tile != shipped), key=first.__getitem__):
            if runs and first[tile] > KEPT_BELOW * first[shipped]:
                break
            if not self._passes(subject.serves, tile):
                continue
            if not runs:
                return Change(key, shipped, tile, 0.0)
            again = medians([shipped, tile], subject.seconds, 2 * ROUNDS)
            if again[tile] <= KEPT_BELOW * again[shipped]:
                return Change(key, shipped, tile, again[tile] / again[shipped])
        return None

    def _passes(self, check: Callable[[Choice], bool], tile: Choice) -> bool:
        if self.late():
            raise TimeoutError
        try:
            passed = check(tile)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # compilers raise anything: a tile that does not compile or fit is no candidate
            self.settle()
            self.skipped += 1
            return False
        self.wrong += not passed
        return passed


def shipped_tile(key: Key, itemsize: int) -> Choice:
    """Look up what a launch of this key takes today."""
    if (key.op, key.mode) not in _configs.LISTED_WORK:
        return _configs.look_up(key, itemsize)
    places = itertools.product((key.triton, None), (key.tokens, None))
    found = (_configs.tiles().get(key._replace(triton=triton, tokens=tokens)) for triton, tokens in places)
    return next(filter(None, found), None)


def medians(tiles: list[Any], seconds: Callable[[Any], float], rounds: int) -> dict[Any, float]:
    """Median time of each, taken in turn, there and back, so that drift cancels."""
    times: dict[Any, list[float]] = {tile: [] for tile in tiles}
    for n in range(rounds):
        for tile in tiles if n % 2 == 0 else tiles[::-1]:
            times[tile].append(seconds(tile))
    return {tile: statistics.median(values) for tile, values in times.items()}


def neighbours(key: Key, tile: Tile) -> list[Tile]:
    """One step away in each direction, and the steps that trade one resource for another; what would spill registers is left out."""
    m, n, warps, stages = tile
    steps = [
        Tile(m, 2 * n, warps, stages), Tile(m, n // 2, warps, stages), Tile(m, n, warps, stages + 1), Tile(m, n, warps, stages - 1),
        Tile(m, n, 2 * warps, stages), Tile(m, n, warps // 2, stages), Tile(2 * m, n, warps, stages), Tile(m // 2, n, warps, stages),
        Tile(m, 2 * n, warps, stages - 1), Tile(m, n // 2, warps, stages + 1), Tile(m // 2, n, warps // 2, stages),
        Tile(m // 2, 2 * n, warps, stages), Tile(2 * m, n // 2, warps, stages),
    ]  # fmt: skip
    has_columns = _configs.WORK[key.op, key.mode].keys > 0
    return [
        step for step in dict.fromkeys(steps)
        if step.block_m in BLOCKS and step.block_n in BLOCKS and step.num_warps in TEAMS and step.num_stages in STAGES
        and (has_columns or step.block_n == n) and _configs.accumulators(step, key) <= _configs.MOST_ACCUMULATORS
    ]  # fmt: skip


def ring_neighbours(key: Key, tile: Tile) -> list[Tile]:
    """List the tiles one step away for a kernel whose stages are the buffers of a ring; its rows and warps are fixed."""
    n, stages = tile.block_n, tile.num_stages
    shapes = [(n, stages + 1), (n, stages - 1), (2 * n, stages), (n // 2, stages)]
    shapes += [(2 * n, stages // 2), (n // 2, 2 * stages)]
    steps = [tile._replace(block_n=columns, num_stages=buffers) for columns, buffers in shapes]
    itemsize = getattr(torch, key.dtype).itemsize
    return [
        step
        for step in dict.fromkeys(steps)
        if step != tile
        and step.block_n in RING_COLUMNS
        and step.num_stages in RING_BUFFERS
        and _configs.fits(step, key, itemsize)
    ]


def candidate_tiles(key: Key, tile: Choice) -> list[Choice]:
    """List what is tried beside the shipped tile: the candidates of the key, its neighbours, the general kernel."""
    listed = (key.op, key.mode) in _configs.LISTED_WORK
    near = ring_neighbours if listed else neighbours
    tried: dict[Choice, None] = dict.fromkeys(candidates.tiles(key))
    if tile is not None:
        tried |= dict.fromkeys(near(key, tile))
    if listed:
        tried[None] = None
    tried.pop(tile, None)
    return list(tried)


class GpuSubject:
    """A key's trial on the GPU."""

    def __init__(self, key: Key, trial: Trial) -> None:
        self.key, self.trial, self.inputs = key, trial, trials.make_inputs(key)

    def right(self, tile: Choice) -> bool:
        return self._right(self.trial.timed, self.inputs, tile)

    def serves(self, tile: Choice) -> bool:
        ragged = trials.make_ragged(self.inputs, self.key)
        calls = [
            (self.trial.timed, ragged),
            *((call, x) for call in self.trial.others for x in (self.inputs, ragged)),
        ]
        return all(self._right(call, x, tile) for call, x in calls)

    def seconds(self, tile: Choice) -> float:
        with _configs.trying(self.key, tile):
            for _ in range(FLUSHES):
                measure.before_round()
            start = measure.stamp()
            self.trial.timed.run(self.inputs, "triton")
            return measure.stamp() - start

    def _right(self, call: Any, inputs: trials.Inputs, tile: Choice) -> bool:
        with _configs.trying(self.key, tile):
            with testing.poisoned_memory():
                result = call.run(inputs, "triton")
            again = call.run(inputs, "triton")
            # the check may launch the op again
            return _same(result, again) and call.check(inputs, result, "triton")


def _same(first: Any, second: Any) -> bool:
    pairs = zip(first, second) if isinstance(first, tuple) else [(first, second)]
    return all(torch.equal(a, b) for a, b in pairs)


def replace(rows: list[dict[str, Any]], changes: Iterable[Change]) -> list[dict[str, Any]]:
    """Put a row for each changed key behind the general rows; rows of several keys keep the keys that did not change."""
    for key, _, tile, _ in changes:
        rows = [part for row in rows for part in _without(row, key)]
        if tile is not None:
            rows.append(_row(key, tile))
    general = [row for row in rows if row["triton"] is None]
    special = {_row_key(row): row for row in rows if row["triton"] is not None}
    return general + [special[text] for text in sorted(special)]


def _without(row: dict[str, Any], key: Key) -> list[dict[str, Any]]:
    """Take a key out of a row, which leaves a row for each of its other keys."""
    keys = _configs.row_keys(row)
    if key not in keys:
        return [row]
    return [_row(other, Tile(*row["tile"])) for other in keys if other != key]


def _row(key: Key, tile: Tile) -> dict[str, Any]:
    return {
        "op": key.op,
        "modes": [key.mode],
        "architecture": key.architecture,
        "triton": key.triton,
        "dtypes": [key.dtype],
        "tokens": key.tokens,
        "head_dims": [key.head_dim],
        "tile": list(tile),
    }


def _row_key(row: dict[str, Any]) -> str:
    return json.dumps([value for name, value in row.items() if name != "tile"])


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
    """What is swept, in this order."""
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
    print(
        f"{torch.cuda.get_device_name()}, {target}, Triton {triton}: {len(chosen)} keys, {arguments.minutes:g} minutes",
        flush=True,
    )
    with torch.no_grad():
        return sweep(chosen, arguments.out, arguments.minutes * 60)


def sweep(chosen: list[tuple[Trial, Key]], file: Path, seconds: float) -> int:
    """Sweep, keep what was found in `file` after each change, and print what changed."""
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
        subject=lambda key: GpuSubject(key, trial_of[key]), late=lambda: time.monotonic() - start > seconds, keep=keep,
        settle=torch.cuda.synchronize, candidates=candidate_tiles,
    )  # fmt: skip
    interrupted = True
    with contextlib.suppress(KeyboardInterrupt):
        found.run(list(trial_of))
        interrupted = False
    for note in found.notes:
        print(note)
    print(
        f"{'interrupted: ' if interrupted else ''}{found.swept} of {len(trial_of)} keys swept, {len(changes)} changed; tiles: {found.timed} timed, "
        f"{found.skipped} did not compile or fit, {found.wrong} wrong; wrote {file}"
    )
    return 130 if interrupted else 1 if any("the shipped tile" in note for note in found.notes) else 0
