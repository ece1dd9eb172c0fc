"""What methods do outside self-attention: module hooks and cross-attention, against the formulas."""

import dataclasses
import math

import pytest
import torch
from diffusers.models.attention_processor import Attention

from qalign import BatchLayout, FeatureBank, QAlign, Regions, UNetAttnProcessor, attach
from qalign.context.layer_call import ForwardPass, Site
from qalign.methods import BoundedAttention, CtrlX, MasaCtrl, StyleAligned
from qalign.processors.unet import project
from tests.methods import literal
from tests.methods.test_formulas import GRID, LAYOUT, Literal, make_attention, relative_error
from tests.processors.models import SIZE, make_pipe, make_unet, unet_inputs
from tests.processors.test_unet_contract import ip_adapter_weights

INJECTION = CtrlX(structure_layers=(), appearance_layers=())  # nothing but the convolution
PROMPT = {
    "subjects": {1: (1, 2), 2: (2, 5)},
    "filters": (3, 5),
    "eos": 6,
}  # of 7 tokens, one of them of both subjects, one a filter token besides
BOUNDED = BoundedAttention(
    subject_tokens=PROMPT["subjects"], filter_tokens=PROMPT["filters"], eos_token=PROMPT["eos"]
)
AUTOMATIC = MasaCtrl(ref_token_idx=(2,), cur_token_idx=(1, 3))
OUTSIDE = [INJECTION, StyleAligned(), BOUNDED, AUTOMATIC]
COMPILED = [StyleAligned(), BOUNDED, AUTOMATIC]
LABELS = (
    torch.arange(SIZE * SIZE).view(SIZE, SIZE) * 5 % 7 // 2
)  # background, two subjects, and one without words
REGIONS_OF: dict = {BoundedAttention: Regions(structure=LABELS, background=0)}


def state_of(unet) -> tuple:
    """Everything that attach may touch."""
    modules = dict(unet.named_modules())
    hooks = {
        name: (list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in modules.items()
    }
    attributes = {
        name: {key for key in vars(module) if not key.startswith("_forward")}
        for name, module in modules.items()
    }
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
        with attach(
            unet, method, layout=LAYOUT, layers="up", regions=REGIONS_OF.get(type(method)), steps=(0, 1)
        ):
            assert state_of(unet) != before
            assert not torch.equal(unet(**inputs).sample, stock)
            raise ZeroDivisionError
    assert state_of(unet) == before
    assert torch.equal(unet(**inputs).sample, stock)


@torch.no_grad()
@pytest.mark.parametrize("method", OUTSIDE, ids=repr)
def test_steps_outside_the_window_are_bitwise_stock(method):
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=6)
    stock = unet(**inputs).sample
    with attach(
        unet, method, layout=LAYOUT, layers="up", regions=REGIONS_OF.get(type(method)), steps=(0.5, 1)
    ) as control:
        same = [torch.equal(unet(**inputs).sample, stock) for _ in control.track([0, 1, 2, 3])]
        assert same == [True, True, False, False]
        with pytest.raises(RuntimeError, match="steps: expected a running clock"):
            unet(**inputs)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("method", COMPILED, ids=repr)
def test_compiled_unet_is_one_graph_across_steps(method):
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=6)
    timesteps, graphs = torch.tensor([900, 500, 100]), []
    runs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    with attach(
        unet, method, layout=LAYOUT, layers="up", regions=REGIONS_OF.get(type(method)), steps=(0.3, 1)
    ) as control:
        for model in (unet, torch.compile(unet, backend=backend, fullgraph=True)):
            runs.append(
                [model(**inputs | {"timestep": timestep}).sample for timestep in control.track(timesteps)]
            )
    assert len(graphs) == 1
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-4)


def test_a_bank_refuses_what_it_cannot_serve():
    unet, bank = make_unet("small"), FeatureBank("appearance")
    for method in OUTSIDE:
        message = rf"method: expected one that acts in self-attention alone, .*{type(method).__name__}\("
        for wrapped in (bank.record(method), bank.serve(method)):
            with pytest.raises(ValueError, match=message):
                attach(unet, wrapped, layers="up")


