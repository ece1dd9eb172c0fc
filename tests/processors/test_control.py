"""attach: which layers, which steps, and that everything is as it was afterwards."""

import re
import subprocess
import sys

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention_processor import AttnProcessor

from qalign import BatchLayout, CrossImage, CtrlX, QAlign, QAlignAttnProcessor, UNetAttnProcessor, attach
from qalign.context.clock import Clock
from qalign.context.regions import Regions
from tests.processors.models import (
    PROMPTS,
    SIZE,
    generate,
    make_pipe,
    make_unet,
    quiet,
    self_attention,
    unet_inputs,
)


def state_of(pipe) -> tuple:
    """Everything that attach may touch."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules()]
    return (
        {n: id(p) for n, p in pipe.unet.attn_processors.items()},
        dict(vars(pipe.scheduler)),
        hooks,
        list(pipe.unet.state_dict()),
        set(vars(pipe)),
    )


def edited_steps(
    pipe, method=None, steps=None, num_steps: int = 10, **options
) -> tuple[list[int], list[int]]:
    """The steps at which the method is active, and those at which it reads the structure."""
    active, structure = [], []

    def record(pipe, step, timestep, given):
        return given

    with attach(pipe, method or QAlign(), steps=steps) as control:
        clock = control.clock

        def before_unet(module, args):
            assert bool(clock.active) is not clock.idle
            active.extend([clock.step] if clock.active else [])
            structure.extend([clock.step] if clock.from_structure else [])

        handle = pipe.unet.register_forward_pre_hook(before_unet)
        try:
            generate(pipe, steps=num_steps, callback_on_step_end=record, **options)
        finally:
            handle.remove()
    return active, structure


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("up", ["up_blocks"]),
        ("down", ["down_blocks"]),
        ("mid", ["mid_block"]),
        ("up_blocks.2", ["up_blocks.2."]),
        ("up_blocks.3.attentions.0.transformer_blocks.0.attn1", ["up_blocks.3.attentions.0."]),
        (
            "*.attentions.1.*",
            ["up_blocks.1.attentions.1.", "up_blocks.2.attentions.1.", "up_blocks.3.attentions.1."],
        ),
        (["mid", "up_blocks.1"], ["mid_block", "up_blocks.1."]),
        (None, ["up_blocks.2.", "up_blocks.3."]),
    ],
)
def test_layers_by_name(layers, expected) -> None:
    unet = make_unet("sd15")
    control = attach(unet, QAlign(), layers=layers)
    assert set(control.layers) == {name for name in self_attention(unet) if name.startswith(tuple(expected))}


def test_default_layers_are_the_last_two_attention_blocks() -> None:
    assert {name[:12] for name in attach(make_unet("sdxl"), CrossImage()).layers} == {
        "up_blocks.0.",
        "up_blocks.1.",
    }


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_everything_is_restored(family) -> None:
    pipe = make_pipe(family)
    stock, before = generate(pipe), state_of(pipe)
    with attach(pipe, QAlign(), steps=(0.1, 0.9)):
        assert state_of(pipe)[0] != before[0]
        generate(pipe)
    middle = state_of(pipe)
    assert (
        middle[0] == before[0]
        and middle[2:] == before[2:]
        and "step" not in middle[1]
        and "set_timesteps" not in middle[1]
    )
    assert torch.equal(generate(pipe), stock)


def test_everything_is_restored_after_an_exception() -> None:
    pipe = make_pipe("sd15")
    generate(pipe)
    before = state_of(pipe)
    control = attach(pipe, QAlign())
    with pytest.raises(ZeroDivisionError):
        with control:
            generate(pipe, callback_on_step_end=lambda *given: 1 / 0)
    after = state_of(pipe)
    assert after[0] == before[0] and after[1].keys() == before[1].keys() and control.clock.step is None
    with control:  # and it can be used again
        generate(pipe)


def test_wrapped_scheduler_keeps_its_earlier_wrapping() -> None:
    pipe = make_pipe("sd15")
    original = pipe.scheduler.step
    pipe.scheduler.step = mine = lambda *args, **kwargs: original(*args, **kwargs)
    with attach(pipe, QAlign()):
        generate(pipe)
    assert pipe.scheduler.step is mine


def test_unfusing_after_the_block_leaves_stock_attention() -> None:
    pipe = make_pipe("sd15")
    stock = generate(pipe)
    with attach(pipe, QAlign()):
        pipe.unet.fuse_qkv_projections()
    pipe.unet.unfuse_qkv_projections()
    torch.testing.assert_close(generate(pipe), stock)


def test_a_window_of_steps() -> None:
    pipe = make_pipe("sd15")
    assert edited_steps(pipe)[0] == list(range(10))
    assert edited_steps(pipe, steps=(0.1, 0.9))[0] == list(range(1, 9))
    assert edited_steps(pipe, steps=(0.0, 0.25))[0] == [0, 1, 2]
    stock = generate(pipe)
    with attach(pipe, QAlign(), steps=(0.9, 0.95)):  # of two steps, none
        assert torch.equal(generate(pipe), stock)


@pytest.mark.parametrize("scheduler", [PNDMScheduler, HeunDiscreteScheduler])
def test_repeated_timesteps_are_one_step(scheduler) -> None:
    pipe = make_pipe("sd15")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    called = edited_steps(pipe, num_steps=5)[0]
    entries = pipe.scheduler.timesteps.tolist()
    distinct = sorted(set(entries), reverse=True)
    assert called == [distinct.index(entry) for entry in entries] and len(distinct) < len(entries)
    assert edited_steps(pipe, steps=(0.5, 1.0), num_steps=5)[0] == [
        step for step in called if step / len(distinct) >= 0.5
    ]


def test_image_to_image_counts_only_executed_steps() -> None:
    pipe = quiet(
        StableDiffusionImg2ImgPipeline(**make_pipe("sd15").components, requires_safety_checker=False)
    )
    seen = []
    with attach(pipe, QAlign(), steps=(0.5, 1.0)) as control:
        hook = pipe.unet.register_forward_pre_hook(
            lambda *given: seen.append((control.clock.step, control.clock.total, control.clock.idle))
        )
        pipe(
            PROMPTS,
            image=torch.zeros(3, 3, 2 * SIZE, 2 * SIZE),
            num_inference_steps=8,
            strength=0.5,
            output_type="latent",
        )
        hook.remove()
    assert seen == [(0, 4, True), (1, 4, True), (2, 4, False), (3, 4, False)]


def test_several_calls_of_the_unet_in_one_step() -> None:
    pipe, seen = make_pipe("sd15"), []
    with attach(pipe, QAlign(), steps=(0.5, 1.0)) as control:

        def again(pipe, step, timestep, given):
            with torch.no_grad():
                pipe.unet(**unet_inputs(pipe.unet))
            seen.append(control.clock.step)
            return given

        generate(pipe, steps=3, callback_on_step_end=again)
        generate(pipe, steps=2, callback_on_step_end=again)
    assert seen == [1, 2, 3, 1, 2]


def test_structure_steps_of_the_published_schedule() -> None:
    clock = Clock((11 / 68, 1.0), CrossImage().takes_structure)
    steps = []
    for step in range(68):
        clock.set(step, 68)
        steps += [step] if clock.active and clock.from_structure else []
    assert steps == [11, 16, 21, 26, 31, 36]
    assert not any(CrossImage(structure_every=0).takes_structure(step, 68) for step in range(68))


def test_structure_steps_read_the_structure() -> None:
    pipe = make_pipe("sd15")
    appearance, structure = (
        {**unet_inputs(pipe.unet), "sample": unet_inputs(pipe.unet)["sample"][rows]}
        for rows in ([0, 1, 2], [0, 2, 1])
    )
    context = unet_inputs(pipe.unet)["encoder_hidden_states"]
    structure["encoder_hidden_states"] = context[[0, 2, 1]]
    with torch.no_grad(), attach(pipe.unet, QAlign()) as control:
        control.clock.set(0, 10)
        assert control.clock.from_structure
        at_structure_step = pipe.unet(**appearance).sample[0]
        control.clock.set(2, 10)
        assert not control.clock.from_structure
        assert torch.equal(pipe.unet(**structure).sample[0], at_structure_step)
        assert not torch.equal(pipe.unet(**appearance).sample[0], at_structure_step)
    assert edited_steps(pipe)[1] == [0, 1, 6]


def test_the_loop_of_a_bare_model() -> None:
    unet = make_unet("sd15")
    timesteps = torch.tensor([900, 600, 300, 0])
    inputs = unet_inputs(unet)
    with torch.no_grad():
        stock = [unet(**{**inputs, "timestep": timestep}).sample for timestep in timesteps]
        with attach(unet, QAlign(), steps=(0.5, 1.0)) as control:
            tracked = [
                unet(**{**inputs, "timestep": timestep}).sample for timestep in control.track(timesteps)
            ]
            with pytest.raises(
                RuntimeError,
                match=r"steps: expected a running clock .*control\.track.*, got a call outside of one",
            ):
                unet(**inputs)
    assert [torch.equal(a, b) for a, b in zip(stock, tracked)] == [True, True, False, False]


def test_without_steps_a_bare_model_needs_no_clock() -> None:
    unet = make_unet("sd15")
    with torch.no_grad():
        stock = unet(**unet_inputs(unet)).sample
        with attach(unet, CrossImage()):
            edited = unet(**unet_inputs(unet)).sample
    assert [torch.equal(a, b) for a, b in zip(stock, edited)] == [False, True, True]


def test_attaching_around_a_compiled_unet() -> None:
    pipe = make_pipe("sd15")
    unet = pipe.unet
    pipe.unet = torch.compile(unet, backend="eager")
    assert set(attach(pipe, QAlign(), layers="up").layers) == set(self_attention(unet, "up_blocks"))


class Vae(torch.nn.Module):
    pass


def refuse(make) -> str:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals_name_the_argument() -> None:
    pipe = make_pipe("sd15")
    for wrong, name in (
        (pipe.vae, "AutoencoderKL"),
        (Vae(), "Vae"),
        ("pipe", "str"),
        (ControlNetModel.from_unet(pipe.unet), "ControlNetModel"),
    ):
        assert (
            refuse(lambda wrong=wrong: attach(wrong, QAlign()))
            == f"pipe_or_model: expected a pipeline with a UNet, or a UNet, got {name}"
        )
    message = refuse(lambda: attach(pipe, QAlign(), layers="encoder"))
    assert re.fullmatch(
        r"layers: expected names or patterns of self-attention layers of UNet2DConditionModel, "
        r"got 'encoder', which none of 10 matches \(first: down_blocks\.0\.\S+\.attn1\)",
        message,
    )
    assert refuse(lambda: attach(pipe, QAlign(), layers=[])).startswith("layers: expected at least one")
    for steps in ((0.9, 0.1), (0, 10), (0.5,), (-0.1, 0.5)):
        assert refuse(lambda steps=steps: attach(pipe, QAlign(), steps=steps)).startswith(
            "steps: expected None or fractions (start, stop)"
        )
    assert (
        refuse(lambda: attach(pipe, QAlign(), layout=("output",)))
        == "layout: expected a BatchLayout, got ('output',)"
    )


def test_attaching_twice_is_refused() -> None:
    pipe = make_pipe("sd15")
    with attach(pipe, QAlign(), layers=["mid", "up"]):
        message = refuse(attach(pipe, CrossImage(), layers=["down", "mid"]).__enter__)
        assert message.startswith(
            "layers: expected 4 without a processor of this library, got 1 with one, mid_block."
        )
    pipe.unet.set_attn_processor(QAlignAttnProcessor())
    assert "(attached twice? two methods need layers of their own)" in refuse(
        attach(pipe, QAlign()).__enter__
    )
    pipe.unet.set_attn_processor(AttnProcessor())
    with attach(pipe, QAlign()):
        pass


def test_two_methods_on_own_layers_share_steps() -> None:
    pipe = make_pipe("sd15")
    stock, processors, attributes = generate(pipe), dict(pipe.unet.attn_processors), set(vars(pipe.scheduler))
    with attach(pipe, CrossImage(), layers="mid", steps=(0.5, 1.0)):
        one = generate(pipe)
        with attach(pipe, QAlign(), layers="up", steps=(0.0, 0.5)):
            both = generate(pipe)
        assert torch.equal(generate(pipe), one)
    assert pipe.unet.attn_processors == processors and set(vars(pipe.scheduler)) == attributes
    assert torch.equal(generate(pipe), stock)
    assert not torch.equal(one[0], stock[0]) and not torch.equal(both[0], one[0])
    assert torch.equal(both[1:], stock[1:])


def test_a_unet_without_attention_is_refused() -> None:
    from diffusers import UNet2DModel

    sizes = {
        "block_out_channels": (8, 8),
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }
    unet = UNet2DModel(**sizes, layers_per_block=1, add_attention=False)
    expected = "self-attention in down_blocks, mid_block, up_blocks"
    message = f"pipe_or_model: expected {expected}, got UNet2DModel without any"
    assert refuse(lambda: attach(unet, QAlign())) == message


def test_a_transformer_is_refused_by_the_unet_processor() -> None:
    sizes = {
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
    }
    transformer = FluxTransformer2DModel(in_channels=4, num_layers=1, num_single_layers=1, **sizes)
    assert refuse(lambda: attach(transformer, QAlign())).endswith("got FluxTransformer2DModel")
    transformer.set_attn_processor(QAlignAttnProcessor())
    tokens = {
        "hidden_states": torch.zeros(3, 4, 4),
        "encoder_hidden_states": torch.zeros(3, 2, 32),
        "pooled_projections": torch.zeros(3, 32),
    }
    ids = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(2, 3)}
    expected = "diffusers' Attention of a UNet without added projections"
    message = f"attn: expected {expected}, got FluxAttention with added_kv_proj_dim=32"
    assert refuse(lambda: transformer(**tokens, **ids, timestep=torch.zeros(3), guidance=None)) == message


def test_guidance_that_the_pipeline_denies() -> None:
    pipe = make_pipe("sd15")
    with attach(pipe, QAlign(), layout=BatchLayout("output", "appearance", "structure", images_per_prompt=2)):
        assert generate(pipe, guidance_scale=1.0, images=2).shape[0] == 6
    with attach(pipe, QAlign()):  # two images of each prompt are not two guidance halves
        message = refuse(lambda: generate(pipe, guidance_scale=1.0, images=2))
    roles = "3 roles (output, appearance, structure)"
    expected = f"3 rows = {roles} x 1 guidance parts x 1 images per prompt, got 6 rows"
    assert message.startswith(
        f"batch: expected {expected} (StableDiffusionPipeline.do_classifier_free_guidance"
    )


class Constant(StableDiffusionPipeline):
    """A pipeline that runs with guidance and says to others that it does not, as some of diffusers do."""

    @property
    def do_classifier_free_guidance(self):
        caller = sys._getframe(1).f_code.co_name
        return self._guidance_scale > 1 if caller in ("__call__", "encode_prompt") else False


def test_the_batch_is_believed_before_the_pipeline() -> None:
    pipe = make_pipe("sd15")
    with attach(pipe, QAlign()):
        expected = generate(pipe)
    constant = quiet(Constant(**pipe.components, requires_safety_checker=False))
    with attach(constant, QAlign()):
        assert torch.equal(generate(constant), expected)


def test_layer_skip_knows_the_processors() -> None:
    unet = make_unet("sd15")
    stock, inputs = {}, unet_inputs(unet)
    for name, processor in (
        ("stock", None),
        ("ours", QAlignAttnProcessor()),
        ("attached", UNetAttnProcessor(QAlign())),
    ):
        unet = make_unet("sd15")
        if processor is not None:
            unet.set_attn_processor(processor)
        config = LayerSkipConfig(indices=[0], fqn="transformer_blocks", skip_attention=True, skip_ff=False)
        for module in [module for module in unet.modules() if hasattr(module, "transformer_blocks")]:
            apply_layer_skip(module, config)
        with torch.no_grad():
            stock[name] = unet(**inputs).sample
    assert torch.equal(stock["stock"], stock["ours"]) and torch.equal(stock["stock"], stock["attached"])


def test_a_replaced_scheduler_is_followed() -> None:
    pipe, seen = make_pipe("sd15"), []
    former = pipe.scheduler
    with attach(pipe, QAlign(), steps=(0.5, 1.0)) as control:
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        pipe.unet.register_forward_pre_hook(
            lambda *given: seen.append((control.clock.step, control.clock.idle))
        )
        generate(pipe, steps=4)
        former.set_timesteps(9)
        assert control.clock.total == 4
    assert seen == [(0, True), (1, True), (2, False), (3, False)]
    assert type(former) is DDIMScheduler and type(pipe.scheduler) is EulerDiscreteScheduler


def test_no_edited_step_is_said_once(caplog) -> None:
    pipe = make_pipe("small")
    for steps, window, message in (
        (1, (0.5, 1.0), "QAlign: it edits none of 1 steps, as steps=(0.5, 1) holds none"),
        (4, (0.8, 0.9), "QAlign: it edits none of 4 steps, as steps=(0.8, 0.9) holds none"),
        (2, (0.5, 1.0), "QAlign: in all of its 1 of 2 steps it reads the structure, not the appearance"),
    ):
        caplog.clear()
        with attach(pipe, QAlign(), steps=window):
            generate(pipe, steps=steps)
            generate(pipe, steps=steps)
        assert caplog.messages == [message]
    caplog.clear()
    for steps in (1, 2, 3, 4):
        with attach(pipe, QAlign(structure_every=0)):
            generate(pipe, steps=steps)
    with attach(pipe, QAlign(), steps=(0.5, 1.0)):
        generate(pipe, steps=3)
    assert caplog.messages == []


def test_executed_steps_alone_are_warned_of(caplog) -> None:
    """In image-to-image the schedule has steps that the loop leaves out."""
    pipe = StableDiffusionImg2ImgPipeline(**make_pipe("small").components, requires_safety_checker=False)
    settings = {"image": torch.zeros(3, 3, 32, 32), "strength": 0.2, "output_type": "latent"}
    with attach(quiet(pipe), QAlign(structure_every=0), steps=(0.5, 0.9)):
        pipe(PROMPTS, num_inference_steps=5, **settings)
    assert caplog.messages == ["QAlign: it edits none of 1 steps, as steps=(0.5, 0.9) holds none"]


def test_no_edited_layer_is_said_once(caplog) -> None:
    pipe = make_pipe("small")
    with attach(pipe, CtrlX(structure_convolutions=()), layers="mid"):
        generate(pipe)
    first = "mid_block.attentions.0.transformer_blocks.0.attn1 the first"
    assert caplog.messages == [f"CtrlX: it edits none of the 1 chosen layers, {first}"]
    caplog.clear()
    with attach(pipe, QAlign(structure_every=0), layout=BatchLayout("appearance", "plain", "structure")):
        generate(pipe)
    roles = "appearance, plain, structure"
    assert caplog.messages == [f"QAlign: it edits nothing, as the layout has no output row, only {roles}"]
    caplog.clear()
    with attach(pipe, QAlign(structure_every=0), layers="mid"):
        pipe.unet.mid_block.forward = lambda hidden, *given, **options: hidden  # as a cache of features does
        generate(pipe)
    assert caplog.messages == ["QAlign: it edited nothing, as none of its 1 layers ran"]


def test_clock_moved_in_inference_mode_is_settable() -> None:
    clock = Clock()
    with torch.inference_mode():
        clock.set(0, 2, torch.device("meta"))
    clock.set(1, 2, torch.device("meta"))
    assert clock.active.device.type == "meta" and not clock.active.is_inference()


def test_import_needs_no_diffusers() -> None:
    program = "import sys; sys.modules['diffusers'] = None; import qalign; qalign.QAlignAttnProcessor()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_transposed_label_maps_are_refused_before_layers() -> None:
    """They have as many tokens, so that no layer could tell."""
    pipe, calls = make_pipe("sd15"), []
    square, transposed = torch.ones(SIZE, SIZE).long(), torch.ones(SIZE // 2, 2 * SIZE).long()
    pipe.unet.conv_in.register_forward_pre_hook(lambda *call: calls.append(call))
    regions = Regions(appearance=square, structure=transposed)
    with (
        attach(pipe, QAlign(), regions=regions),
        pytest.raises(ValueError, match="regions: expected a label map of the structure for"),
    ):
        generate(pipe)
    assert not calls
