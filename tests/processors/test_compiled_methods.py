"""A layer under every method and torch.compile: results as without, two graphs for all sizes."""

import copy
import dataclasses
import pickle

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch._dynamo.testing import CompileCounterWithBackend

from qalign import BatchLayout, UNetAttnProcessor
from qalign.context.clock import Clock
from qalign.context.regions import Regions
from qalign.methods import METHODS

SIZE = (32, 24)  # of the latents; the layers have these tokens, a quarter of them and a sixteenth
TOKENS = [32 * 24, 16 * 12, 8 * 6]
LABELS = torch.arange(24).expand(SIZE) // 8  # two that do not see each other beside the background
SEVERAL = {"structure": [LABELS] * 3}
SETTINGS = {"dream_matcher": {"size": SIZE}}
LAYOUTS = {"story_diffusion": ["output"] * 3, "consistory": ["output"] * 3}
LABELLED = {"consistory": SEVERAL, "free_custom": {"appearance": [LABELS]}}
ALIKE = {"appearance": LABELS, "structure": LABELS.flip(1), "background": 0}
CASES = [(name, regions) for name in METHODS for regions in (False, True) if regions or name != "bounded"]


def changed(method, share):
    """The method with every number that it takes multiplied by `share`."""
    for each in dataclasses.fields(method):
        if each.init and isinstance(getattr(method, each.name), float):
            try:
                method = dataclasses.replace(method, **{each.name: share * getattr(method, each.name)})
            except ValueError:  # a number that this method fixes
                continue
    return method


def processor(name, labelled):
    regions = Regions(**LABELLED.get(name, ALIKE)) if labelled else None
    method = METHODS[name](**SETTINGS.get(name, {}))
    layout = BatchLayout(*LAYOUTS.get(name, ("output", "appearance", "structure")))
    clock = Clock((0.25, 0.75), method.takes_structure)
    return UNetAttnProcessor(method, layout, clock=clock, layer="down_blocks.1", regions=regions)


def outputs(attn):
    """The outputs at three sizes, at four steps each."""
    for tokens in TOKENS:
        hidden = torch.randn(6, tokens, 32, generator=torch.Generator().manual_seed(tokens))
        for step in range(4):
            attn.processor.clock.set(step, 4)
            yield attn(hidden)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("name", "regions"), CASES)
def test_two_graphs_serve_all_sizes(name, regions):
    torch._dynamo.reset()
    torch.manual_seed(0)
    attn = Attention(32, heads=2, dim_head=16).eval()
    attn.set_processor(processor(name, regions))
    eager = list(outputs(attn))
    assert not torch.equal(eager[2], eager[0]) and torch.equal(eager[3], eager[0])
    attn.set_processor(processor(name, regions))  # regions that no layer has read
    counter = CompileCounterWithBackend("eager")
    attn.compile(backend=counter, fullgraph=True)
    for call, (compiled, expected) in enumerate(zip(outputs(attn), eager)):
        torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
        assert counter.frame_count <= (1 if call < 4 else 2), f"call {call}"


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["qalign", "free_custom"])
def test_other_numbers_compile_anew(name):
    """torch.compile takes what a module holds for constant, so other numbers are another graph."""
    torch._dynamo.reset()
    attn, hidden = Attention(32, heads=2, dim_head=16).eval(), torch.randn(3, 48, 32)
    layer = processor(name, False)
    layer.clock = None
    attn.set_processor(layer)
    compiled, results = torch.compile(attn, backend="eager", fullgraph=True, dynamic=True), []
    given = layer.method
    for layer.method in (given, changed(given, 0.5)):
        results.append(compiled(hidden))
        torch.testing.assert_close(results[-1], attn(hidden), rtol=1e-5, atol=1e-5)
    assert not torch.equal(*results)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_layers_read_their_own_regions():
    """A graph finds the labels of the regions that it is called with, and of copies of them."""
    torch._dynamo.reset()
    attn, hidden = Attention(32, heads=2, dim_head=16).eval(), torch.randn(3, 48, 32)
    layer = processor("qalign", True)
    layer.clock = None
    attn.set_processor(layer)
    first = Regions(**ALIKE)
    turned = Regions(appearance=LABELS.flip(1), structure=LABELS, background=1)
    every = [first, turned, copy.deepcopy(first), pickle.loads(pickle.dumps(turned))]
    compiled, results = torch.compile(attn, backend="eager", fullgraph=True, dynamic=True), []
    for layer.regions in every:
        results.append(compiled(hidden))
        torch.testing.assert_close(results[-1], attn(hidden), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results[0], results[1])
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
