"""Read a UNet's self-attention features with their gradient, and descend a loss on latents."""

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
from .denoising import require_finite

SCALE = 2.0**16  # a mean over 2^20 outputs has gradients of 2^-20; the least float16 is 2^-24


class _AllRead(Exception):
    """Every chosen layer has been read: the rest of the UNet need not run."""


class AttentionReader(Method):
    """Read queries, keys, values and outputs of attention layers in one partial pass of a UNet.

    The pass ends at the last chosen layer. Between readings, inside the `with` block, the UNet runs as it
    is, or with `method`. A block that gradient checkpointing runs again in the backward pass is read once;
    that backward pass belongs inside the `with` block.

    Args:
        pipe: a pipeline of this library: its `predict(latents, timestep, condition)` is called.
        layers: names or patterns, as `attach` takes them. None is the last six of the decoder, or the
            default layers of `method`.
        method: a method that acts in its default layers and in `layers`, such as `BoundedAttention()`. Its
            batch has one output, or the two guidance halves of one. None is plain attention.
        regions: label maps for `method`. None is none.
        cross: read the cross-attention of the same blocks too. Those names end in "attn2".

    Raises:
        TypeError: `pipe` has no UNet.
        ValueError: `layers` match nothing.

    Example:
        >>> from qalign import AttentionDistillationPipeline
        >>> pipe = AttentionDistillationPipeline.from_pipe(pipe)
        >>> condition = pipe.conditions(prompt, 32, 32)[0]
        >>> with AttentionReader(pipe, "mid") as read:
        ...     features = read(latents, torch.tensor(301), condition)
        >>> {name: list(layer.query.shape) for name, layer in features.items()}
        {'mid_block.attentions.0.transformer_blocks.0.attn1': [3, 2, 4, 32]}

    Notes:
        The features keep the graph of the pass, where gradients are enabled: its memory is that of
        training. What the `with` block installs is removed at its end, after exceptions too.
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
        self._pipe, self._method = pipe, method or Method()
        self._found: dict[str, LayerFeatures] = {}
        self._reading = self._ending = False
        unet = find_unet(pipe)
        chooser: Any = method or AttentionDistillation()  # has `default_layers`
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
        """Read the chosen layers in a partial pass.

        Args:
            latents: [B, C, h, w].
            timestep: a tensor of one element.
            condition: of one row, from `pipe.conditions`.

        Returns:
            features by layer name. The class shows an example.
        """
        return self._read(latents, timestep, condition, ending=True)[1]

    def predict(
        self, latents: Tensor, timestep: Tensor, condition: dict[str, Any]
    ) -> tuple[Tensor, dict[str, LayerFeatures]]:
        """Read the chosen layers in a whole pass, and keep its output.

        Args:
            latents: [B, C, h, w].
            timestep: a tensor of one element.
            condition: of one row, from `pipe.conditions`.

        Returns:
            the output of `pipe.predict`, float32 [B, C, h, w], and the features by layer name.
        """
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
        """Attend as the method does, or plainly, and keep the features. `attach` calls this."""
        return self._note(q, k, v, site, self._method.attend(q, k, v, site))

    def attend_cross(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Do the same in cross-attention."""
        return self._note(q, k, v, site, self._method.attend_cross(q, k, v, site))

    def _note(self, q: Tensor, k: Tensor, v: Tensor, site: Site, output: Tensor) -> Tensor:
        if self._reading and site.layer in self.layers and site.layer not in self._found:
            self._found[site.layer] = LayerFeatures(q, k, v, output, site.scale)
            if self._ending and len(self._found) == len(self.layers):
                raise _AllRead
        return output

    def default_layers(self, names: Sequence[str]) -> list[str]:
        """All names: the reader has chosen its layers before."""
        return list(names)

    def cross_layers(self, names: Sequence[str]) -> list[str]:
        """The cross-attention layers that the method edits or the reader reads."""
        edited = self._method.cross_layers(names)
        return [name for name in names if name in edited or name in self.layers]


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Switch off the gradients of a model's parameters inside a `with` block, which saves memory.

    Args:
        model: any module. Its parameters have their `requires_grad` again afterwards.

    Example:
        >>> with frozen(pipe.unet):
        ...     any(parameter.requires_grad for parameter in pipe.unet.parameters())
        False
    """
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def gradient(loss: Tensor, latents: Tensor) -> Tensor:
    """Differentiate a loss by latents.

    The loss is scaled by 2^16 during the backward pass, for float16 would round small gradients to 0.

    Args:
        loss: a float32 scalar.
        latents: float32, a leaf that requires a gradient.

    Returns:
        float32 of the shape of `latents`.

    Raises:
        FloatingPointError: the gradient has NaN or infinite values.

    Example:
        >>> moving = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> gradient((moving**2).sum(), moving)
        tensor([2., 4.])
    """
    (scaled,) = torch.autograd.grad(loss, latents, torch.full_like(loss, SCALE))
    return require_finite(scaled, "gradient of the latents", loss.dtype) / SCALE


def descend(latents: Tensor, optimiser: torch.optim.Optimizer, loss: Callable[[Tensor], Losses]) -> Losses:
    """Take one step of an optimiser on latents.

    Args:
        latents: float32 [n, C, h, w] that require a gradient. They are changed in place.
        optimiser: one whose only parameter is `latents`.
        loss: the losses of latents.

    Returns:
        the losses before the step, detached.

    Raises:
        FloatingPointError: the gradient has NaN or infinite values. The latents are then unchanged.

    Example:
        >>> from qalign.methods.attention_distillation import Losses
        >>> moving = torch.ones(1, 4, 8, 8, requires_grad=True)
        >>> square = lambda x: Losses((x**2).mean(), (x**2).mean(), x.new_zeros(()))
        >>> adam = torch.optim.Adam([moving], lr=0.5)
        >>> [round(descend(moving, adam, square).total.item(), 3) for _ in range(2)]
        [1.0, 0.25]
    """
    with torch.enable_grad():
        losses = loss(latents)
        latents.grad = gradient(losses.total, latents)
    optimiser.step()
    latents.grad = None
    return Losses(*(each.detach() for each in losses))
