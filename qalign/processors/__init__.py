"""Attention processors for diffusers' models."""

from .unet import CrossImageAttnProcessor, QAlignAttnProcessor, UNetAttnProcessor

__all__ = ["CrossImageAttnProcessor", "QAlignAttnProcessor", "UNetAttnProcessor"]
