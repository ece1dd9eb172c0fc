"""The output row against the formulas written out, with every map in memory; the truth is float64."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from qalign import (
    BatchLayout,
    CrossImage,
    CrossImageAttnProcessor,
    QAlign,
    QAlignAttnProcessor,
    QAlignWarp,
    UNetAttnProcessor,
)
from qalign.context.layer_call import Site
from qalign_kernels import use_backend
from qalign_kernels.testing import judge
from tests.processors.models import make_pipe, make_unet, self_attention, unet_inputs

TOKENS = 96
SHAPES = {"sd15": (8, 40), "sd21": (2, 64), "sdxl": (4, 64), "coarse": (2, 160)}
PAPER = [
    QAlign(
        **{
            "refinement": "rearranged",
            "aligned": "output",
            "similarity": "cosine",
            "heads": "joint",
            **settings,
        }
    )
    for settings in ({}, {"contrast": 1.0}, {"similarity": "dot"})
]
ALIGNED = [
    QAlign(aligned="structure"),
    QAlign(aligned="both"),
    QAlign(aligned="both", heads="per_head", refinement="none"),
    QAlign(aligned="both", refinement="warped_output"),
    QAlignWarp(),
    QAlignWarp(aligned="output"),
    QAlignWarp(aligned="structure"),
    QAlignWarp(similarity="dot"),
]


def make_attention(heads: int, head_dim: int) -> tuple[Attention, Tensor]:
    torch.manual_seed(11)
    attn = Attention(heads * head_dim, heads=heads, dim_head=head_dim).eval()
    return attn, torch.randn(6, TOKENS, heads * head_dim)


def formula(attn: Attention, hidden: Tensor, method: CrossImage, row: int, reference: int) -> Tensor:
    """The layer's output for `row`, reading `reference`: [N, C]."""
    split = {
        part: getattr(attn, f"to_{part}")(hidden).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for part in "qkv"
    }
    q, k, v = split["q"][row], split["k"][reference], split["v"][reference]
    if isinstance(method, QAlign):
        aligned = {"output": [row], "structure": [row + 2], "both": [row, row + 2]}[method.aligned]
        match = (
            sum(similarity(split["q"][one], split["q"][reference], method) for one in aligned)
            .argmax(-1)
            .expand(attn.heads, -1)
        )
        if method.refinement == "warped_output":
            own = (split["q"][reference] @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
            return attn.to_out[0](pick(own, match).transpose(0, 1).flatten(1))
        k, v = pick(k, match), pick(v, match)
        if method.refinement == "none":
            return attn.to_out[0](v.transpose(0, 1).flatten(1))
    p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    mean = p.mean(-1, keepdim=True)
    p = ((p - mean) * method.contrast + mean).clamp(0, 1)
    return attn.to_out[0]((p @ v).transpose(0, 1).flatten(1))


def similarity(one: Tensor, two: Tensor, method: QAlign) -> Tensor:
    """Of queries [H, N, d]: one map [1, N, N] for all heads, or [H, N, N]."""
    if method.heads == "joint":
        one, two = (x.transpose(0, 1).flatten(1).unsqueeze(0) for x in (one, two))
    if method.similarity == "cosine":
        one, two = one / one.norm(dim=-1, keepdim=True), two / two.norm(dim=-1, keepdim=True)
    return one @ two.mT


def pick(x: Tensor, match: Tensor) -> Tensor:
    """The tokens of [H, N, d] that `match` [H, N] names."""
    return x.take_along_dim(match.unsqueeze(-1), dim=1)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [*PAPER, *ALIGNED, CrossImage(), CrossImage(contrast=1.0)], ids=repr)
def test_output_rows_are_the_formula(method, shape) -> None:
    attn, hidden = make_attention(*SHAPES[shape])
    same = {row: formula(attn, hidden, method, row, row + 1) for row in (0, 3)}
    attn.set_processor(UNetAttnProcessor(method, BatchLayout("output", "appearance", "structure")))
    actual = attn(hidden)
    attn.double()
    for row, expected in same.items():
        truth = formula(attn, hidden.double(), method, row, row + 1)
        verdict = judge(actual[row], expected, truth, reduction=TOKENS + hidden.shape[-1])
        assert verdict.passed, verdict


@torch.no_grad()
@pytest.mark.parametrize(
    "refinement", ["rearranged", "guided", "topk", "warped_values", "warped_output", "soft", "none"]
)
def test_every_refinement_passes_through(refinement) -> None:
    attn, hidden = make_attention(2, 40)
    attn.set_processor(QAlignAttnProcessor(method=QAlign(refinement=refinement, aligned="both")))
    actual = attn(hidden)
    with use_backend("reference"):
        same, truth = attn(hidden), attn.double()(hidden.double())
    assert judge(actual, same, truth, reduction=TOKENS + hidden.shape[-1]).passed
    attn.float().set_processor(CrossImageAttnProcessor())
    assert not torch.allclose(attn(hidden)[0], actual[0], atol=1e-4)


