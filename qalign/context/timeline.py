"""Which step of a denoising loop a timestep belongs to."""

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Timeline:
    """The timesteps of a denoising loop, and the place that the loop has reached.

    A step is one timestep. Entries that repeat the one before them, as those of Heun and PNDM, are of the
    same step. So are all calls of a model at that timestep, such as the views of a panorama.

    >>> import torch
    >>> from qalign.context.timeline import Timeline
    >>> timeline = Timeline(torch.tensor([751, 501, 501, 251]))
    >>> timeline.move(751), timeline.move(501)
    (True, True)
    >>> timeline.step, timeline.total
    (1, 3)

    Args:
        timesteps: those of the scheduler, in the order of the loop.

    Attributes:
        timesteps: the argument itself.
        step, total: the step, from 0, and the number of steps. After the last step, `step` is `total`.
        restarts: how often the loop went back to an earlier step.
    """

    def __init__(self, timesteps: Tensor | Sequence[Any]) -> None:
        self.timesteps = timesteps
        self._entries = _values(timesteps)
        self._steps = _numbers(self._entries)
        self._start, self._stop = 0, len(self._entries)
        self._place: int | None = None
        self.restarts = 0

    @property
    def step(self) -> int:
        place = self._start if self._place is None else self._place
        return self.total if place >= self._stop else self._steps[place] - self._steps[self._start]

    @property
    def total(self) -> int:
        return self._steps[self._stop - 1] - self._steps[self._start] + 1

    def has(self, timesteps: Tensor | Sequence[Any]) -> bool:
        """Return whether these are the same timesteps, or a copy of them."""
        return timesteps is self.timesteps or _values(timesteps) == self._entries

    def move(self, timestep: Any, executed: int | None = None) -> bool:
        """Move to the step of `timestep`, and return whether there is one.

        Args:
            timestep: a number, or a tensor of one value.
            executed: the number of entries that the loop runs. Image-to-image leaves out the first entries,
                a base model before a refiner the last ones. None is all from the first timestep on.
        """
        places = self._places(timestep)
        if not places:
            return False
        place = self._choose(places, executed)
        if self._place is None:
            self._start = place
            known = executed is not None and place + executed <= len(self._entries)
            self._stop = place + executed if known and executed else len(self._entries)
        elif place < self._place - 1:
            self.restarts += 1
        if not self._start <= place < self._stop:  # `executed` was of an earlier loop
            self._start, self._stop = min(self._start, place), len(self._entries)
        self._place = place
        return True

    def advance(self, timestep: Any, executed: int | None = None) -> bool:
        """Move behind the entry of `timestep`, whose step is done."""
        found = self.move(timestep, executed)
        if found and self._place is not None:
            self._place += 1
        return found

    def _choose(self, places: list[int], executed: int | None) -> int:
        """The entry that is meant, where several have the timestep."""
        if self._place is None:
            tail = len(self._entries) - (executed or 0)
            return tail if tail in places else places[0]
        for near in (self._place, self._place - 1):
            if near in places:
                return near
        return next((place for place in places if place > self._place), places[0])

    def _places(self, timestep: Any) -> list[int]:
        """The entries of a timestep: by its place in memory, which waits for no device, or by its value."""
        if isinstance(timestep, Tensor):
            place = _offset(timestep, self.timesteps)
            if place is not None:
                return [place]
            values = set(timestep.flatten().tolist())
            if len(values) != 1:  # rows at different timesteps are no step of the loop
                return []
            timestep = values.pop()
        return [place for place, entry in enumerate(self._entries) if entry == timestep]


def step_numbers(timesteps: Any, length: int) -> Sequence[int]:
    """Return the step of each of `length` timesteps.

    Equal neighbours in a tensor or sequence of numbers are one step. Others are a step each: they may be
    no numbers, or cannot be read without consuming them.
    """
    if hasattr(timesteps, "__getitem__"):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            values = torch.as_tensor(timesteps)
            if values.ndim == 1:
                return _numbers(values.tolist())
    return range(length)


def _values(timesteps: Any) -> list[Any]:
    return timesteps.tolist() if isinstance(timesteps, Tensor) else list(timesteps)


def _numbers(entries: Sequence[Any]) -> list[int]:
    changes = (after != before for before, after in itertools.pairwise(entries))
    return list(itertools.accumulate(changes, initial=0))


def _offset(timestep: Tensor, timesteps: Any) -> int | None:
    """The index of `timestep` in `timesteps`, if it is a view of one of its entries."""
    if not isinstance(timesteps, Tensor) or timesteps.ndim != 1 or timestep.dtype != timesteps.dtype:
        return None
    storages = [each.untyped_storage() for each in (timestep, timesteps)]
    moves = any(size > 1 and stride for size, stride in zip(timestep.shape, timestep.stride()))
    if moves or not timestep.numel() or storages[0].data_ptr() != storages[1].data_ptr():
        return None
    index, rest = divmod(
        int(timestep.storage_offset() - timesteps.storage_offset()), int(timesteps.stride(0)) or 1
    )
    return index if not rest and 0 <= index < len(timesteps) else None
