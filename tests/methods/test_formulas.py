"""Every method against its published formulas in float64, for a layer and through a small real UNet."""

import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from qalign import BatchLayout, UNetAttnProcessor, attach
from qalign.context.clock import Clock
from qalign.context.layer_call import Site
from qalign.context.outside_graphs import uniform
from qalign.context.regions import Regions
from qalign.methods import (
    BoundedAttention,
    ConsiStory,
    CrossImage,
    CtrlX,
    DreamMatcher,
    EyeForAnEye,
    FreeCustom,
    MasaCtrl,
    QAlign,
    QAlignWarp,
    ReferenceOnly,
    SeAl,
    StoryDiffusion,
    StyleAligned,
    StyleID,
    VisualStylePrompting,
    ZStar,
)
from qalign.processors.unet import project
from tests.methods import literal
from tests.processors.models import make_unet, unet_inputs

GRID = (8, 12)
LAYOUT = BatchLayout("output", "appearance", "structure")
TWO = BatchLayout("output", "appearance", "appearance")
ANYWHERE = ("", "down_blocks", "mid_block", "up_blocks")
LABELS = torch.arange(GRID[0] * GRID[1]).view(GRID) * 7 % 5
MASKS = [(torch.arange(GRID[0] * GRID[1]).view(GRID) * step % 7 > 2).long() for step in (3, 5)]
LARGE = [(torch.arange(16 * 24).view(16, 24) * step % 7 > 2).long() for step in (3, 5)]  # twice the grid
CASES = {
    "qalign": (QAlign(structure_every=0), literal.qalign, {}),
    "qalign plain": (QAlign(structure_every=0, contrast=1.0), literal.qalign, {"contrast": 1.0}),
    "qalign_warp": (QAlignWarp(structure_every=0), literal.qalign_warp, {}),
    "cross_image": (CrossImage(structure_every=0), literal.cross_image, {}),
    "visual_style": (VisualStylePrompting(), literal.visual_style, {}),
    "masactrl": (MasaCtrl(), literal.masactrl, {}),
    "masactrl union": (MasaCtrl(union=True), literal.masactrl, {"union": True}),
    "masactrl masks": (MasaCtrl(), literal.masactrl, {"masks": [mask.flatten().bool() for mask in MASKS]}),
    "masactrl large masks": (
        MasaCtrl(),
        literal.masactrl,
        {"masks": [literal.nearest(mask, GRID).bool() for mask in LARGE]},
    ),
    "style_id": (StyleID(), literal.style_id, {}),
    "style_id settings": (
        StyleID(query_preservation=0.3, temperature=1.0),
        literal.style_id,
        {"gamma": 0.3, "temperature": 1.0},
    ),
    "z_star": (ZStar(), literal.z_star, {}),
    "style_aligned": (StyleAligned(), literal.style_aligned, {}),
    "style_aligned real": (StyleAligned.real(), literal.style_aligned, {"shift": math.log(2)}),
    "style_aligned attention alone": (StyleAligned(share_group_norm=False), literal.style_aligned, {}),
    "style_aligned scale": (
        StyleAligned(shared_score_scale=0.5, adain_values=True),
        literal.style_aligned,
        {"scale": 0.5, "values": True},
    ),
    "style_aligned statistics": (
        StyleAligned(share_attention=False),
        literal.style_aligned,
        {"shared": False},
    ),
    "bounded": (BoundedAttention(), literal.bounded, {"labels": LABELS.flatten()}),
    "seal": (SeAl(), literal.seal, {}),
    "seal add": (SeAl(blend="add", topk=3), literal.seal, {"blend": "add", "top": 3}),
    "seal extrapolate": (
        SeAl(blend="extrapolate", heads="per_head", topk=2),
        literal.seal,
        {"blend": "extrapolate", "top": 2, "joint": False},
    ),
    "seal keys_values": (SeAl(blend="keys_values"), literal.seal, {"blend": "keys_values"}),
    "reference_only": (ReferenceOnly(style_fidelity=0.0), literal.reference_only, {}),
    "eye_for_an_eye": (EyeForAnEye(), literal.eye_for_an_eye, {}),
    "eye_for_an_eye masks": (
        EyeForAnEye(),
        literal.eye_for_an_eye,
        {"masks": [mask.flatten().bool() for mask in MASKS]},
    ),
    "ctrl_x": (CtrlX(structure_layers=ANYWHERE, appearance_layers=ANYWHERE), literal.ctrl_x, {}),
    "ctrl_x structure": (
        CtrlX(structure_layers=ANYWHERE, appearance_layers=()),
        literal.ctrl_x,
        {"appearance": False},
    ),
    "ctrl_x appearance": (
        CtrlX(structure_layers=(), appearance_layers=ANYWHERE, structure_convolutions=()),
        literal.ctrl_x,
        {"structure": False},
    ),
    "free_custom two": (
        FreeCustom(style_fidelity=0.0, mask_weights=(1.0, 2.0)),
        literal.free_custom,
        {"weights": (1.0, 2.0)},
    ),
    "free_custom masks": (
        FreeCustom(style_fidelity=0.0),
        literal.free_custom,
        {"weights": (3.0, 3.0), "masks": [mask.flatten() for mask in MASKS]},
    ),
    "free_custom large masks": (
        FreeCustom(style_fidelity=0.0),
        literal.free_custom,
        {"weights": (3.0, 3.0), "masks": [literal.nearest(mask, GRID) for mask in LARGE]},
    ),
    "dream_matcher": (DreamMatcher(size=GRID), literal.dream_matcher, {"grid": GRID}),
    "dream_matcher mask": (
        DreamMatcher(),
        literal.dream_matcher,
        {"grid": GRID, "foreground": MASKS[1].flatten()},
    ),
    "dream_matcher labels": (
        DreamMatcher(),
        literal.dream_matcher,
        {"grid": GRID, "foreground": LABELS.flatten(), "labels": [MASKS[0].flatten() + 1, LABELS.flatten()]},
    ),
    "consistory": (ConsiStory(dropout=0.0), literal.consistory, {}),
    "consistory mask": (ConsiStory(dropout=0.0), literal.consistory, {"subject": MASKS[0].flatten().bool()}),
}
NEUTRAL = [
    SeAl(strength=(0.0, 0.0)),
    SeAl(threshold=(2.0, 2.0)),
    CtrlX(structure_layers=(), appearance_layers=()),
]
REGIONS = {
    "masactrl masks": Regions(appearance=MASKS[0], structure=MASKS[1]),
    "masactrl large masks": Regions(appearance=LARGE[0], structure=LARGE[1]),
    "eye_for_an_eye masks": Regions(appearance=MASKS[0], structure=MASKS[1], background=0),
    "free_custom large masks": Regions(appearance=LARGE),
    "bounded": Regions(structure=LABELS, background=0),
    "free_custom masks": Regions(appearance=MASKS),
    "dream_matcher mask": Regions(structure=MASKS[1]),
    "dream_matcher labels": Regions(appearance=MASKS[0] + 1, structure=LABELS),
    "consistory mask": Regions(appearance=MASKS[0], structure=MASKS[1]),
}


