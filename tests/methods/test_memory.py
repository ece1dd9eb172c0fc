"""No method holds an N x N map: peak memory of one SDXL layer beyond its inputs."""

import pytest
import torch

from qalign import BatchLayout
from qalign.context.clock import Clock
from qalign.context.layer_call import ForwardPass, Site
from qalign.context.regions import Regions
from qalign.evaluation.peak_memory import MIB, PeakMemory
from qalign.methods import METHODS

SHAPE = (
    3,
    4,
    4096,
    64,
)  # [output, appearance, structure or second appearance] of up_blocks.1 at 1024 pixels, which has ten heads
LABELS = torch.arange(4096).view(64, 64) % 64 // 32


class Owner:
    layer = "up_blocks.0.attentions.1.transformer_blocks.0.attn1"
    forward = ForwardPass()
    forward.begin(64, 64)


def project(hidden):
    split = hidden.unflatten(-1, (SHAPE[1], -1)).transpose(1, 2)
    return split.clone(), split.clone(), split.clone()


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("name", METHODS)
def test_layer_memory_is_a_few_times_its_inputs(name):
    method = METHODS[name]()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(SHAPE[0], SHAPE[2], SHAPE[1], SHAPE[3], generator=generator).transpose(1, 2)
        for _ in range(3)
    )
    hidden = torch.randn(SHAPE[0], SHAPE[2], SHAPE[1] * SHAPE[3], generator=generator)
    regions = Regions(structure=LABELS, background=0) if name == "bounded" else None
    roles = ("output", "appearance", "appearance" if name == "free_custom" else "structure")
    site = Site(BatchLayout(*roles, guidance=False), None, None, Clock(), Owner(), regions)

    def layer(tokens):
        if hasattr(method, "prepare"):
            method.prepare(hidden[:, :tokens], project, site)
        method.attend(*(x[:, :, :tokens] for x in (q, k, v)), site)

    layer(64)  # whatever is loaded at the first call
    inputs = 3 * q.numel() * q.element_size() / MIB
    with PeakMemory(torch.device("cpu")) as memory:
        layer(SHAPE[2])
    one_map = SHAPE[1] * SHAPE[2] ** 2 * q.element_size() / MIB
    assert memory.peak_mib < 3 * inputs < one_map, f"{memory.peak_mib:.0f} MiB beside inputs of {inputs:.0f}"
