"""torch.compile serves other sizes by one more graph, and other settings, without a graph break."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import qalign_kernels as qk
from qalign_kernels import Segment
from tests.kernels.calls import CALLS, inputs

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def _counted(function, dynamic=None):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return counter, torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)


def _of(batch, tokens, learned):
    x = inputs(batch, tokens)
    return x.of([leaf.requires_grad_(learned) for leaf in x.leaves()])


@pytest.mark.parametrize("name", CALLS)
def test_more_tokens_take_one_more_graph(name):
    _check(name, ((3, 7), (3, 9), (3, 20)), dynamic=None, learned=False)


@pytest.mark.parametrize("name", CALLS)
def test_dynamic_sizes_take_two_graphs_in_training(name):
    _check(name, ((3, 7), (4, 9), (5, 20)), dynamic=True, learned=True)


def _check(name, sizes, *, dynamic, learned):
    call = CALLS[name]
    counter, compiled = _counted(lambda x: call(x, "tiled"), dynamic)
    for size in sizes:
        x = _of(*size, learned)
        torch.testing.assert_close(compiled(x), call(x, "tiled"), rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", CALLS)
def test_references_compile_too(name):
    call = CALLS[name]
    _, compiled = _counted(lambda x: call(x, "reference"))
    x = inputs(2, 9)
    torch.testing.assert_close(compiled(x), call(x, "reference"), rtol=1e-5, atol=1e-6)


SETTINGS = {
    "attention scale": lambda x, s: qk.attention(x.query, Segment(x.key, x.value), scale=s),
    "attention contrast": lambda x, s: qk.attention(x.query, Segment(x.key, x.value), contrast=1 + s),
    "attention logit_scale": lambda x, s: qk.attention(x.query, Segment(x.key, x.value, logit_scale=s)),
    "attention logit_shift": lambda x, s: qk.attention(x.query, Segment(x.key, x.value, logit_shift=s)),
    "qalign strength": lambda x, s: qk.qalign_attention(
        x.query, x.reference, x.key, x.value, refinement="guided", strength=s
    ),
    "qalign contrast": lambda x, s: qk.qalign_attention(x.query, x.reference, x.key, x.value, contrast=1 + s),
    "qalign scale": lambda x, s: qk.qalign_attention(x.query, x.reference, x.key, x.value, scale=s),
    "label_mass scale": lambda x, s: qk.label_mass(x.query, x.key, x.labels, 4, scale=s),
    "mean_attention_map scale": lambda x, s: qk.mean_attention_map(x.query, x.key, scale=s),
    "distillation_loss scale": lambda x, s: qk.distillation_loss(
        x.value, x.query, x.key, x.reference, scale=s
    ),
    "similarity_topk k": lambda x, s: qk.similarity_topk(x.query, x.reference, int(10 * s)).score,
    "qalign topk": lambda x, s: qk.qalign_attention(
        x.query, x.reference, x.key, x.value, refinement="topk", topk=int(10 * s)
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_change_compile(name):
    call, x = SETTINGS[name], inputs()
    _, compiled = _counted(functools.partial(call, x))
    for setting in (0.2, 0.3, 0.4, 0.5):
        torch.testing.assert_close(compiled(setting), call(x, setting), rtol=1e-5, atol=1e-6)
