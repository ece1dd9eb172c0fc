"""Attention to reference images without an N×N map: match, count, attend.

>>> import torch
>>> from qalign_kernels import qalign_attention
>>> query, ref_query, ref_key, ref_value = torch.randn(4, 1, 8, 256, 40)
>>> qalign_attention(query, ref_query, ref_key, ref_value).shape
torch.Size([1, 8, 256, 40])
"""

from ._backends import use_backend
from .attention import AttentionWithLse, attention, attention_with_lse
from .distillation import distillation_loss
from .probe import label_mass, mean_attention_map
from .qalign_attention import qalign_attention
from .rearrange import match_counts, rearrange_kv
from .segments import Segment
from .similarity import Match, similarity_argmax, similarity_topk

__version__ = "0.2.0"

__all__ = [
    "AttentionWithLse",
    "Match",
    "Segment",
    "attention",
    "attention_with_lse",
    "distillation_loss",
    "label_mass",
    "match_counts",
    "mean_attention_map",
    "qalign_attention",
    "rearrange_kv",
    "similarity_argmax",
    "similarity_topk",
    "use_backend",
]
