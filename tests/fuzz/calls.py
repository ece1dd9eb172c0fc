"""How to draw a random call of each public op."""

import functools
from collections.abc import Callable

import qalign_kernels as qk
from qalign_kernels.qalign_attention import REFINEMENTS
from tests.fuzz.attention_calls import draw_attention
from tests.fuzz.call import Call
from tests.fuzz.draw import Draw
from tests.fuzz.match_calls import draw_match
from tests.fuzz.other_calls import draw_distillation, draw_label_mass, draw_mean_map, draw_rearrange
from tests.fuzz.qalign_calls import draw_qalign

CALLS: dict[str, Callable[[Draw], Call]] = {
    "attention": draw_attention,
    "attention_with_lse": functools.partial(draw_attention, op=qk.attention_with_lse),
    "similarity_argmax": functools.partial(draw_match, topk=False),
    "similarity_topk": functools.partial(draw_match, topk=True),
    "label_mass": draw_label_mass,
    "mean_attention_map": draw_mean_map,
    "rearrange_kv match_counts": draw_rearrange,
    "distillation_loss": draw_distillation,
    **{f"qalign_attention {name}": functools.partial(draw_qalign, refinement=name) for name in REFINEMENTS},
}
