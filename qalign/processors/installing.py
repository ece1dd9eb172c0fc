"""What `attach` puts into a model, who holds which layer, and how everything comes out again."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..context.clock import Clock
from ..context.layer_call import ForwardPass, Site
from ..context.layout import BatchLayout
from ..context.regions import Regions
from ..methods import Hook
from .following import CHANGING
from .unet import UNetAttnProcessor

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

_HELD: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the layers with a processor of some `attach`


class AttachedProcessor(UNetAttnProcessor):
    """The processor of an attached layer. A copy of the layer gets a copy of its former processor.

    Attributes:
        original: the processor that the layer had before.
        ran: whether the layer has been called.
    """

    original: Any = None
    ran = False

    def __call__(  # diffusers reads the names of the arguments
        self,
        attn: "Attention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        self.ran = True
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    def __reduce__(self) -> Any:  # `copy.deepcopy` and `pickle` take the former processor
        return _same, (self.original or UNetAttnProcessor(),)


class AttachedHook:
    """A hook of a module. It does nothing in a copy of the module, and nothing inside a compiled graph.

    Args:
        function: the hook.
        compiled: run in compiled graphs too.
    """

    def __init__(self, function: Callable[..., Any] | None, *, compiled: bool = False) -> None:
        self.function, self.compiled = function, compiled
        self.handle: Any = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self.function is None or (not self.compiled and torch.compiler.is_compiling()):
            return None
        return self.function(*arguments, **options)

    def remove(self) -> None:
        """Take the hook out. Without its handle, it stays and does nothing."""
        self.function = None
        if self.handle is not None:
            self.handle.remove()

    def __reduce__(self) -> Any:
        return type(self), (None,)


class ModuleHook:
    """A method's function on the output of the module `layer`, in the steps in which the method edits."""

    def __init__(
        self, function: Hook, layout: BatchLayout, layer: str, clock: Clock, regions: Regions | None
    ) -> None:
        self.function, self.layout, self.layer = function, layout, layer
        self.clock, self.regions = clock, regions
        self.forward: ForwardPass | None = None
        self.ran = False

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        self.ran = True
        site = Site(self.layout, None, None, self.clock, self, self.regions)
        if site.idle or "output" not in self.layout.roles:
            return output
        return self.function(module, inputs[0], output, site)


def _same(each: Any) -> Any:
    return each


def require_free(layers: Mapping[str, Any]) -> None:
    """Check that no layer has a processor of this library.

    Raises:
        RuntimeError: some have one.
    """
    carried = [
        name
        for name, attn in layers.items()
        if attn in _HELD or isinstance(attn.processor, UNetAttnProcessor)
    ]
    if carried:
        advice = "attached twice? two methods need layers of their own"
        got = f"{len(carried)} with one, {carried[0]} the first ({advice})"
        raise RuntimeError(f"layers: expected {len(layers)} without a processor of this library, got {got}")


def hold(attn: Any, processor: AttachedProcessor) -> None:
    """Put `processor` into a layer and keep the layer from others, until `release`."""
    with CHANGING:
        processor.original = attn.processor
        _HELD.add(attn)
        attn.set_processor(processor)


def release(attn: Any, processor: AttachedProcessor) -> None:
    """Give a layer its former processor back. A layer that was not held stays as it is."""
    with CHANGING:
        if processor.original is None:
            return
        if attn.processor is not processor.original:
            attn.set_processor(processor.original)
        processor.method = None  # unfuse_qkv_projections may put it back: as stock attention
        _HELD.discard(attn)


class Undoing:
    """What undoes each installed part, the last part first."""

    def __init__(self) -> None:
        self._parts: list[Callable[[], Any]] = []

    def add(self, part: Callable[..., Any], *arguments: Any) -> None:
        """Add a function. It may be called before its part is done, and twice."""
        self._parts.append(functools.partial(part, *arguments))

    def undo(self) -> None:
        """Undo every part, whatever another one raises. What an exception cut short is undone once more.

        A part leaves the list after it is undone, so a second call goes on where the first one ended.
        """
        first: BaseException | None = None
        while self._parts:
            try:
                self._parts[-1]()
            except BaseException as error:
                first = first or error
                with contextlib.suppress(Exception):
                    self._parts[-1]()
            self._parts.pop()
        if first is not None:
            raise first
