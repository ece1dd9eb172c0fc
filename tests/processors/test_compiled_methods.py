"""A layer under every method and torch.compile: results as without, and one graph for all steps."""

from collections.abc import Callable

import pytest
import torch
from diffusers.models.attention_processor import Attention

from qalign import BatchLayout, UNetAttnProcessor
from qalign.context.clock import Clock
from qalign.context.regions import Regions
from qalign.methods import METHODS

ELSEWHERE = ("qalign", "cross_image")  # test_unet_contract.py, through whole pipelines
DRAWN_ON_THE_HOST = ("story_diffusion", "consistory")  # anew at each step, so their graphs break
SETTINGS = {"dream_matcher": {"size": (8, 8)}}  # outside of attach nothing else tells it
LABELS = torch.arange(64).view(8, 8) % 8 // 3  # two that do not see each other beside the background


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ELSEWHERE + DRAWN_ON_THE_HOST])
def test_one_graph_serves_every_step(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    graphs: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(module)
        return module.forward

    method, clock = METHODS[name](**SETTINGS.get(name, {})), Clock((0.25, 0.75))
    regions = Regions(structure=LABELS, background=0) if name == "bounded" else None
    layout = BatchLayout("output", "appearance", "structure")
    attn, hidden = Attention(32, heads=2, dim_head=16).eval(), torch.randn(6, 64, 32)
    attn.set_processor(UNetAttnProcessor(method, layout, clock=clock, layer="down_blocks.1", regions=regions))

    def steps():
        for step in range(4):
            clock.set(step, 4)
            yield attn(hidden)

    eager = list(steps())
    assert not torch.equal(eager[2], eager[0]) and torch.equal(eager[3], eager[0])
    attn.compile(backend=backend, fullgraph=True, dynamic=False)
    for step, (compiled, expected) in enumerate(zip(steps(), eager)):
        torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
        assert len(graphs) == 1, f"step {step}"
