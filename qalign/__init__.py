"""Attention to reference images in diffusers pipelines.

Drop Q-Align into a pipeline whose rows are output, appearance and structure:

>>> from qalign import AppearanceTransferPipeline, QAlign, attach
>>> with attach(pipe, QAlign(), layers="up", steps=(0.1, 0.9)):
...     images = pipe([prompt] * 3, latents=latents, num_inference_steps=50, guidance_scale=1).images
>>> len(images)
3

Transfer the appearance of one picture to the structure of another:

>>> pipe = AppearanceTransferPipeline.from_pipe(pipe)
>>> image = pipe(appearance, structure, prompt, num_inference_steps=50).images[0]
>>> image.size
(32, 32)

The docstring of `attach` shows where `latents` come from. `Editing` is the base of a method of your own.
"""

import difflib
import importlib
from typing import TYPE_CHECKING, Any

from .methods import _names

if TYPE_CHECKING:
    from .context.layer_call import Site as Site
    from .context.layer_call import take as take
    from .context.layout import BatchLayout as BatchLayout
    from .context.regions import Regions as Regions
    from .methods import Editing as Editing
    from .methods._classes import *  # noqa: F403
    from .methods.attention_distillation import AttentionDistillation as AttentionDistillation
    from .pipelines import AppearanceTransferOutput as AppearanceTransferOutput
    from .pipelines import AppearanceTransferPipeline as AppearanceTransferPipeline
    from .pipelines import AppearanceTransferXLPipeline as AppearanceTransferXLPipeline
    from .pipelines import AttentionDistillationOutput as AttentionDistillationOutput
    from .pipelines import AttentionDistillationPipeline as AttentionDistillationPipeline
    from .pipelines import AttentionDistillationXLPipeline as AttentionDistillationXLPipeline
    from .pipelines import BoundedAttentionOutput as BoundedAttentionOutput
    from .pipelines import BoundedAttentionPipeline as BoundedAttentionPipeline
    from .pipelines import BoundedAttentionXLPipeline as BoundedAttentionXLPipeline
    from .processors import CrossImageAttnProcessor as CrossImageAttnProcessor
    from .processors import QAlignAttnProcessor as QAlignAttnProcessor
    from .processors import UNetAttnProcessor as UNetAttnProcessor
    from .processors.attach import Control as Control
    from .processors.attach import attach as attach
    from .processors.feature_bank import FeatureBank as FeatureBank
    from .sampling.bounded_guidance import BoundedGuidance as BoundedGuidance
    from .sampling.decoder_tuning import tuned_decoder as tuned_decoder

# Each name is imported when it is used: pipelines import diffusers, and `--help` needs no torch.
_HOMES = {
    "context.layer_call": ("Site", "take"),
    "context.layout": ("BatchLayout",),
    "context.regions": ("Regions",),
    "methods": ("Editing", *_names.MODULES),
    "methods.attention_distillation": ("AttentionDistillation",),
    "pipelines": (
        "AppearanceTransferOutput",
        "AppearanceTransferPipeline",
        "AppearanceTransferXLPipeline",
        "AttentionDistillationOutput",
        "AttentionDistillationPipeline",
        "AttentionDistillationXLPipeline",
        "BoundedAttentionOutput",
        "BoundedAttentionPipeline",
        "BoundedAttentionXLPipeline",
    ),
    "processors": ("CrossImageAttnProcessor", "QAlignAttnProcessor", "UNetAttnProcessor"),
    "processors.attach": ("Control", "attach"),
    "processors.feature_bank": ("FeatureBank",),
    "sampling.bounded_guidance": ("BoundedGuidance",),
    "sampling.decoder_tuning": ("tuned_decoder",),
}

_NAMES = sorted(name for names in _HOMES.values() for name in names)
if not TYPE_CHECKING:
    __all__ = _NAMES


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    near = difflib.get_close_matches(name, _NAMES, cutoff=0.5)
    advice = f"near names: {', '.join(near)}" if near else f"dir({__name__}) lists all names"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r} ({advice})", name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