LAYOUTS = {name: TWO for name in CASES if name.startswith("free_custom")}


def make_attention(heads: int, head_dim: int) -> tuple[Attention, Tensor]:
    """Random features whose logits have a standard deviation of about 2."""
    torch.manual_seed(5)
    width = heads * head_dim
    attn = Attention(width, heads=heads, dim_head=head_dim).eval()
    for layer in (attn.to_q, attn.to_k):
        torch.nn.init.normal_(layer.weight, std=math.sqrt(2 / width))
    return attn, torch.randn(6, GRID[0] * GRID[1], width)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest of any batch row."""
    return (
        ((actual.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().item()
    )


class Literal:
    """An attention processor of a literal formula, for rows [output, appearance, structure] of each half."""

    def __init__(self, formula, **settings):
        self.formula, self.settings = formula, settings

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        rows = []
        for number, hidden in enumerate(hidden_states):
            if number % 3 == 0:
                edited = self.formula(attn, *hidden_states[number : number + 3], **self.settings)
            else:
                edited = literal.plain(*literal.project(attn, hidden))
            rows.append(attn.to_out[0](edited.transpose(0, 1).flatten(1)))
        return torch.stack(rows)


def make_literal_outside_attention(unet, method) -> None:
    """Replace the modules that the method acts on besides by the literal formula."""
    for name in getattr(method, "structure_convolutions", ()):
        unet.get_submodule(name).register_forward_hook(
            lambda module, inputs, output: literal.injected(output)
        )
    if getattr(method, "share_group_norm", False) is not False:
        for module in unet.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.forward = functools.partial(literal.shared_group_norm, module)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 40), (4, 64)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_the_published_formula(case, shape):
    method, formula, settings = CASES[case]
    attn, hidden = make_attention(*shape)
    attn.set_processor(UNetAttnProcessor(method, LAYOUTS.get(case, LAYOUT), regions=REGIONS.get(case)))
    actual = attn(hidden)
    attn.double().set_processor(Literal(formula, **settings))
    expected = attn(hidden.double())
    assert relative_error(actual, expected) < 2e-6
    stock = torch.stack(
        [
            attn.to_out[0](literal.plain(*literal.project(attn, row)).transpose(0, 1).flatten(1))
            for row in hidden.double()
        ]
    )
    assert relative_error(stock[[0, 3]], expected[[0, 3]]) > 1e-2  # it does edit


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("case", [name for name in CASES if name not in REGIONS])
def test_a_unet_over_several_steps(case):
    """Three calls of one UNet with every self-attention layer edited, one after another on their results."""
    method, formula, settings = CASES[case]
    if isinstance(method, SeAl):
        settings = {"tau": 0.15, **settings}
    if isinstance(method, DreamMatcher):
        method, settings = replace(method, size=None), settings | {"grid": None}
    unet = make_unet("small")
    inputs = unet_inputs(unet, batch=6)
    shipped, wide = inputs["sample"], inputs["sample"].double()
    layers = [name for name, module in unet.named_modules() if name.endswith("attn1")]
    with attach(unet, method, layout=LAYOUTS.get(case, LAYOUT), layers=layers, steps=(0, 1)) as control:
        for timestep in control.track(torch.tensor([900, 500, 100])):
            shipped = shipped - 0.3 * unet(**inputs | {"sample": shipped, "timestep": timestep}).sample
    unet.double()
    for name in layers:
        unet.get_submodule(name).set_processor(Literal(formula, **settings))
    make_literal_outside_attention(unet, method)
    wide_inputs = {
        name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()
    }
    for number, timestep in enumerate(torch.tensor([900, 500, 100])):
        if formula is literal.eye_for_an_eye:
            for name in layers:
                unet.get_submodule(name).processor.settings = {
                    "structure_step": method.takes_structure(number, 3)
                }
        wide = wide - 0.3 * unet(**wide_inputs | {"sample": wide, "timestep": timestep}).sample
    assert relative_error(shipped, wide) < 2e-5


@torch.no_grad()
def test_full_share_attends_every_output_of_its_part():
    attn, hidden = make_attention(2, 40)
    attn.set_processor(
        UNetAttnProcessor(StyleAligned(full_attention_share=True), BatchLayout("output", "output", "output"))
    )
    actual = attn(hidden)
    attn.double()
    projected = [literal.project(attn, row) for row in hidden.double()]
    for part in (0, 3):
        k, v = (torch.cat([row[place] for row in projected[part : part + 3]], 1) for place in (1, 2))
        expected = torch.stack(
            [
                attn.to_out[0](literal.plain(q, k, v).transpose(0, 1).flatten(1))
                for q, _, _ in projected[part : part + 3]
            ]
        )
        assert relative_error(actual[part : part + 3], expected) < 2e-6


@torch.no_grad()
def test_seal_moves_between_the_ends_of_its_schedules():
    attn, hidden = make_attention(2, 40)
    method, clock = SeAl(threshold=(0.9, 0.05), strength=(1.0, 5.0)), Clock()
    attn.set_processor(UNetAttnProcessor(method, LAYOUT, clock=clock))
    outputs = []
    for step in (0, 2, 4):
        clock.set(step, 5)
        outputs.append(attn(hidden))
    attn.double()
    for actual, tau, delta in zip(outputs, (0.9, 0.475, 0.05), (1.0, 3.0, 5.0)):
        attn.set_processor(Literal(literal.seal, tau=tau, delta=delta))
        assert relative_error(actual, attn(hidden.double())) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [SeAl(strength=(0.0, 0.0)), SeAl(threshold=(2.0, 2.0)), CtrlX(structure_layers=(), appearance_layers=())],
    ids=repr,
)
def test_neutral_settings_are_stock_bit_for_bit(method):
    attn, hidden = make_attention(2, 40)
    stock = attn(hidden)
    attn.set_processor(UNetAttnProcessor(method, LAYOUT))
    assert torch.equal(attn(hidden), stock)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_other_rows_and_idle_steps_are_bitwise_stock(case):
    method = CASES[case][0]
    attn, hidden = make_attention(2, 40)
    stock = attn(hidden)
    clock = Clock((0.5, 1.0))
    attn.set_processor(
        UNetAttnProcessor(method, LAYOUTS.get(case, LAYOUT), clock=clock, regions=REGIONS.get(case))
    )
    clock.set(7, 10)
    edited = attn(hidden)
    assert [torch.equal(a, b) for a, b in zip(edited, stock)] == [False, True, True] * 2
    clock.set(2, 10)
    assert torch.equal(attn(hidden), stock)


# -- the traps of these methods


@torch.no_grad()
def test_trap_style_aligned_scales_only_the_reference_copy():
    """With a = 0 the reference's logits are all b. A very low b leaves only the own keys, after AdaIN."""
    attn, hidden = make_attention(2, 40)
    attn.set_processor(
        UNetAttnProcessor(StyleAligned(shared_score_scale=0.0, shared_score_shift=-1e4), LAYOUT)
    )
    actual = attn(hidden)
    attn.double()
    (q, k, v), (ref_q, ref_k, _) = (literal.project(attn, row) for row in hidden[:2].double())
    expected = literal.plain(literal.adain(q, ref_q), literal.adain(k, ref_k), v)
    assert relative_error(actual[:1], attn.to_out[0](expected.transpose(0, 1).flatten(1))[None]) < 2e-6


