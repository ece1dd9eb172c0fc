"""Attention processors for UNets: the projections around the attention, once for all methods."""

import contextlib
import functools
import sys
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..context.clock import Clock
from ..context.layer_call import ForwardPass, Site
from ..context.layout import BatchLayout
from ..context.regions import Regions
from ..methods import CrossImage, Method, QAlign, require_method

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

DEFAULT_LAYOUT = BatchLayout("output", "appearance", "structure")
_QALIGN = QAlign()
_CROSS_IMAGE = CrossImage()
_NEUTRAL = Method()


class UNetAttnProcessor:
    """Run a method on the attention layers of a UNet. Without a method it is stock attention.

    Norms, masks, fused and adapted projections, the residual and the rescaling are bit for bit those of
    diffusers' AttnProcessor2_0. The attention itself is too, wherever the method edits nothing: without a
    method, in cross-attention unless the method defines `attend_cross`, and in every row that the method
    leaves plain. Scores and softmax are computed in float32, whatever `upcast_attention` and `upcast_softmax`
    are.

    >>> from qalign import QAlignWarp, UNetAttnProcessor
    >>> before = pipe.unet.attn_processors
    >>> pipe.unet.set_attn_processor(UNetAttnProcessor(QAlignWarp()))
    >>> images = pipe([prompt] * 3, latents=latents, num_inference_steps=50, guidance_scale=1).images
    >>> pipe.unet.set_attn_processor(before)  # empties `before`
    >>> len(images)
    3

    Args:
        method: the method that edits attention. None edits nothing.
        layout: the roles of the batch's rows. A layout without an output row edits nothing.
        clock: the denoising step. Without a clock, every step is edited and reads the appearance.
        layer: the name of the layer, which some methods read.
        regions: labels of the pictures' tokens, which restrict what the output reads. None is no restriction.
        forward: the call of the UNet, where a method keeps tensors for later layers. None keeps nothing.

    Raises:
        TypeError: `method` or `layout` is of another type.

    Notes:
        `load_ip_adapter` and `unload_ip_adapter` make new processors without arguments. Use `qalign.attach`
        after loading an adapter.
    """

    def __init__(
        self,
        method: Method | None = None,
        layout: BatchLayout = DEFAULT_LAYOUT,
        *,
        clock: Clock | None = None,
        layer: str = "",
        regions: Regions | None = None,
        forward: ForwardPass | None = None,
    ) -> None:
        if method is not None:
            require_method(method)
        if not isinstance(layout, BatchLayout):
            raise TypeError(f"layout: expected a BatchLayout, got {layout!r}")
        self.method = method
        self.layout = layout
        self.clock = clock
        self.layer = layer
        self.regions = regions
        self.forward = forward
        register_with_guiders(type(self))

    def __call__(
        self,
        attn: "Attention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        _check_layer(attn, encoder_hidden_states)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        mask = _prepare_mask(
            attn, attention_mask, hidden_states if encoder_hidden_states is None else encoder_hidden_states
        )
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        crossing = encoder_hidden_states is not None
        method = _NEUTRAL if self.method is None or "output" not in self.layout.roles else self.method
        scale = None if attn.scale == (attn.inner_dim // attn.heads) ** -0.5 else attn.scale
        site = Site(self.layout, scale, mask, self.clock, self, self.regions)
        if not crossing:
            hidden_states = method.prepare(
                hidden_states, functools.partial(project, attn, context=None), site
            )
        q, k, v = project(attn, hidden_states, encoder_hidden_states)
        attended = (method.attend_cross if crossing else method.attend)(q, k, v, site)

        hidden_states = attended.transpose(1, 2).flatten(2).to(q.dtype)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


class QAlignAttnProcessor(UNetAttnProcessor):
    """Run Q-Align in every self-attention layer: `pipe.unet.set_attn_processor(QAlignAttnProcessor())`.

    >>> from qalign import QAlignAttnProcessor
    >>> before = pipe.unet.attn_processors
    >>> pipe.unet.set_attn_processor(QAlignAttnProcessor())
    >>> images = pipe([prompt] * 3, latents=latents, num_inference_steps=50, guidance_scale=1).images
    >>> pipe.unet.set_attn_processor(before)  # empties `before`

    The last line restores the former processors. `set_default_attn_processor` cannot do it: it refuses
    processors of other libraries. `qalign.attach` restores by itself; its docstring shows where `latents`
    come from.

    Output rows read the appearance row, at every step. The method is `QAlign()`, as the paper states it. For
    this library's variant use `UNetAttnProcessor(QAlignWarp())`. Structure steps need the clock of
    `qalign.attach`, which also selects layers and steps.

    Args:
        method: a `QAlign` with other settings, or None for stock attention.
        layout: the roles of the batch's rows.
    """

    def __init__(self, *, method: QAlign | None = _QALIGN, layout: BatchLayout = DEFAULT_LAYOUT) -> None:
        super().__init__(method, layout)


class CrossImageAttnProcessor(UNetAttnProcessor):
    """Run Cross-Image attention in every self-attention layer. Use it as `QAlignAttnProcessor`.

    >>> from qalign import CrossImageAttnProcessor
    >>> CrossImageAttnProcessor().method.contrast
    1.67

    Args:
        method: a `CrossImage` with other settings, or None for stock attention.
        layout: the roles of the batch's rows.
    """

    def __init__(
        self, *, method: CrossImage | None = _CROSS_IMAGE, layout: BatchLayout = DEFAULT_LAYOUT
    ) -> None:
        super().__init__(method, layout)


def is_unet_attention(module: nn.Module) -> bool:
    """Return whether `module` is diffusers' `Attention` without added key and value projections."""
    return (
        hasattr(module, "rescale_output_factor")
        and hasattr(module, "set_processor")
        and getattr(module, "add_k_proj", None) is None
    )


def register_with_guiders(processor_class: type) -> None:
    """Let diffusers' LayerSkip treat `processor_class` as AttnProcessor2_0, if its hooks are loaded."""
    helpers = sys.modules.get("diffusers.hooks._helpers")
    models = sys.modules.get("diffusers.models.attention_processor")
    with contextlib.suppress(AttributeError, ValueError):
        registry = helpers.AttentionProcessorRegistry  # type: ignore[union-attr]
        registry.register(processor_class, registry.get(models.AttnProcessor2_0))  # type: ignore[union-attr]


def _check_layer(attn: "Attention", encoder_hidden_states: Tensor | None) -> None:
    if not is_unet_attention(attn):
        added = getattr(attn, "added_kv_proj_dim", None)
        got = type(attn).__name__ + (f" with added_kv_proj_dim={added}" if added is not None else "")
        raise TypeError(f"attn: expected diffusers' Attention of a UNet without added projections, got {got}")
    if isinstance(encoder_hidden_states, tuple):
        advice = "an IP-Adapter is loaded: use qalign.attach, which leaves cross-attention alone"
        raise TypeError(f"encoder_hidden_states: expected a tensor, got a tuple ({advice})")


def _prepare_mask(attn: "Attention", mask: Tensor | None, keys: Tensor) -> Tensor | None:
    """Return the mask [B, 1 or H, 1 or N_q, N_k]. A mask for all heads is not repeated."""
    if mask is None:
        return None
    batch = keys.shape[0]
    mask = attn.prepare_attention_mask(mask, keys.shape[1], 0)  # for a batch of 0 it pads and does not repeat
    return mask.unsqueeze(1) if mask.shape[0] == batch else mask.view(batch, attn.heads, -1, mask.shape[-1])


def project(
    attn: "Attention", hidden_states: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values [B, H, N, D], with tokens outside heads in memory."""
    # An adapter that was loaded after fusing wraps to_q and has not changed the fused weights.
    fused = attn.fused_projections and type(attn.to_q) is nn.Linear
    if context is None and fused:
        q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        q = attn.to_q(hidden_states)
        if context is None:
            context = hidden_states
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        k, v = (
            attn.to_kv(context).chunk(2, dim=-1)
            if fused and attn.is_cross_attention
            else (attn.to_k(context), attn.to_v(context))
        )
    q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
    q = q if attn.norm_q is None else attn.norm_q(q)
    k = k if attn.norm_k is None else attn.norm_k(k)
    return q, k, v
