"""Attention to reference images in diffusers pipelines.

>>> pipe.unet.set_attn_processor(QAlignAttnProcessor())
>>> with attach(pipe, QAlign(), layers="up", steps=(0.1, 0.9)):
...     images = pipe([prompt] * 3, latents=latents).images
"""

from .control import Control, attach
from .layout import BatchLayout
from .methods import CrossImage, QAlign
from .processors import CrossImageAttnProcessor, QAlignAttnProcessor, UNetAttnProcessor

__all__ = ["BatchLayout", "Control", "CrossImage", "CrossImageAttnProcessor", "QAlign", "QAlignAttnProcessor", "UNetAttnProcessor", "attach"]