@torch.no_grad()
def test_trap_shift_ln_2_is_the_reference_twice():
    attn, hidden = make_attention(2, 40)
    settings = {"adain_queries": False, "adain_keys": False}
    attn.set_processor(UNetAttnProcessor(StyleAligned(shared_score_shift=math.log(2), **settings), LAYOUT))
    actual = attn(hidden)[:1]
    attn.double()
    (q, k, v), (_, ref_k, ref_v) = (literal.project(attn, row) for row in hidden[:2].double())
    twice = literal.plain(q, torch.cat([k, ref_k, ref_k], 1), torch.cat([v, ref_v, ref_v], 1))
    assert relative_error(actual, attn.to_out[0](twice.transpose(0, 1).flatten(1))[None]) < 2e-6


@torch.no_grad()
def test_trap_masactrl_without_source_foreground_attends_everything():
    """The published lowest number gives uniform attention there. Here it is neither NaN nor uniform."""
    attn, hidden = make_attention(2, 40)
    nothing, everything = torch.zeros(GRID, dtype=torch.long), torch.ones(GRID, dtype=torch.long)
    attn.set_processor(
        UNetAttnProcessor(MasaCtrl(), LAYOUT, regions=Regions(appearance=nothing, structure=everything))
    )
    masked = attn(hidden)
    attn.set_processor(UNetAttnProcessor(MasaCtrl(), LAYOUT))
    torch.testing.assert_close(masked, attn(hidden), rtol=0, atol=2e-6)


