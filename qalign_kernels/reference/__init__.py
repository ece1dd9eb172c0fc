from . import attention, distillation, probe, qalign_attention, rearrange, similarity

__all__ = ["attention", "distillation", "probe", "qalign_attention", "rearrange", "similarity"]