def test_method_that_edits_attention_alone_installs_no_hook():
    unet = make_unet("small")
    hooks = state_of(unet)[1]
    with attach(unet, QAlign()):
        assert state_of(unet)[1] == hooks


# -- Ctrl-X


@torch.no_grad()
def test_early_convolution_features_are_those_of_the_structure():
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
    with pytest.raises(
        ValueError,
        match="hooks: expected names of modules of .*, got 'up_blocks.7.resnets.0' from CtrlX",
    ):
        attach(make_unet("small"), CtrlX(structure_convolutions=("up_blocks.7.resnets.0",)), layers="up")


# -- StyleAligned


@torch.no_grad()
def test_every_group_norm_spans_output_and_reference():
    """Also in residual blocks and conv_norm_out; each is compared to the formula on its own input."""
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=6)
    norms = {name: module for name, module in unet.named_modules() if isinstance(module, torch.nn.GroupNorm)}
    given, seen, stock = {}, {}, {}
    with attach(unet, StyleAligned(), layout=LAYOUT):
        for name, norm in norms.items():

            def keep(module, args, output, name=name):
                given[name], seen[name], stock[name] = args[0], output, module.forward(args[0])

            norm.register_forward_hook(keep)
        unet(**inputs)
    assert (
        set(seen)
        == set(norms)
        >= {"conv_norm_out", "mid_block.resnets.0.norm1", "up_blocks.0.attentions.0.norm"}
    )
    for name, norm in norms.items():
        expected = literal.shared_group_norm(norm.double(), given[name].double())
        assert relative_error(seen[name], expected) < 2e-6, name
        assert [torch.equal(a, b) for a, b in zip(seen[name], stock[name])] == [False, True, True] * 2, name