@torch.no_grad()
def test_trap_ctrl_x_adds_nothing_to_the_deviation():
    """Features scaled by 1/1000 scale the statistics. An eps of 1e-5 in the variance would be visible."""
    attn, hidden = make_attention(2, 40)
    method, site = CtrlX(structure_layers=(), appearance_layers=ANYWHERE), Site(LAYOUT)
    small, large = (
        method.prepare(x, lambda each: project(attn, each, None), site) for x in (hidden * 1e-3, hidden)
    )
    torch.testing.assert_close(small * 1e3, large, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_trap_seal_with_one_key_has_no_softmax():
    attn, hidden = make_attention(2, 40)
    attn.set_processor(
        UNetAttnProcessor(SeAl(threshold=(-1.0, -1.0), strength=(1e9, 1e9), heads="per_head"), LAYOUT)
    )
    actual = attn(hidden)[:1]
    attn.double()
    (q, _, _), (_, k, v) = (literal.project(attn, row) for row in hidden[:2].double())
    best = ((q / q.norm(dim=-1, keepdim=True)) @ (k / k.norm(dim=-1, keepdim=True)).mT).argmax(-1)
    gathered = v.gather(1, best.unsqueeze(-1).expand_as(v))
    assert relative_error(actual, attn.to_out[0](gathered.transpose(0, 1).flatten(1))[None]) < 2e-6


@torch.no_grad()
def test_reference_only_blends_the_unconditional_half_alone():
    attn, hidden = make_attention(2, 40)
    attn.set_processor(UNetAttnProcessor(ReferenceOnly(style_fidelity=0.7), LAYOUT))
    actual = attn(hidden)[[0, 3]]
    attn.double()
    rows = [
        literal.reference_only(attn, *hidden[first : first + 3].double(), fidelity=fidelity)
        for first, fidelity in ((0, 0.7), (3, 0.0))
    ]
    expected = torch.stack([attn.to_out[0](row.transpose(0, 1).flatten(1)) for row in rows])
    assert relative_error(actual, expected) < 2e-6


@torch.no_grad()
def test_story_diffusion_sees_own_and_others_drawn_tokens():
    attn, hidden = make_attention(2, 40)
    method = StoryDiffusion(skip=(0.0, 0.0), rate=0.4, seed=3)
    attn.set_processor(UNetAttnProcessor(method, BatchLayout("output", "output", "output")))
    actual = attn(hidden)
    seen = uniform(hidden.shape[1], method.seed, 0, "") < 0.4
    assert 0.3 < seen.float().mean() < 0.5
    attn.double()
    projected = [literal.project(attn, row) for row in hidden.double()]
    for part in (0, 3):
        for row in range(3):
            kept = [
                projected[part + other] if other == row else [x[:, seen] for x in projected[part + other]]
                for other in range(3)
            ]
            k, v = (torch.cat([each[place] for each in kept], 1) for place in (1, 2))
            expected = literal.plain(projected[part + row][0], k, v)
            assert (
                relative_error(
                    actual[part + row][None], attn.to_out[0](expected.transpose(0, 1).flatten(1))[None]
                )
                < 2e-6
            )


@torch.no_grad()
def test_story_diffusion_skips_layers_and_redraws_each_step():
    method = StoryDiffusion(skip=(0.3, 0.3))

    def left_out(step):
        sites = (
            SimpleNamespace(position=torch.tensor([step, 40]), layer=f"up_blocks.{n}") for n in range(25)
        )
        return torch.stack([method._left_out(site) for site in sites])

    skipped = torch.stack([left_out(step) for step in range(40)])
    assert 0.26 < skipped.float().mean() < 0.34
    assert torch.equal(skipped[3], left_out(3)) and not torch.equal(skipped[3], skipped[4])