def test_qalign_by_default_is_the_paper() -> None:
    assert QAlign() == PAPER[0]
    assert QAlignAttnProcessor().method == PAPER[0]
    assert UNetAttnProcessor(QAlignWarp()).method.aligned == "both"


@torch.no_grad()
@pytest.mark.parametrize("aligned", ["output", "structure", "both"])
def test_warp_shares_the_appearance_row(aligned, monkeypatch) -> None:
    """The gathered row is what the op computes anew, and the op is not called for it."""
    attn, hidden = make_attention(2, 40)
    attn.set_processor(UNetAttnProcessor(QAlign(refinement="warped_output", aligned=aligned)))
    anew = attn(hidden)
    monkeypatch.setattr("qalign.methods.qalign.qalign_attention", None)
    attn.set_processor(UNetAttnProcessor(QAlignWarp(aligned=aligned)))
    torch.testing.assert_close(attn(hidden), anew)


@pytest.mark.parametrize("setting", ["refinement", "topk", "strength", "contrast"])
def test_warp_has_no_setting_that_changes_nothing(setting) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{setting}'"):
        QAlignWarp(**{setting: getattr(QAlign(), setting)})


@torch.no_grad()
def test_reading_a_self_copy_neutrally_is_stock() -> None:
    attn, hidden = make_attention(2, 40)
    hidden[1] = hidden[0]
    stock, truth = attn(hidden[:3]), attn.double()(hidden[:3].double())
    for method in (CrossImage(contrast=1.0), PAPER[1]):
        attn.float().set_processor(UNetAttnProcessor(method))
        assert judge(attn(hidden[:3]), stock, truth, reduction=TOKENS + hidden.shape[-1]).passed


@torch.no_grad()
def test_each_part_and_image_reads_its_own_reference() -> None:
    attn, hidden = make_attention(2, 40)
    layout = BatchLayout("output", "appearance", images_per_prompt=3)
    attn.set_processor(QAlignAttnProcessor(layout=layout))
    together = attn(hidden)
    attn.set_processor(QAlignAttnProcessor(layout=BatchLayout("output", "appearance")))
    for image in range(3):
        alone = attn(hidden[[image, image + 3]])
        torch.testing.assert_close(together[[image, image + 3]], alone)


@torch.no_grad()
def test_only_matched_reference_tokens_reach_the_output() -> None:
    """An unmatched reference token may hold anything. Cross-Image attention would pass it on."""
    generator = torch.Generator().manual_seed(12)
    q, k, v = torch.randn(3, 2, 2, 32, 16, generator=generator)
    q[0] = q[1, :, :8].repeat(1, 4, 1)  # the output's queries are copies of the reference's first eight
    site = Site(BatchLayout("output", "appearance"))
    changed = v.clone()
    changed[1, :, 8:] = 100.0
    assert torch.equal(PAPER[0].attend(q, k, v, site)[0], PAPER[0].attend(q, k, changed, site)[0])
    assert not torch.equal(CrossImage().attend(q, k, v, site)[0], CrossImage().attend(q, k, changed, site)[0])


@torch.no_grad()
def test_an_attached_layer_leaves_the_others_alone() -> None:
    from qalign import attach

    unet = make_unet("sd15")
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        m.register_forward_hook(lambda m, i, o, n=n: seen.setdefault(n, []).append(o))
        for n, m in self_attention(unet).items()
    ]
    unet(**unet_inputs(unet))
    with attach(unet, QAlign(), layers="up_blocks.2.attentions.0"):
        unet(**unet_inputs(unet))
    for hook in hooks:
        hook.remove()
    order = list(seen)
    first = order.index("up_blocks.2.attentions.0.transformer_blocks.0.attn1")
    for position, name in enumerate(order):
        stock, edited = seen[name]
        assert torch.equal(stock, edited) == (position < first)
        assert torch.equal(stock[1:], edited[1:])


@pytest.mark.slow
def test_compiled_unet_is_one_graph_across_steps() -> None:
    from qalign import attach
    from tests.processors.models import generate

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe = make_pipe("small")
    control = attach(pipe, QAlign(), steps=(0.2, 0.8))
    with control:
        eager = generate(pipe, steps=5)
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager", fullgraph=True)
    with control:
        compiled = generate(pipe, steps=5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
