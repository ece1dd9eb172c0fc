"""The drop-in contract of diffusers' attention processors, one test for each promise.

Every processor keeps every promise on every family of UNets.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import accelerate
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    XFormersAttnProcessor,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qalign import (
    BatchLayout,
    CrossImage,
    CrossImageAttnProcessor,
    QAlign,
    QAlignAttnProcessor,
    UNetAttnProcessor,
    attach,
)
from qalign_kernels.testing import judge
from tests.processors.models import (
    FAMILIES,
    PROMPTS,
    generate,
    make_pipe,
    make_unet,
    self_attention,
    unet_inputs,
)

PROCESSORS = {"qalign": (QAlignAttnProcessor, QAlign), "cross_image": (CrossImageAttnProcessor, CrossImage)}


@dataclass
class Case:
    """A processor class, its method and a family of UNets."""

    processor: type[UNetAttnProcessor]
    method: type
    family: str
    seed: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(7))

    def tokens(self, batch: int = 3, tokens: int = 64, channels: int = 32) -> Tensor:
        return torch.randn(batch, tokens, channels, generator=self.seed)


@pytest.fixture(params=[f"{name}-{family}" for name in PROCESSORS for family in FAMILIES])
def case(request: pytest.FixtureRequest) -> Case:
    name, family = request.param.split("-")
    return Case(*PROCESSORS[name], family)


ANY_FAMILY = pytest.mark.parametrize("case", [f"{name}-sd15" for name in PROCESSORS], indirect=True)


def run(unet: nn.Module, **changes) -> Tensor:
    with torch.no_grad():
        return unet(**{**unet_inputs(unet), **changes}).sample


def make_attention(**settings) -> Attention:
    torch.manual_seed(5)
    return Attention(**{"query_dim": 32, "heads": 2, "dim_head": 16, "bias": True, **settings}).eval()


def compare(
    attn: Attention, stock: object, ours: object, *inputs: Tensor | None, **named: Tensor
) -> tuple[Tensor, Tensor]:
    results = []
    for processor in (stock, ours):
        attn.set_processor(processor)
        with torch.no_grad():
            results.append(attn(*inputs, **named))
    return results[0], results[1]


def only_output_changes(stock: Tensor, edited: Tensor, outputs: tuple[int, ...] = (0,)) -> None:
    changed = [not torch.equal(a, b) for a, b in zip(stock, edited)]
    assert changed == [row in outputs for row in range(len(stock))]
    assert edited.isfinite().all()


AROUND_THE_CORE = {
    "plain": {},
    "rescaled": {
        "residual_connection": True,
        "rescale_output_factor": 1.5,
        "norm_num_groups": 8,
        "upcast_softmax": True,
    },
    "spatial_norm": {"spatial_norm_dim": 4, "residual_connection": True},
    "layer_norm": {"qk_norm": "layer_norm", "out_bias": False, "bias": False},
    "rms_norm": {"qk_norm": "rms_norm", "dropout": 0.5},
    "cross_layer_norm": {"cross_attention_dim": 24, "cross_attention_norm": "layer_norm"},
    "cross_group_norm": {
        "cross_attention_dim": 24,
        "cross_attention_norm": "group_norm",
        "cross_attention_norm_num_groups": 4,
    },
}


def test_stock_is_reproduced_around_the_core(case: Case) -> None:
    for name, settings in AROUND_THE_CORE.items():
        attn = make_attention(**settings)
        four = torch.randn(3, 32, 8, 8, generator=case.seed)
        context = case.tokens(tokens=7, channels=24) if "cross_attention_dim" in settings else None
        named = {"temb": torch.randn(3, 4, 4, 4, generator=case.seed)} if name == "spatial_norm" else {}
        for hidden in [four] if name == "spatial_norm" else [four, case.tokens()]:
            stock, neutral = compare(
                attn, AttnProcessor2_0(), case.processor(method=None), hidden, context, **named
            )
            assert torch.equal(stock, neutral), name
            stock, edited = compare(attn, AttnProcessor2_0(), case.processor(), hidden, context, **named)
            only_output_changes(stock, edited, () if context is not None else (0,))
    pipe = make_pipe(case.family)
    stock = generate(pipe)
    pipe.unet.set_attn_processor(case.processor(layout=BatchLayout("plain", "plain", "plain")))
    assert torch.equal(generate(pipe), stock)


@ANY_FAMILY
def test_scale_and_upcast_are_those_of_the_layer(case: Case) -> None:
    unscaled = make_attention(scale_qk=False)
    hidden = case.tokens()
    formula, ours = compare(unscaled, AttnProcessor(), case.processor(method=None), hidden)
    truth, _ = compare(
        make_attention(scale_qk=False).double(), AttnProcessor(), AttnProcessor(), hidden.double()
    )
    assert judge(ours, formula, truth, 64 + 32).passed
    scaled = compare(make_attention(), AttnProcessor2_0(), case.processor(), hidden)[1]
    assert not torch.allclose(
        compare(unscaled, AttnProcessor(), case.processor(), hidden)[1][0], scaled[0], atol=1e-3
    )
    for dtype in (torch.float16, torch.bfloat16):
        attn = make_attention(upcast_attention=True, upcast_softmax=True).to(dtype)
        attn.to_q.weight.data *= 1000
        attn.to_k.weight.data *= 1000  # q·k beyond the largest float16
        stock, edited = compare(attn, AttnProcessor2_0(), case.processor(), hidden.to(dtype))
        assert torch.equal(stock[1:], edited[1:]) and edited.isfinite().all()
        assert torch.equal(
            stock, compare(attn, AttnProcessor2_0(), case.processor(method=None), hidden.to(dtype))[1]
        )


@ANY_FAMILY
def test_attention_mask_hides_reference_keys_too(case: Case) -> None:
    attn, hidden = make_attention(), case.tokens()
    mask = torch.zeros(3, 1, 64)
    mask[:, :, 48:] = -10000.0
    stock, edited = compare(attn, AttnProcessor2_0(), case.processor(), hidden, attention_mask=mask)
    only_output_changes(stock, edited)
    assert torch.equal(
        stock, compare(attn, AttnProcessor2_0(), case.processor(method=None), hidden, attention_mask=mask)[1]
    )
    other_keys = torch.cat(
        [hidden[:1], hidden[1:2, :48].repeat(1, 2, 1)[:, :64], hidden[2:]]
    )  # of the appearance, where the mask hides them
    shorter = compare(attn, AttnProcessor2_0(), case.processor(), other_keys, attention_mask=mask)[1]
    assert torch.equal(shorter[0], edited[0]), "a hidden key reaches the output row"
    per_head = mask.repeat_interleave(2, dim=0)
    assert torch.equal(
        stock,
        compare(attn, AttnProcessor2_0(), case.processor(method=None), hidden, attention_mask=per_head)[1],
    )
    with pytest.raises(
        ValueError, match=r"attention_mask: expected a key mask \[B, 1, N\].*got \[3, 2, 1, 64\]"
    ):
        compare(attn, AttnProcessor2_0(), case.processor(), hidden, attention_mask=per_head)

    seen = []

    def spy(*args, **kwargs):
        seen.append(kwargs["attn_mask"].shape)
        return original(*args, **kwargs)

    original = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        attn(hidden, attention_mask=mask)
    assert seen == [(2, 1, 1, 64)]


def test_signature_is_stock_and_draws_no_warning(case: Case) -> None:
    parameters = inspect.signature(case.processor.__call__).parameters
    assert list(parameters) == [
        "self",
        "attn",
        "hidden_states",
        "encoder_hidden_states",
        "attention_mask",
        "temb",
    ]
    assert all(parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in parameters.values())
    warnings: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = warnings.append
    logger = logging.getLogger("diffusers.models.attention_processor")
    pipe = make_pipe(case.family)
    logger.addHandler(handler)
    try:
        with attach(pipe, case.method()):
            generate(pipe, cross_attention_kwargs={"ip_adapter_masks": None})
    finally:
        logger.removeHandler(handler)
    assert not warnings


@pytest.mark.slow
def test_ip_adapter_may_recreate_the_processors(case: Case) -> None:
    assert type(case.processor()) is case.processor
    pipe = make_pipe(case.family)
    before = generate(pipe)
    with attach(pipe, case.method()):
        pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])
        with pytest.raises(
            RuntimeError,
            match=r"expected UNetAttnProcessor on \d+ attached layers, .*: attach after load_ip_adapter",
        ):
            generate(pipe, ip_adapter_image_embeds=[torch.zeros(6, 1, 8)])
    with attach(pipe, case.method()):
        pipe.unload_ip_adapter()
        with pytest.raises(RuntimeError, match="attach after load_ip_adapter or unload_ip_adapter"):
            generate(pipe)
    assert torch.equal(generate(pipe), before)

    pipe.unet.set_attn_processor(case.processor())
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])
    assert {type(attn.processor) for attn in self_attention(pipe.unet).values()} == {case.processor}
    embeds = [torch.randn(6, 1, 8, generator=case.seed)]
    dropped_in = generate(pipe, ip_adapter_image_embeds=embeds)
    for attn in self_attention(pipe.unet).values():
        attn.set_processor(AttnProcessor2_0())
    stock = generate(pipe, ip_adapter_image_embeds=embeds)
    assert not torch.equal(stock, before)
    only_output_changes(stock, dropped_in)
    with attach(pipe, case.method()):
        cross = [module.processor for name, module in pipe.unet.named_modules() if name.endswith("attn2")]
        assert cross and all(type(processor) is IPAdapterAttnProcessor2_0 for processor in cross)
        only_output_changes(stock, generate(pipe, ip_adapter_image_embeds=embeds))
    assert torch.equal(generate(pipe, ip_adapter_image_embeds=embeds), stock)
    pipe.unet.set_attn_processor(case.processor())
    with pytest.raises(TypeError, match="encoder_hidden_states: expected a tensor, got a tuple"):
        generate(pipe, ip_adapter_image_embeds=embeds)


def ip_adapter_weights(unet: nn.Module) -> dict:
    """The state dict of a small IP-Adapter, as its files are laid out."""
    torch.manual_seed(6)
    cross = unet.config.cross_attention_dim
    image = {
        "proj.weight": torch.randn(4 * cross, 8),
        "proj.bias": torch.zeros(4 * cross),
        "norm.weight": torch.ones(cross),
        "norm.bias": torch.zeros(cross),
    }
    weights = {}
    sizes = [
        unet.get_submodule(name.removesuffix(".processor"))
        for name in unet.attn_processors
        if name.endswith("attn2.processor")
    ]
    for number, attn in enumerate(sizes):
        for part in ("k", "v"):
            weights[f"{2 * number + 1}.to_{part}_ip.weight"] = 0.2 * torch.randn(attn.inner_dim, cross)
    return {"image_proj": image, "ip_adapter": weights}


def test_replaced_processors_are_named(case: Case) -> None:
    replacements = {
        "SlicedAttnProcessor on \\d+: attach after attention slicing": lambda pipe: (
            pipe.enable_attention_slicing()
        ),
        "FusedAttnProcessor2_0 on \\d+: attach after fuse_qkv_projections": lambda pipe: (
            pipe.fuse_qkv_projections()
        ),
        "XFormersAttnProcessor on \\d+: attach after xformers": lambda pipe: pipe.unet.set_attn_processor(
            XFormersAttnProcessor()
        ),
        "got AttnProcessor on \\d+: attach after whatever set them": lambda pipe: (
            pipe.unet.set_attn_processor(AttnProcessor())
        ),
    }
    for message, replace in replacements.items():
        pipe = make_pipe(case.family)
        originals = pipe.unet.attn_processors
        with attach(pipe, case.method()) as control:
            replace(pipe)
            with pytest.raises(RuntimeError, match=message):
                generate(pipe)
        assert all(
            pipe.unet.attn_processors[f"{name}.processor"] is originals[f"{name}.processor"]
            for name in control.layers
        )
    pipe = make_pipe(case.family)
    mine = {name: case.processor() for name in pipe.unet.attn_processors}
    pipe.unet.set_attn_processor(dict(mine))
    assert pipe.unet.attn_processors == mine


def test_fused_and_adapted_projections_are_used(case: Case) -> None:
    pipe = make_pipe(case.family)
    pipe.fuse_qkv_projections()
    stock = generate(pipe)
    for attn in self_attention(pipe.unet).values():
        assert type(attn.processor) is FusedAttnProcessor2_0
        attn.to_q.forward = attn.to_k.forward = attn.to_v.forward = None  # whoever calls these fails
    pipe.unet.set_attn_processor(case.processor(method=None))
    assert torch.equal(generate(pipe), stock)
    with_edit = generate_with(pipe, case.processor())
    only_output_changes(stock, with_edit)

    adapted = make_pipe(case.family)
    for attn in self_attention(adapted.unet).values():
        attn.to_q = Adapter(attn.to_q)
    stock = generate(adapted)
    only_output_changes(stock, generate_with(adapted, case.processor()))
    assert torch.equal(generate_with(adapted, case.processor(method=None)), stock)


def generate_with(pipe, processor: UNetAttnProcessor, **options) -> Tensor:
    pipe.unet.set_attn_processor(processor)
    return generate(pipe, **options)


class Adapter(nn.Module):
    """A low-rank adapter around a projection, without a weight of its own to read."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down, self.up = (
            nn.Linear(base_layer.in_features, 2, bias=False),
            nn.Linear(2, base_layer.out_features, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def test_processors_have_no_parameters(case: Case) -> None:
    unet = make_unet(case.family)
    keys = list(unet.state_dict())
    unet.set_attn_processor(case.processor())
    assert list(unet.state_dict()) == keys and not isinstance(case.processor(), nn.Module)


@pytest.mark.slow
def test_compiled_layers_are_not_recompiled(case: Case) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(module)
        return module.forward

    pipe = make_pipe(case.family)
    control = attach(pipe, case.method(), steps=(0.3, 0.7))
    with control:
        eager = generate(pipe, steps=4)
    for attn in control.layers.values():
        attn.compile(backend=backend, fullgraph=True, dynamic=False)
    counts: list[int] = []
    with control:
        compiled = generate(
            pipe, steps=4, callback_on_step_end=lambda *given: counts.append(len(graphs)) or {}
        )
    shapes = {(attn.inner_dim, name.split(".")[1]) for name, attn in control.layers.items()}
    assert counts == [len(shapes)] * 4, (
        f"{counts} graphs after each step for {len(control.layers)} layers of {len(shapes)} shapes"
    )
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(case: Case) -> None:
    gradients = []
    for checkpointing in (False, True):
        unet = make_unet(case.family).train()
        unet.set_attn_processor(case.processor())
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(**unet_inputs(unet)).sample[0].square().mean().backward()
        gradients.append([attn.to_v.weight.grad for attn in self_attention(unet).values()])
    for plain, checkpointed in zip(*gradients):
        assert plain.abs().max() > 0 and torch.equal(plain, checkpointed)


def test_offload_hooks_change_no_result(case: Case) -> None:
    unet = make_unet(case.family)
    unet.set_attn_processor(case.processor())
    resident = run(unet)
    accelerate.cpu_offload(unet, execution_device="cpu")
    assert next(unet.parameters()).device.type == "meta"
    assert torch.equal(run(unet), resident)


class Dtypes(TorchDispatchMode):
    """The dtypes of everything computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen |= {
            item.dtype
            for item in (result if isinstance(result, (tuple, list)) else [result])
            if isinstance(item, Tensor)
        }
        return result


def test_dtypes_are_kept_and_nan_stays_local(case: Case) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        unet = make_unet(case.family).to(dtype)
        unet.set_attn_processor(case.processor())
        with Dtypes() as dtypes:
            result = run(unet, **unet_inputs(unet, dtype=dtype))
        assert result.dtype == dtype and result.isfinite().all() and torch.float64 not in dtypes.seen
    attn, hidden = make_attention(), case.tokens()
    hidden[1, 5] = float("nan")
    edited = compare(attn, AttnProcessor2_0(), case.processor(), hidden)[1]
    assert edited[:2].isnan().any(-1).all() and edited[2].isfinite().all()


@pytest.mark.slow
def test_every_guidance_half_edits_only_its_outputs(case: Case) -> None:
    pipe = make_pipe(case.family)
    for guidance_scale, images in ((1.0, 1), (5.0, 1), (1.0, 2), (5.0, 2)):
        layout = BatchLayout("output", "appearance", "structure", images_per_prompt=images)
        pipe.unet.set_attn_processor(AttnProcessor2_0())
        stock = generate(pipe, guidance_scale, images)
        pipe.unet.set_attn_processor(case.processor(layout=layout))
        only_output_changes(stock, generate(pipe, guidance_scale, images), tuple(range(images)))
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    with attach(pipe, case.method(), layout=layout):
        only_output_changes(stock, generate(pipe, guidance_scale, images), tuple(range(images)))
    roles = r"3 roles \(output, appearance, structure\)"
    message = f"batch: expected 3 rows = {roles} x 1 guidance parts x 1 images per prompt, got 6 rows"
    with attach(pipe, case.method()), pytest.raises(ValueError, match=message):
        generate(pipe, guidance_scale=1.0, images=2)
    pipe.unet.set_attn_processor(case.processor())
    with pytest.raises(ValueError, match=r"batch: expected 3 or 6 rows = .*, got 4 rows"):
        run(pipe.unet, **unet_inputs(pipe.unet, batch=4))


def test_only_the_denoiser_is_edited(case: Case) -> None:
    pipe = make_pipe(case.family)
    vae = dict(pipe.vae.attn_processors)
    with attach(pipe, case.method(), layers="*") as control:
        assert set(control.layers) == set(self_attention(pipe.unet))
        assert {name: id(processor) for name, processor in pipe.vae.attn_processors.items()} == {
            name: id(processor) for name, processor in vae.items()
        }
        images = pipe(PROMPTS, num_inference_steps=1, output_type="np").images
    assert images.shape[0] == 3
