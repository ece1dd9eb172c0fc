"""What attention distillation asks of a UNet: the self-attention features of latents, with their gradient, and the losses' descent."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..context.layer_call import Site
from ..context.layout import BatchLayout
from ..context.regions import Regions
from ..methods import Method
from ..methods.attention_distillation import AttentionDistillation, LayerFeatures, Losses
from ..processors.attach import attach, find_unet, select_layers
from .inversion import require_finite

SCALE = 2.0**16  # a mean over 2^20 outputs has gradients of 2^-20 each, float16 ends at 2^-24


class _AllRead(Exception):
    """Every layer that was wanted has been read: the rest of the UNet is not needed."""


class AttentionReader:
    """Queries, keys, values and outputs of self-attention, in one pass of the UNet that ends at the last layer that is wanted.

    >>> with AttentionReader(pipe) as read:
    ...     features = read(latents, timestep, condition)

    Between readings the UNet is stock, or as `method` has it. Each layer is kept once for each reading: a block that gradient checkpointing runs
    again in the backward pass, which belongs into the `with` block, changes nothing.

    Args:
        pipe: with `predict(latents, timestep, condition)`, as the pipelines have it.
        layers: as `attach`; None is the last six of the decoder, or the default of `method`.
        method: what acts meanwhile, in its default layers and in those that are read, such as `BoundedAttention()`; the rows are those of one
            output, one or its two guidance parts. None is stock attention.
        regions: of `method`.
        cross: also the cross-attention of the same transformer blocks, whose names end in attn2.
    """

    def __init__(
        self,
        pipe: Any,
        layers: str | Sequence[str] | None = None,
        *,
        method: Method | None = None,
        regions: Regions | None = None,
        cross: bool = False,
    ) -> None:
        self._pipe, self._method = pipe, method
        self._found: dict[str, LayerFeatures] = {}
        self._reading = self._ending = False
        unet = find_unet(pipe)
        chooser: Any = method or AttentionDistillation()  # of the default layers
        chosen = list(select_layers(unet, layers, chooser))
        self.layers = chosen + [name.removesuffix("attn1") + "attn2" for name in chosen if cross]
        edited = chosen if method is None else [*chosen, *select_layers(unet, None, method)]
        self._control = attach(unet, self, layout=BatchLayout("output"), layers=edited, regions=regions)

    def __enter__(self) -> Self:
        self._control.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._control.__exit__(kind, error, trace)

    def __call__(
        self, latents: Tensor, timestep: Tensor, condition: dict[str, Any]
    ) -> dict[str, LayerFeatures]:
        """By layer, of latents [B, C, h, w] at one timestep."""
        return self._read(latents, timestep, condition, ending=True)[1]

    def predict(
        self, latents: Tensor, timestep: Tensor, condition: dict[str, Any]
    ) -> tuple[Tensor, dict[str, LayerFeatures]]:
        """What `pipe.predict` returns, of a pass to the end, and what was read in it."""
        return self._read(latents, timestep, condition, ending=False)

    def _read(
        self, latents: Tensor, timestep: Tensor, condition: dict[str, Any], *, ending: bool
    ) -> tuple[Any, dict[str, LayerFeatures]]:
        output, self._found, self._reading, self._ending = None, {}, True, ending
        try:
            with contextlib.suppress(_AllRead):
                output = self._pipe.predict(latents, timestep, condition)
            return output, self._found
        finally:
            self._found, self._reading = {}, False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The method's attention, or stock attention, and a note of it."""
        return self._note(
            q, k, v, site, site.plain(q, k, v) if self._method is None else self._method.attend(q, k, v, site)
        )

    def attend_cross(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Likewise of cross-attention."""
        edited = getattr(self._method, "attend_cross", None)
        return self._note(q, k, v, site, edited(q, k, v, site) if edited else site.plain(q, k, v))

    def _note(self, q: Tensor, k: Tensor, v: Tensor, site: Site, output: Tensor) -> Tensor:
        if self._reading and site.layer in self.layers and site.layer not in self._found:
            self._found[site.layer] = LayerFeatures(q, k, v, output, site.scale)
            if self._ending and len(self._found) == len(self.layers):
                raise _AllRead
        return output

    def default_layers(self, names: Sequence[str]) -> list[str]:
        return list(names)

    def cross_layers(self, names: Sequence[str]) -> list[str]:
        edited = self._method.cross_layers(names) if hasattr(self._method, "cross_layers") else []  # type: ignore[union-attr]
        return [name for name in names if name in edited or name in self.layers]

    def takes_structure(self, step: int, total: int) -> bool:
        return False


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of `model` wants a gradient meanwhile, so that nothing is saved for one."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def gradient(loss: Tensor, latents: Tensor) -> Tensor:
    """Of a float32 loss by float32 latents; what float16 would round to 0 on the way through a UNet is scaled up meanwhile.

    Raises:
        FloatingPointError: NaN or infinity in it.
    """
    (scaled,) = torch.autograd.grad(loss, latents, torch.full_like(loss, SCALE))
    return require_finite(scaled, "gradient of the latents", loss.dtype) / SCALE


def descend(latents: Tensor, optimiser: torch.optim.Optimizer, loss: Callable[[Tensor], Losses]) -> Losses:
    """One step of `optimiser` on `latents`, whose only parameter they are; the losses before it, detached.

    Raises:
        FloatingPointError: NaN or infinity in the gradient; the latents are then as they were.
    """
    with torch.enable_grad():
        losses = loss(latents)
        latents.grad = gradient(losses.total, latents)
    optimiser.step()
    latents.grad = None
    return Losses(*(each.detach() for each in losses))