@torch.no_grad()
def test_full_share_defaults_to_the_first_output():
    unet, x = make_unet("small"), unet_inputs(make_unet("small"), batch=6)["sample"].repeat(1, 8, 1, 1)
    norm = unet.conv_norm_out
    with attach(
        unet, StyleAligned(full_attention_share=True), layout=BatchLayout("output", "output", "output")
    ):
        shared = norm(x)
    norm.double()
    rows = [
        literal.shared_group_norm(norm, torch.stack([row, x[number // 3 * 3]]).double())[0]
        for number, row in enumerate(x)
    ]
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
def test_group_norms_are_shared_at_the_published_places(family, method, shared):
    assert bool(attach(make_unet(family), method).hooks) == shared


@pytest.mark.parametrize("level", [0.0, 0.2, 0.5, 0.7, 0.99, 1.0])
def test_level_leaves_the_published_layers_out(level):
    names = [str(place) for place in range(16)]
    few = int((1 - level if level > 0.5 else level) * 16)
    alone = torch.arange(16) % (16 // few) == 0 if few else torch.zeros(16, dtype=torch.bool)
    alone = ~alone if level > 0.5 else alone
    found = StyleAligned(level=level).default_layers(names)
    assert found == [name for name, is_alone in zip(names, alone.tolist()) if not is_alone]


@torch.no_grad()
def test_level_one_shares_group_norms_alone():
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=6)
    outputs = []
    for method in (StyleAligned(level=1.0), StyleAligned(level=1.0, share_group_norm=False)):
        with attach(unet, method, layout=LAYOUT) as control:
            assert not control.layers
            outputs.append(unet(**inputs).sample)
    stock = unet(**inputs).sample
    assert torch.equal(outputs[1], stock) and relative_error(outputs[0], stock) > 1e-3
    with pytest.raises(ValueError, match="^layers: expected at least one name or pattern"):
        attach(unet, StyleAligned(level=1.0), layers=[])


# -- Bounded attention's cross-attention


class LiteralCross:
    """A processor of the literal formula in the conditional output row of two halves of three rows."""

    def __init__(self, formula, **settings):
        self.formula, self.settings = formula, settings

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        rows = [
            literal.plain(*literal.project_cross(attn, *row))
            for row in zip(hidden_states, encoder_hidden_states)
        ]
        rows[3] = self.formula(attn, hidden_states[3], encoder_hidden_states[3], **self.settings)
        return torch.stack([attn.to_out[0](row.transpose(0, 1).flatten(1)) for row in rows])


def cross_attention(unet) -> dict:
    return {name: module for name, module in unet.named_modules() if name.endswith("attn2")}


def wide(inputs: dict) -> dict:
    return {
        name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()
    }


@pytest.fixture
def cross_layer():
    """A cross-attention layer whose logits deviate by about 2, its hidden states and its prompts."""
    torch.manual_seed(5)
    attn = Attention(80, cross_attention_dim=24, heads=2, dim_head=40).eval()
    torch.nn.init.normal_(attn.to_q.weight, std=math.sqrt(2 / 80))
    torch.nn.init.normal_(attn.to_k.weight, std=math.sqrt(2 / 24))
    return attn, torch.randn(6, SIZE * SIZE, 80), torch.randn(6, 7, 24)


@torch.no_grad()
@pytest.mark.parametrize("optimized", [False, True])
def test_bounded_cross_attention_is_the_published_mask(cross_layer, optimized):
    attn, hidden, prompts = cross_layer
    method = dataclasses.replace(BOUNDED, optimized=optimized)
    stock = attn(hidden, prompts)
    attn.set_processor(UNetAttnProcessor(method, LAYOUT, regions=REGIONS_OF[BoundedAttention]))
    actual = attn(hidden, prompts)
    attn.double().set_processor(
        LiteralCross(literal.bounded_cross, labels=LABELS.flatten(), optimized=optimized, **PROMPT)
    )
    expected = attn(hidden.double(), prompts.double())
    assert relative_error(actual, expected) < 2e-6
    assert relative_error(stock[3:4], expected[3:4]) > 1e-2  # it does mask


@torch.no_grad()
def test_bounded_attention_of_a_unet_over_several_steps():
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=6)
    timesteps = torch.tensor([900, 100])
    shipped, expected = inputs["sample"], inputs["sample"].double()
    with attach(unet, BOUNDED, layout=LAYOUT, regions=REGIONS_OF[BoundedAttention]) as control:
        for timestep in control.track(timesteps):
            shipped = shipped - 0.3 * unet(**inputs | {"sample": shipped, "timestep": timestep}).sample
    for name, layer in unet.double().named_modules():
        if name.endswith("attn1"):
            layer.set_processor(Literal(literal.bounded, labels=LABELS.flatten()))
        if name.endswith("attn2"):
            layer.set_processor(LiteralCross(literal.bounded_cross, labels=LABELS.flatten(), **PROMPT))
    for timestep in timesteps:
        expected = expected - 0.3 * unet(**wide(inputs) | {"sample": expected, "timestep": timestep}).sample
    assert relative_error(shipped, expected) < 2e-5


@torch.no_grad()
def test_trap_bounded_leaves_unconditional_cross_attention_unmasked(
    cross_layer,
):
    attn, hidden, prompts = cross_layer
    itself = Attention(80, heads=2, dim_head=40).eval()
    for layer, context, edited in (
        (itself, None, [True, False, False] * 2),
        (attn, prompts, [False, False, False, True, False, False]),
    ):
        stock = layer(hidden, context)
        layer.set_processor(UNetAttnProcessor(BOUNDED, LAYOUT, regions=REGIONS_OF[BoundedAttention]))
        assert [not torch.equal(a, b) for a, b in zip(layer(hidden, context), stock)] == edited


@torch.no_grad()
def test_one_guidance_part_is_the_conditional_one(cross_layer):
    attn, hidden, prompts = cross_layer
    attn.set_processor(UNetAttnProcessor(BOUNDED, LAYOUT, regions=REGIONS_OF[BoundedAttention]))
    torch.testing.assert_close(attn(hidden[3:], prompts[3:]), attn(hidden, prompts)[3:], rtol=0, atol=2e-6)


@torch.no_grad()
def test_padding_that_an_attention_mask_hides_stays_hidden(cross_layer):
    attn, hidden, prompts = cross_layer
    attn.set_processor(UNetAttnProcessor(BOUNDED, LAYOUT, regions=REGIONS_OF[BoundedAttention]))
    padded, mask = (
        torch.cat([prompts, torch.randn(6, 2, 24)], 1),
        torch.tensor([[[0.0] * 7 + [-10000.0] * 2]]).expand(6, -1, -1),
    )
    torch.testing.assert_close(
        attn(hidden, padded, attention_mask=mask), attn(hidden, prompts), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: BoundedAttention(subject_tokens={1: (2,)}),
            "eos_token: expected the place of the prompt's end because subject_tokens",
        ),
        (
            lambda: BoundedAttention(subject_tokens={31: (2,)}, eos_token=4),
            "subject_tokens: expected labels of 0 to 30, got 31",
        ),
        (
            lambda: BoundedAttention(subject_tokens={1: (-2,)}, eos_token=4),
            "subject_tokens, .*: expected places of 0 and more, got -2",
        ),
    ],
)
def test_bounded_settings_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bounded_refuses_prompts_and_regions_that_mismatch(cross_layer):
    attn, hidden, prompts = cross_layer
    for regions, tokens, message in (
        (None, 7, r"regions: expected Regions\(structure=...\) for BoundedAttention, got None"),
        (
            Regions(structure=LABELS, background=1),
            7,
            "subject_tokens: expected labels of subjects, got 1, which is the background's",
        ),
        (REGIONS_OF[BoundedAttention], 6, "subject_tokens, .*: expected places below the prompt's 6, got 6"),
    ):
        attn.set_processor(UNetAttnProcessor(BOUNDED, LAYOUT, regions=regions))
        with pytest.raises(ValueError, match=message):
            attn(hidden, prompts[:, :tokens])


def test_a_loaded_ip_adapter_keeps_its_cross_attention():
    pipe = make_pipe("sd15")
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])
    before = state_of(pipe.unet)
    got = r"got IPAdapterAttnProcessor2_0 on \S+attn2 \(BoundedAttention needs"
    message = rf"cross-attention: expected processors without weights, {got}"
    with pytest.raises(RuntimeError, match=message):
        attach(pipe, BOUNDED).__enter__()
    assert state_of(pipe.unet) == before
    with attach(pipe, BoundedAttention()):
        assert not any(
            isinstance(layer.processor, UNetAttnProcessor) for layer in cross_attention(pipe.unet).values()
        )


