"""Pipelines: appearance transfer on any Stable Diffusion or Stable Diffusion XL pipeline."""

from ..embedded.quiet import quiet_libraries

with quiet_libraries():  # transformers would say which image library it had rather found
    from .appearance_transfer import (
        AppearanceTransferOutput,
        AppearanceTransferPipeline,
        AppearanceTransferXLPipeline,
    )
    from .attention_distillation import (
        AttentionDistillationOutput,
        AttentionDistillationPipeline,
        AttentionDistillationXLPipeline,
    )
    from .bounded_attention import (
        BoundedAttentionOutput,
        BoundedAttentionPipeline,
        BoundedAttentionXLPipeline,
    )
    from .transfer_inputs import METHODS

__all__ = [
    "METHODS",
    "AppearanceTransferOutput",
    "AppearanceTransferPipeline",
    "AppearanceTransferXLPipeline",
    "AttentionDistillationOutput",
    "AttentionDistillationPipeline",
    "AttentionDistillationXLPipeline",
    "BoundedAttentionOutput",
    "BoundedAttentionPipeline",
    "BoundedAttentionXLPipeline",
]
