"""Attention to reference images in diffusers pipelines.

>>> pipe.unet.set_attn_processor(QAlignAttnProcessor())
>>> with attach(pipe, QAlign(), layers="up", steps=(0.1, 0.9)):
...     images = pipe([prompt] * 3, latents=latents).images

>>> pipe = AppearanceTransferPipeline.from_pipe(pipe)
>>> image = pipe(appearance, structure, "a photo of a zebra", method=QAlign()).images[0]

`attach` says where latents come from, `Editing` how to write a method of your own.
"""

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .context.layer_call import Site, take
    from .context.layout import BatchLayout
    from .context.regions import Regions
    from .methods import (
        BoundedAttention,
        ConsiStory,
        CrossImage,
        CtrlX,
        DreamMatcher,
        Editing,
        EyeForAnEye,
        FreeCustom,
        MasaCtrl,
        QAlign,
        QAlignWarp,
        ReferenceOnly,
        SeAl,
        StoryDiffusion,
        StyleAligned,
        StyleID,
        VisualStylePrompting,
        ZStar,
    )
    from .methods.attention_distillation import AttentionDistillation
    from .pipelines import (
        AppearanceTransferOutput,
        AppearanceTransferPipeline,
        AppearanceTransferXLPipeline,
        AttentionDistillationOutput,
        AttentionDistillationPipeline,
        AttentionDistillationXLPipeline,
        BoundedAttentionOutput,
        BoundedAttentionPipeline,
        BoundedAttentionXLPipeline,
    )
    from .processors import CrossImageAttnProcessor, QAlignAttnProcessor, UNetAttnProcessor
    from .processors.attach import Control, attach
    from .processors.feature_bank import FeatureBank
    from .sampling.bounded_guidance import BoundedGuidance
    from .sampling.decoder_tuning import tuned_decoder

# imported when asked for: the pipelines bring diffusers, and the command line answers --help without torch
_HOMES = {
    "context.layer_call": ("Site", "take"),
    "context.layout": ("BatchLayout",),
    "context.regions": ("Regions",),
    "methods": (
        "BoundedAttention",
        "ConsiStory",
        "CrossImage",
        "CtrlX",
        "DreamMatcher",
        "Editing",
        "EyeForAnEye",
        "FreeCustom",
        "MasaCtrl",
        "QAlign",
        "QAlignWarp",
        "ReferenceOnly",
        "SeAl",
        "StoryDiffusion",
        "StyleAligned",
        "StyleID",
        "VisualStylePrompting",
        "ZStar",
    ),
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

__all__ = [
    "AppearanceTransferOutput",
    "AppearanceTransferPipeline",
    "AppearanceTransferXLPipeline",
    "AttentionDistillation",
    "AttentionDistillationOutput",
    "AttentionDistillationPipeline",
    "AttentionDistillationXLPipeline",
    "BatchLayout",
    "BoundedAttention",
    "BoundedAttentionOutput",
    "BoundedAttentionPipeline",
    "BoundedAttentionXLPipeline",
    "BoundedGuidance",
    "ConsiStory",
    "Control",
    "CrossImage",
    "CrossImageAttnProcessor",
    "CtrlX",
    "DreamMatcher",
    "Editing",
    "EyeForAnEye",
    "FeatureBank",
    "FreeCustom",
    "MasaCtrl",
    "QAlign",
    "QAlignAttnProcessor",
    "QAlignWarp",
    "ReferenceOnly",
    "Regions",
    "SeAl",
    "Site",
    "StoryDiffusion",
    "StyleAligned",
    "StyleID",
    "UNetAttnProcessor",
    "VisualStylePrompting",
    "ZStar",
    "attach",
    "take",
    "tuned_decoder",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    near = difflib.get_close_matches(name, __all__, cutoff=0.5)
    advice = f"near names: {', '.join(near)}" if near else f"dir({__name__}) lists all names"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r} ({advice})", name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