# -- MasaCtrl's automatic masks


class LiteralAutomatic:
    """A UNet's attention with MasaCtrl's automatic masks, for rows [output, appearance, structure] x 2."""

    def __init__(self, union: bool, map_tokens: int):
        self.union, self.map_tokens = union, map_tokens
        self.maps: dict[int, list] = {3: [], 4: []}  # of the conditional output and appearance
        self.shares: list[float] = []

    def begin(self, *given):
        self.maps = {3: [], 4: []}

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        if encoder_hidden_states is None:
            rows = self.edited(attn, hidden_states)
        else:
            projected = [
                literal.project_cross(attn, *row) for row in zip(hidden_states, encoder_hidden_states)
            ]
            rows = [literal.plain(*row) for row in projected]
            if hidden_states.shape[1] == self.map_tokens:
                for row, maps in self.maps.items():
                    maps.append(literal.logits(*projected[row][:2]).softmax(-1))
        return torch.stack([attn.to_out[0](row.transpose(0, 1).flatten(1)) for row in rows])

    def edited(self, attn, hidden_states) -> list:
        rows, masks, size = [], None, math.isqrt(hidden_states.shape[1])
        if self.maps[3]:
            chosen = ((self.maps[4], AUTOMATIC.ref_token_idx), (self.maps[3], AUTOMATIC.cur_token_idx))
            masks = [literal.automatic_mask(maps, places, size) for maps, places in chosen]
            self.shares += [mask.double().mean().item() for mask in masks]
        for number, hidden in enumerate(hidden_states):
            if number % 3:
                rows.append(literal.plain(*literal.project(attn, hidden)))
            elif self.union and masks:
                (q, own_k, own_v), (_, k, v) = (
                    literal.project(attn, hidden),
                    literal.project(attn, hidden_states[number + 1]),
                )
                scores = literal.logits(q, torch.cat([k, own_k], 1))
                scores[:, :, : k.shape[1]].masked_fill_(masks[0] != masks[1][:, None], -math.inf)
                rows.append(scores.softmax(-1) @ torch.cat([v, own_v], 1))
            else:
                rows.append(
                    literal.masactrl(attn, *hidden_states[number : number + 3], union=self.union, masks=masks)
                )
        return rows


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "map_tokens", "union"), [("small", 256, False), ("small", 256, True), ("sd15", 64, False)]
)
def test_automatic_masks_of_a_unet_over_several_steps(family, map_tokens, union):
    """From 8 x 8 tokens to 16 x 16 and 4 x 4. The layers before the first map have no masks."""
    unet, inputs = make_unet(family), unet_inputs(make_unet(family), batch=6)
    inputs["encoder_hidden_states"] = 5 * inputs["encoder_hidden_states"]  # maps that are not flat
    method, timesteps = (
        dataclasses.replace(AUTOMATIC, map_tokens=map_tokens, union=union),
        torch.tensor([900, 500, 100]),
    )
    shipped, expected = inputs["sample"], inputs["sample"].double()
    with attach(unet, method, layout=LAYOUT, layers=["down", "mid", "up"], steps=(0, 1)) as control:
        for timestep in control.track(timesteps):
            shipped = shipped - 0.3 * unet(**inputs | {"sample": shipped, "timestep": timestep}).sample
    processor = LiteralAutomatic(union, map_tokens)
    unet.double().register_forward_pre_hook(processor.begin)
    for layer in unet.modules():
        if isinstance(layer, Attention):
            layer.set_processor(processor)
    for timestep in timesteps:
        expected = expected - 0.3 * unet(**wide(inputs) | {"sample": expected, "timestep": timestep}).sample
    assert relative_error(shipped, expected) < 2e-5
    assert any(0.05 < share < 0.95 for share in processor.shares)  # the masks have both sides


