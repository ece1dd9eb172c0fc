"""Which modules of a denoiser a method acts in: the UNet of a pipeline, its layers by name, its hooks."""

import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..methods import Hook, Method
from .unet import is_unet_attention

BLOCKS = ("down_blocks", "mid_block", "up_blocks")
NOT_SPATIAL = (  # the tokens of these modules are not those of one image
    "fuser",
    "motion_modules",
    "temporal_transformer_blocks",
    "temp_attentions",
)


def find_unet(pipe_or_model: Any) -> nn.Module:
    """Return the UNet of a pipeline, or the UNet itself, without the wrapper of torch.compile.

    Raises:
        TypeError: there is none.
    """
    model = getattr(pipe_or_model, "unet", pipe_or_model)
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or not all(hasattr(model, block) for block in BLOCKS):
        raise TypeError(
            f"pipe_or_model: expected a pipeline with a UNet, or a UNet, got {type(pipe_or_model).__name__}"
        )
    return model


def select_layers(
    model: nn.Module, layers: str | Sequence[str] | None, method: Method, *, required: bool = True
) -> dict[str, Any]:
    """Select the self-attention layers of a UNet, in the order of the model. Arguments as in `attach`.

    Raises:
        ValueError: a name that matches no layer, or no layer at all and `required`.
    """
    present = _attention_layers(model, cross=False)
    if not present:
        expected, got = f"self-attention in {', '.join(BLOCKS)}", f"{type(model).__name__} without any"
        raise ValueError(f"pipe_or_model: expected {expected}, got {got}")
    if layers is None:
        chosen = set(method.default_layers(list(present)))
        if not chosen and required:
            reason = f"{type(method).__name__} has no default on {type(model).__name__}"
            raise ValueError(f"layers: expected names, because {reason}, got None")
    else:
        chosen = set()
        if not layers:
            raise ValueError(f"layers: expected at least one name or pattern, or None, got {layers!r}")
        for wanted in [layers] if isinstance(layers, str) else layers:
            found = {name for name in present if _matches(name, wanted)}
            if not found:
                expected = f"names or patterns of self-attention layers of {type(model).__name__}"
                got = f"{wanted!r}, which none of {len(present)} matches (first: {next(iter(present))})"
                raise ValueError(f"layers: expected {expected}, got {got}")
            chosen |= found
    return {name: module for name, module in present.items() if name in chosen}


def select_cross_layers(method: Method, model: nn.Module) -> dict[str, Any]:
    """Return the cross-attention layers in which `method` acts, in the order of the model."""
    present = _attention_layers(model, cross=True)
    chosen = set(method.cross_layers(list(present)))
    return {name: module for name, module in present.items() if name in chosen}


def hooks_of(method: Method, model: nn.Module) -> dict[str, Hook]:
    """Return the method's functions on outputs of other modules, by module name.

    Raises:
        ValueError: there is no module of that name.
    """
    hooks = method.hooks(model)
    present = dict(model.named_modules())
    for name in hooks:
        if name not in present:
            expected = f"names of modules of {type(model).__name__}"
            raise ValueError(f"hooks: expected {expected}, got {name!r} from {type(method).__name__}")
    return hooks


def _attention_layers(model: nn.Module, *, cross: bool) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(BLOCKS)
        and is_unet_attention(module)
        and module.is_cross_attention == cross
        and not any(part in NOT_SPATIAL for part in name.split("."))
    }


def _matches(name: str, wanted: str) -> bool:
    block = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}.get(wanted, wanted)
    return name == block or name.startswith(f"{block}.") or fnmatch.fnmatchcase(name, wanted)
