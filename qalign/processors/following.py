"""Follow the loop of a pipeline: at its scheduler's functions, and at the calls of its UNet."""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

from ..context.timeline import Timeline

CHANGING = threading.RLock()  # held while something is installed or removed

# a value refers to its scheduler only while a `with` block is open
_FOLLOWERS: weakref.WeakKeyDictionary[Any, tuple["LoopFollower", ...]] = weakref.WeakKeyDictionary()


class LoopFollower:
    """Follow the steps of a pipeline's loop, whatever scheduler it has at the time.

    Args:
        pipe: the pipeline.
        begin: called when a loop begins.
        move: called with (step, total) when the loop may have moved, and with executed=False before its first
            timestep is known.
    """

    def __init__(self, pipe: Any, begin: Callable[[], None], move: Callable[..., None]) -> None:
        self.pipe, self._begin, self._move = pipe, begin, move
        self._timeline: Timeline | None = None
        self.resting = False

    def set_timesteps(self, *arguments: Any, **options: Any) -> None:
        """The scheduler has got timesteps."""
        if not self.resting:
            self._rewind()

    def scale_model_input(self, *arguments: Any, **options: Any) -> None:
        """The scheduler has scaled the input of the UNet at a timestep."""
        self._go(Timeline.move, _timestep(arguments, options))

    def step(self, *arguments: Any, **options: Any) -> None:
        """The scheduler has done a timestep."""
        self._go(Timeline.advance, _timestep(arguments, options))

    def call(self, *arguments: Any, **options: Any) -> None:
        """The UNet is about to be called at a timestep."""
        self._go(Timeline.move, _timestep(arguments, options))

    def _go(self, move: Callable[..., bool], timestep: Any) -> None:
        timeline = None if self.resting or timestep is None else self._present()
        if timeline is None:
            return
        restarts = timeline.restarts
        if move(timeline, timestep, getattr(self.pipe, "num_timesteps", None)):
            if timeline.restarts > restarts:
                self._begin()
            self._move(timeline.step, timeline.total)

    def _present(self) -> Timeline | None:
        """The timeline of the scheduler's present timesteps, or None if nothing has set any."""
        scheduler = getattr(self.pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None:
            return None
        if self._timeline is None or not self._timeline.has(timesteps):
            if getattr(scheduler, "num_inference_steps", 0) is None:
                return None
            self._rewind()
        return self._timeline

    def _rewind(self) -> None:
        self._timeline = Timeline(self.pipe.scheduler.timesteps)
        self._begin()
        self._move(self._timeline.step, self._timeline.total, executed=False)


def follow(scheduler: Any, follower: LoopFollower) -> None:
    """Tell `follower` of the scheduler's calls, until `unfollow`.

    The instance gets a subclass of its class for this time, and no attribute. So its copies, and schedulers
    made from its config, tell nothing and are of the class itself.
    """
    with CHANGING, contextlib.suppress(TypeError):  # of a class that cannot change: the UNet's calls tell
        _FOLLOWERS[scheduler] = (*_FOLLOWERS.get(scheduler, ()), follower)
        kind: Any = type(scheduler)
        if not hasattr(kind, "stock_class"):
            scheduler.__class__ = _telling(kind)


def unfollow(scheduler: Any, follower: LoopFollower) -> None:
    """Tell `follower` nothing more. Without any follower the scheduler has its own class again."""
    with CHANGING, contextlib.suppress(TypeError):
        left = tuple(each for each in _FOLLOWERS.get(scheduler, ()) if each is not follower)
        if left:
            _FOLLOWERS[scheduler] = left
            return
        scheduler.__class__ = getattr(type(scheduler), "stock_class", type(scheduler))
        _FOLLOWERS.pop(scheduler, None)


@functools.cache
def _telling(stock: Any) -> type:
    """A subclass of a scheduler's class that tells the followers of an instance of its calls."""
    members: dict[str, Any] = {
        name: _then_tell(getattr(stock, name), name)
        for name in ("set_timesteps", "scale_model_input", "step")
        if hasattr(stock, name)
    }
    if hasattr(stock, "from_config"):
        members["from_config"] = stock.from_config  # bound to the stock class
    names = ("__module__", "__qualname__", "__doc__")
    members |= {name: getattr(stock, name) for name in names}
    members |= {"stock_class": stock, "__reduce_ex__": _reduce_as_stock}
    return type(stock.__name__, (stock,), members)


def _then_tell(function: Callable, name: str) -> Callable:
    @functools.wraps(function)
    def telling(self: Any, *arguments: Any, **options: Any) -> Any:
        result = function(self, *arguments, **options)
        for follower in _FOLLOWERS.get(self, ()):
            if follower.pipe.scheduler is self:  # and was not replaced
                getattr(follower, name)(*arguments, **options)
        return result

    return telling


def _reduce_as_stock(self: Any, protocol: int) -> Any:
    """What `copy` and `pickle` make another of: an instance of the stock class."""
    stock = type(self).stock_class
    _, _, *state = stock.__reduce_ex__(self, max(protocol, 2))
    return object.__new__, (stock,), *state


def _timestep(arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The second argument of a scheduler's function, and of a UNet."""
    return arguments[1] if len(arguments) > 1 else options.get("timestep")