@torch.no_grad()
def test_automatic_masks_are_made_anew_in_each_call():
    """After a call that broke off in its middle, too."""
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=6)
    with attach(unet, AUTOMATIC, layout=LAYOUT, layers=["down", "mid", "up"], steps=(0, 1)):
        first = unet(**inputs).sample
        assert torch.equal(unet(**inputs).sample, first)
        handle = unet.up_blocks[0].register_forward_hook(lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            unet(**inputs | {"sample": inputs["sample"].flip(0)})
        handle.remove()
        assert torch.equal(unet(**inputs).sample, first)


@torch.no_grad()
def test_masks_need_maps_of_their_size():
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=6)
    samples = []
    for method in (MasaCtrl(), dataclasses.replace(AUTOMATIC, map_tokens=64), AUTOMATIC):
        with attach(unet, method, layout=LAYOUT, steps=(0, 1)):
            samples.append(unet(**inputs).sample)
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


@torch.no_grad()
def test_trap_masactrl_adds_one_to_binary_masks_alone():
    """The thresholded mask changes nothing when it is added to the logits, as published. Its map would."""
    attn, hidden = make_attention(2, 40)
    attn.double()
    (q, _, _), (_, k, v) = (literal.project(attn, row) for row in hidden[:2].double())
    scores, soft = literal.logits(q, k), torch.linspace(0, 1, k.shape[1], dtype=torch.float64)
    hidden_keys = soft < 0.1
    without, binary, graded = (
        (scores + added.masked_fill(hidden_keys, torch.finfo(scores.dtype).min)).softmax(-1) @ v
        for added in (0 * soft, (soft >= 0.1).double(), soft)
    )
    site = Site(
        LAYOUT, owner=Owner(GRID, 1 - hidden_keys.double(), soft != 0)
    )  # all queries but the first are foreground
    method = dataclasses.replace(AUTOMATIC, map_tokens=k.shape[1])
    qkv = [
        torch.stack(each).float()
        for each in zip(*(literal.project(attn, row) for row in hidden[:3].double()))
    ]
    actual = method.edit(*qkv, site.output_rows(qkv[0]), site.reference_rows(qkv[0]), site)
    for formula, same in ((without, True), (binary, True), (graded, False)):
        assert (relative_error(actual[:, :, 1:], formula[None, :, 1:]) < 2e-6) == same


