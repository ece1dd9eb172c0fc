"""Attention to reference images in diffusers pipelines.

>>> pipe.unet.set_attn_processor(QAlignAttnProcessor())
>>> with attach(pipe, QAlign(), layers="up", steps=(0.1, 0.9)):
...     images = pipe([prompt] * 3, latents=latents).images

>>> pipe = AppearanceTransferPipeline.from_pipe(pipe)
>>> image = pipe(appearance, structure, "a photo of a zebra", method=QAlign()).images[0]
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bank import FeatureBank
    from .bounded_guidance import BoundedGuidance
    from .control import Control, attach
    from .decoder_tuning import tuned_decoder
    from .layout import BatchLayout
    from .methods import (
        BoundedAttention,
        ConsiStory,
        CrossImage,
        CtrlX,
        DreamMatcher,
        EyeForAnEye,
        FreeCustom,
        MasaCtrl,
        QAlign,
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
    from .regions import Regions

# imported when asked for: the pipelines bring diffusers, and the command line answers --help without torch
_HOMES = {
    "bank": ("FeatureBank",),
    "bounded_guidance": ("BoundedGuidance",),
    "control": ("Control", "attach"),
    "decoder_tuning": ("tuned_decoder",),
    "layout": ("BatchLayout",),
    "methods": (
        "BoundedAttention",
        "ConsiStory",
        "CrossImage",
        "CtrlX",
        "DreamMatcher",
        "EyeForAnEye",
        "FreeCustom",
        "MasaCtrl",
        "QAlign",
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
    "regions": ("Regions",),
    "processors": ("CrossImageAttnProcessor", "QAlignAttnProcessor", "UNetAttnProcessor"),
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
    "EyeForAnEye",
    "FeatureBank",
    "FreeCustom",
    "MasaCtrl",
    "QAlign",
    "QAlignAttnProcessor",
    "ReferenceOnly",
    "Regions",
    "SeAl",
    "StoryDiffusion",
    "StyleAligned",
    "StyleID",
    "UNetAttnProcessor",
    "VisualStylePrompting",
    "ZStar",
    "attach",
    "tuned_decoder",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
