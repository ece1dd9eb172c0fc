"""Pipelines on Stable Diffusion and SDXL: appearance transfer, attention distillation, bounded attention."""

from ..embedded.quiet import quiet_libraries

with quiet_libraries():  # transformers reports the image libraries that it lacks
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
