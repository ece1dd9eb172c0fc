"""Pipelines: appearance transfer on any Stable Diffusion or Stable Diffusion XL pipeline."""

from .appearance_transfer import METHODS, AppearanceTransferOutput, AppearanceTransferPipeline, AppearanceTransferXLPipeline

__all__ = ["METHODS", "AppearanceTransferOutput", "AppearanceTransferPipeline", "AppearanceTransferXLPipeline"]
