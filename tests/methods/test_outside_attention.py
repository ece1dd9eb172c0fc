"""What methods do outside the core of self-attention: module hooks and cross-attention, against the formulas, and gone without a trace afterwards."""

import pytest
import torch

from qalign import BatchLayout, FeatureBank, QAlign, attach
from qalign.methods import CtrlX, StyleAligned
from tests.methods import literal
from tests.methods.test_formulas import LAYOUT, relative_error
from tests.processors.models import make_unet, unet_inputs

INJECTION = CtrlX(structure_layers=(), appearance_layers=())  # nothing but the convolution
OUTSIDE = [INJECTION, StyleAligned()]
COMPILED = [StyleAligned()]


def state_of(unet) -> tuple:
    """Everything that attach may touch."""
    modules = dict(unet.named_modules())
    hooks = {name: (list(module._forward_hooks), list(module._forward_pre_hooks)) for name, module in modules.items()}
    attributes = {name: {key for key in vars(module) if not key.startswith("_forward")} for name, module in modules.items()}
    return {name: id(processor) for name, processor in unet.attn_processors.items()}, hooks, attributes


def outputs_of(unet, name: str) -> list:
    """The outputs of a module, as they come, after whatever hooks are there."""
    seen: list = []
    unet.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output))
    return seen


@torch.no_grad()
@pytest.mark.parametrize("method", OUTSIDE, ids=repr)
def test_everything_is_restored_after_an_exception(method):
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=6)
    stock, before = unet(**inputs).sample, state_of(unet)
    with pytest.raises(ZeroDivisionError):
        with attach(unet, method, layout=LAYOUT, layers="up", steps=(0, 1)):
            assert state_of(unet) != before
            assert not torch.equal(unet(**inputs).sample, stock)
            raise ZeroDivisionError
    assert state_of(unet) == before
    assert torch.equal(unet(**inputs).sample, stock)


@torch.no_grad()
@pytest.mark.parametrize("method", OUTSIDE, ids=repr)
def test_steps_outside_the_window_are_stock_bit_for_bit(method):
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=6)
    stock = unet(**inputs).sample
    with attach(unet, method, layout=LAYOUT, layers="up", steps=(0.5, 1)) as control:
        same = [torch.equal(unet(**inputs).sample, stock) for _ in control.track([0, 1, 2, 3])]
        assert same == [True, True, False, False]
        with pytest.raises(RuntimeError, match="steps: expected a running clock"):
            unet(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("method", COMPILED, ids=repr)
def test_a_compiled_unet_is_one_graph_for_all_steps(method):
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=6)
    timesteps, graphs = torch.tensor([900, 500, 100]), []
    runs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    with attach(unet, method, layout=LAYOUT, layers="up", steps=(0.3, 1)) as control:
        for model in (unet, torch.compile(unet, backend=backend, fullgraph=True)):
            runs.append([model(**inputs | {"timestep": timestep}).sample for timestep in control.track(timesteps)])
    assert len(graphs) == 1
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-4)


def test_a_bank_refuses_what_it_cannot_serve():
    unet, bank = make_unet("small"), FeatureBank("appearance")
    for method in OUTSIDE:
        for wrapped in (bank.record(method), bank.serve(method)):
            with pytest.raises(ValueError, match=rf"method: expected one that acts in self-attention alone, .*, got {type(method).__name__}\("):
                attach(unet, wrapped, layers="up")


def test_a_method_without_any_of_it_installs_no_hook():
    unet = make_unet("small")
    hooks = state_of(unet)[1]
    with attach(unet, QAlign()):
        assert state_of(unet)[1] == hooks


# -- Ctrl-X


@torch.no_grad()
def test_the_convolution_features_of_the_output_are_the_structures_for_the_first_steps():
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=6)
    timesteps = list(range(10))
    stock = outputs_of(unet, "up_blocks.0.resnets.0")
    unet(**inputs)
    unet = make_unet("small")
    with attach(unet, INJECTION, layout=LAYOUT, layers="up") as control:
        seen = outputs_of(unet, "up_blocks.0.resnets.0")
        for _ in control.track(timesteps):
            unet(**inputs)
    injected = literal.injected(stock[0])
    assert [torch.equal(each, injected) for each in seen] == [True] * 6 + [False] * 4
    assert all(torch.equal(each, stock[0]) for each in seen[6:])


@torch.no_grad()
def test_trap_ctrl_x_never_edits_the_unconditional_row():
    """Published rows: [uncond, structure, appearance, cond]."""
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=4)
    stock = unet(**inputs).sample
    layout = BatchLayout("plain", "structure", "appearance", "output", guidance=False)
    with attach(unet, CtrlX(), layout=layout, layers="up", steps=(0, 1)):
        edited = unet(**inputs).sample
    assert [torch.equal(a, b) for a, b in zip(edited, stock)] == [True, True, True, False]


def test_hooks_name_modules_that_are_there():
    with pytest.raises(ValueError, match="hooks: expected names of modules of UNet2DConditionModel, got 'up_blocks.7.resnets.0' from CtrlX"):
        attach(make_unet("small"), CtrlX(structure_convolutions=("up_blocks.7.resnets.0",)), layers="up")


# -- StyleAligned


@torch.no_grad()
def test_every_group_norm_is_shared_over_output_and_reference():
    """Those of residual blocks and conv_norm_out included, each held against the formula on what it is given."""
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=6)
    norms = {name: module for name, module in unet.named_modules() if isinstance(module, torch.nn.GroupNorm)}
    given, seen, stock = {}, {}, {}
    with attach(unet, StyleAligned(), layout=LAYOUT):
        for name, norm in norms.items():

            def keep(module, args, output, name=name):
                given[name], seen[name], stock[name] = args[0], output, module.forward(args[0])

            norm.register_forward_hook(keep)
        unet(**inputs)
    assert set(seen) == set(norms) >= {"conv_norm_out", "mid_block.resnets.0.norm1", "up_blocks.0.attentions.0.norm"}
    for name, norm in norms.items():
        expected = literal.shared_group_norm(norm.double(), given[name].double())
        assert relative_error(seen[name], expected) < 2e-6, name
        assert [torch.equal(a, b) for a, b in zip(seen[name], stock[name])] == [False, True, True] * 2, name


@torch.no_grad()
def test_the_reference_of_a_full_share_without_one_is_the_first_output():
    unet, x = make_unet("small"), unet_inputs(make_unet("small"), batch=6)["sample"].repeat(1, 8, 1, 1)
    norm = unet.conv_norm_out
    with attach(unet, StyleAligned(full_attention_share=True), layout=BatchLayout("output", "output", "output")):
        shared = norm(x)
    norm.double()
    rows = [literal.shared_group_norm(norm, torch.stack([row, x[number // 3 * 3]]).double())[0] for number, row in enumerate(x)]
    assert relative_error(shared, torch.stack(rows)) < 2e-6


@pytest.mark.parametrize(
    ("family", "method", "shared"),
    [
        ("small", StyleAligned(), True),
        ("sdxl", StyleAligned(), False),
        ("sdxl", StyleAligned.real(), True),
        ("small", StyleAligned(share_group_norm=False), False),
    ],
)
def test_group_norms_are_shared_where_they_are_as_published(family, method, shared):
    assert bool(attach(make_unet(family), method).hooks) == shared