@torch.no_grad()
def test_source_lacking_a_side_is_attended_whole():
    """The only background token is lost on a coarser grid. The published code attends uniformly there."""
    attn, hidden = make_attention(2, 40)
    height, width = GRID
    qkv = project(attn, hidden[:3, : height * width // 4], None)
    source, target = torch.ones(height * width), (torch.arange(height * width) // 2 % 2).float()
    source[1] = 0
    site, method = (
        Site(LAYOUT, owner=Owner(GRID, source, target)),
        dataclasses.replace(AUTOMATIC, map_tokens=height * width),
    )
    rows = site.output_rows(qkv[0]), site.reference_rows(qkv[0])
    torch.testing.assert_close(
        method.edit(*qkv, *rows, site), MasaCtrl().edit(*qkv, *rows, Site(LAYOUT)), rtol=0, atol=2e-6
    )


@torch.no_grad()
def test_a_flat_map_is_background_everywhere():
    """The published code divides by zero there."""
    attn, hidden = make_attention(2, 40)
    qkv, flat = project(attn, hidden[:3], None), torch.ones(hidden.shape[1])
    site, method = (
        Site(LAYOUT, owner=Owner(GRID, flat, flat)),
        dataclasses.replace(AUTOMATIC, map_tokens=hidden.shape[1]),
    )
    rows = site.output_rows(qkv[0]), site.reference_rows(qkv[0])
    torch.testing.assert_close(
        method.edit(*qkv, *rows, site), MasaCtrl().edit(*qkv, *rows, Site(LAYOUT)), rtol=0, atol=2e-6
    )


class Owner:
    """Of a site, in a call whose one map is given."""

    def __init__(self, grid, source, target):
        self.forward = ForwardPass()
        self.forward.begin(*grid)
        self.forward.kept["up_blocks.1"] = torch.stack([source, target]).float()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ref_token_idx": (1,)},
            r"ref_token_idx, cur_token_idx: expected both or neither, got \(1,\) and \(\)",
        ),
        (
            {"ref_token_idx": (1,), "cur_token_idx": (-1,)},
            r"expected places of 0 and more, got \(1,\) and \(-1,\)",
        ),
    ],
)
def test_masactrl_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MasaCtrl(**settings)


def test_mismatched_token_indices_and_regions_are_refused():
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=6)
    far = MasaCtrl(ref_token_idx=(1,), cur_token_idx=(7,))
    both = {"regions": Regions(appearance=LABELS, structure=LABELS)}
    far_message, both_message = (
        "expected places below the prompt's 7, got 7",
        "regions: expected None, because MasaCtrl",
    )
    for method, options, message in ((far, {}, far_message), (AUTOMATIC, both, both_message)):
        with (
            attach(unet, method, layout=LAYOUT, steps=(0, 1), **options),
            pytest.raises(ValueError, match=message),
        ):
            unet(**inputs)
