"""The sweep of tiles.

A tile replaces the shipped one if it is right, serves every call, and is faster in two comparisons.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from qalign_kernels import testing
from qalign_kernels._triton import _configs
from qalign_kernels._triton._configs import Key
from qalign_kernels.bench import measure

from ..suite import progress
from . import trials
from .table import Change, Choice, cell, describe, shipped_tile
from .trials import Trial

KEPT_BELOW = 0.98  # a new tile takes at most this part of the shipped tile's time

ROUNDS = 20

FLUSHES = 8  # the GPU empties its cache so often while the host queues the call


class Subject(Protocol):
    """A key on this machine. Its methods raise for a tile that does not compile or fit."""

    def right(self, tile: Choice) -> bool:
        """Whether the timed call is within the error budget."""

    def serves(self, tile: Choice) -> bool:
        """Whether all calls that use the tile are within their budgets, on ragged inputs too."""

    def seconds(self, tile: Choice) -> float:
        """Time one call."""


@dataclass
class Sweep:
    """A sweep over keys, in their order, until `late` is true.

    Attributes:
        keep: called with each change.
        settle: raises where a candidate has broken the device.
        candidates: gives the tiles to try for a key and its shipped tile.
    """

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
        """Find a tile that beats the shipped one, in a screening and then alone beside it.

        Raises:
            TimeoutError: it is late.
        """
        shipped, subject = shipped_tile(key, self.itemsize), self.subject(key)
        tiles = [
            tile for tile in (shipped, *self.candidates(key, shipped)) if self._passes(subject.right, tile)
        ]
        self.timed += len(tiles)
        first = medians(tiles, subject.seconds, ROUNDS)
        runs = shipped in first
        if not runs:
            self.notes.append(f"{describe(key)}: the shipped tile {cell(shipped)} does not run or is wrong")
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
        except Exception:  # compilers raise anything; such a tile is no candidate
            self.settle()
            self.skipped += 1
            return False
        self.wrong += not passed
        return passed


def medians(tiles: list[Any], seconds: Callable[[Any], float], rounds: int) -> dict[Any, float]:
    """Take the median time of each tile; tiles take turns, in reverse every second round."""
    times: dict[Any, list[float]] = {tile: [] for tile in tiles}
    for n in range(rounds):
        for tile in tiles if n % 2 == 0 else tiles[::-1]:
            times[tile].append(seconds(tile))
    return {tile: statistics.median(values) for tile, values in times.items()}


class GpuSubject:
    """The trial of a key on the GPU."""

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
