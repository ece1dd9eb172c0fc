"""A feature bank gives what the batched pass gives, at the price of one reference pass."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPanoramaPipeline

from qalign import (
    BatchLayout,
    CrossImage,
    CtrlX,
    EyeForAnEye,
    FeatureBank,
    QAlign,
    QAlignWarp,
    SeAl,
    StyleAligned,
    StyleID,
    attach,
)
from tests.processors.models import make_pipe, make_unet, quiet, unet_inputs

TIMESTEPS = torch.tensor([900, 500, 100])
PREFIXES = ("down_blocks", "mid_block", "up_blocks")
METHODS = [
    CrossImage(structure_every=0),
    QAlign(),
    QAlignWarp(),
    StyleAligned(share_group_norm=False),
    CtrlX(structure_layers=(), appearance_layers=PREFIXES, structure_convolutions=()),
    EyeForAnEye(structure_every=0),
]


def rows_of(inputs, rows):
    return {name: x[rows] if name != "timestep" else x for name, x in inputs.items()}


@torch.no_grad()
def run(unet, method, layout, inputs, steps=(0, 1)):
    """The last sample of a loop."""
    sample = inputs["sample"]
    with attach(unet, method, layout=layout, steps=steps) as control:
        for timestep in control.track(TIMESTEPS):
            sample = sample - 0.3 * unet(**inputs | {"sample": sample, "timestep": timestep}).sample
    return sample


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_bank_is_the_batched_pass(method):
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=6)
    batched = run(unet, method, BatchLayout("output", "output", "appearance"), inputs)
    bank = FeatureBank("appearance")
    reference = run(unet, bank.record(method), BatchLayout("output"), rows_of(inputs, [2, 5]))
    torch.testing.assert_close(reference, batched[[2, 5]], rtol=0, atol=2e-5)
    served = run(unet, bank.serve(method), BatchLayout("output", "output"), rows_of(inputs, [0, 1, 3, 4]))
    torch.testing.assert_close(served, batched[[0, 1, 3, 4]], rtol=0, atol=2e-5)
    one = run(unet, bank.serve(method), BatchLayout("output"), rows_of(inputs, [1, 4]))
    torch.testing.assert_close(one, batched[[1, 4]], rtol=0, atol=2e-5)


def test_structure_rows_come_from_a_bank_too():
    method = CrossImage(structure_every=1, structure_until=0.5)
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=3)
    batched = run(unet, method, BatchLayout("output", "appearance", "structure"), inputs)
    bank = FeatureBank("appearance", "structure")
    run(unet, bank.record(method), BatchLayout("output", "output"), rows_of(inputs, [1, 2]))
    served = run(unet, bank.serve(method), BatchLayout("output"), rows_of(inputs, [0]))
    torch.testing.assert_close(served, batched[:1], rtol=0, atol=2e-5)


def test_one_reference_serves_guidance_parts_and_images():
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=4)
    bank = FeatureBank("appearance")
    run(unet, bank.record(QAlign()), BatchLayout("output"), rows_of(inputs, [3]))
    served = run(unet, bank.serve(QAlign()), BatchLayout("output", images_per_prompt=2), inputs)
    alone = torch.cat(
        [run(unet, bank.serve(QAlign()), BatchLayout("output"), rows_of(inputs, [row])) for row in range(4)]
    )
    torch.testing.assert_close(served, alone, rtol=0, atol=2e-5)


def test_bytes_are_counted_and_spill_to_the_cpu():
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=1)
    banks = [
        FeatureBank("appearance", dtype=torch.bfloat16),
        FeatureBank("appearance"),
        FeatureBank("appearance", limit=40_000),
    ]
    for bank in banks:
        run(unet, bank.record(QAlign()), BatchLayout("output"), inputs)
    layers = len(attach(unet, QAlign()).layers)
    assert banks[1].nbytes == len(TIMESTEPS) * layers * 256 * 32 * 4 == 2 * banks[0].nbytes
    assert banks[1].spilled == 0 and banks[2].spilled == banks[2].nbytes - 32_768
    banks[1].clear()
    assert banks[1].nbytes == 0


def test_steps_outside_the_window_need_no_features():
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=1)
    bank = FeatureBank("appearance")
    run(unet, bank.record(QAlign()), BatchLayout("output"), inputs, steps=(0.5, 1.0))
    assert bank.nbytes == len(attach(unet, QAlign()).layers) * 256 * 32 * 4
    run(unet, bank.serve(QAlign()), BatchLayout("output"), inputs, steps=(0.5, 1.0))
    with pytest.raises(
        RuntimeError,
        match=r"bank: expected features of up_blocks\..* at step 0, got \d+ other layers and 1 steps",
    ):
        run(unet, bank.serve(QAlign()), BatchLayout("output"), inputs)


@torch.no_grad()
@pytest.mark.parametrize("method", [SeAl(), SeAl(topk=3, blend="keys_values", strength=(1.0, 3.0))], ids=repr)
def test_noise_free_pass_is_always_clean_latents(method):
    """As if the appearance's row were set back to its clean latents before each step."""
    unet, inputs = make_unet("sd15"), unet_inputs(make_unet("sd15"), batch=2)
    clean, sample = 0.5 * inputs["sample"][1:], inputs["sample"][:1]
    with attach(unet, method, layout=BatchLayout("output", "appearance")) as control:
        for timestep in control.track(TIMESTEPS):
            sample = (
                sample
                - 0.3
                * unet(**inputs | {"sample": torch.cat([sample, clean]), "timestep": timestep}).sample[:1]
            )
    bank = FeatureBank("appearance")
    prompts = inputs["encoder_hidden_states"]
    served = bank.record_clean(unet, method, clean, TIMESTEPS, encoder_hidden_states=prompts[1:])
    assert len(bank._kept) == len(TIMESTEPS) * len(attach(unet, method).layers)
    alone = run(unet, served, BatchLayout("output"), rows_of(inputs, [0]))
    torch.testing.assert_close(alone, sample, rtol=0, atol=2e-5)
    with_a_row = run(unet, served, BatchLayout("output", "appearance"), inputs)
    torch.testing.assert_close(with_a_row[:1], sample, rtol=0, atol=2e-5)
    assert not torch.allclose(
        run(unet, method, BatchLayout("output", "appearance"), inputs)[:1], sample, atol=1e-3
    )


@torch.no_grad()
def run_calls(unet, method, layout, inputs, calls=2):
    """The outputs of a loop with several calls at each timestep, as of views or of guidance in two calls."""
    outputs = []
    with attach(unet, method, layout=layout) as control:
        for timestep in control.track(TIMESTEPS):
            for call in range(calls):
                sample = inputs["sample"] * (call + 1)
                outputs.append(unet(**inputs | {"sample": sample, "timestep": timestep}).sample)
    return outputs


def test_every_call_at_a_timestep_is_kept():
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=2)
    batched = run_calls(unet, QAlign(), BatchLayout("output", "appearance"), inputs)
    bank = FeatureBank("appearance")
    for _ in range(2):  # the second pass replaces the first
        run_calls(unet, bank.record(QAlign()), BatchLayout("output"), rows_of(inputs, [1]))
    layers = len(attach(unet, QAlign()).layers)
    assert bank.nbytes == 2 * len(TIMESTEPS) * layers * 256 * 32 * 4
    served = run_calls(unet, bank.serve(QAlign()), BatchLayout("output"), rows_of(inputs, [0]))
    for one, whole in zip(served, batched):
        torch.testing.assert_close(one, whole[:1], rtol=0, atol=2e-5)


def test_one_recorded_call_serves_all_calls():
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=2)
    bank = FeatureBank("appearance")
    run_calls(unet, bank.record(QAlign()), BatchLayout("output"), rows_of(inputs, [1]), calls=1)
    batched = run_calls(unet, QAlign(), BatchLayout("output", "appearance"), inputs, calls=1)
    served = run_calls(unet, bank.serve(QAlign()), BatchLayout("output"), rows_of(inputs, [0]), calls=3)
    for one, whole in zip(served[::3], batched):
        torch.testing.assert_close(one, whole[:1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("calls", [1, 3])
def test_another_number_of_calls_is_refused(calls):
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=1)
    bank = FeatureBank("appearance")
    run_calls(unet, bank.record(QAlign()), BatchLayout("output"), inputs)
    message = rf"bank: expected 2 calls of up_blocks\.\S+ at step 0, as recorded, got {calls} \(record one"
    with pytest.raises(RuntimeError, match=message):
        run_calls(unet, bank.serve(QAlign()), BatchLayout("output"), inputs, calls=calls)


def test_a_bank_of_panorama_views():
    """The scheduler steps after each view, and goes back for the next one."""
    parts = {name: part for name, part in make_pipe("small").components.items() if name != "image_encoder"}
    pipe = quiet(StableDiffusionPanoramaPipeline(**parts, requires_safety_checker=False))
    bank = FeatureBank("appearance")
    settings = {"height": 16, "width": 576, "num_inference_steps": 2, "output_type": "latent"}
    for method in (bank.record(QAlign()), bank.serve(QAlign())):
        with attach(pipe, method, layout=BatchLayout("output"), layers="mid"):
            pipe("a", guidance_scale=1.0, **settings)
    assert [len(calls) for calls in bank._kept.values()] == [2, 2]


def test_a_bank_outside_of_a_loop_is_refused():
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=1)
    bank = FeatureBank("appearance")
    for method in (bank.record(QAlign()), bank.serve(QAlign())):
        with attach(unet, method, layout=BatchLayout("output")):
            with pytest.raises(
                RuntimeError, match=r"bank: expected a running clock \(inside a pipeline call"
            ):
                unet(**inputs)


def test_an_interrupt_ends_the_reference_pass():
    pipe = make_pipe("small")
    inputs, bank = unet_inputs(pipe.unet, batch=1), FeatureBank("appearance")
    calls = []

    def interrupt(module, given):
        calls.append(1)
        pipe._interrupt = len(calls) == 2

    pipe.unet.register_forward_pre_hook(interrupt)
    prompts = {"encoder_hidden_states": inputs["encoder_hidden_states"]}
    with pytest.raises(RuntimeError, match="interrupt: expected the reference pass to run to its end"):
        bank.record_clean(pipe, QAlign(), inputs["sample"], TIMESTEPS, **prompts)
    assert len(calls) == 2
    bank.record_clean(pipe, QAlign(), inputs["sample"], TIMESTEPS, **prompts)  # the flag is of one call


def test_bank_forwards_pipeline_requests_to_its_method():
    served = FeatureBank("appearance").serve(StyleID())
    x, y = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for each in (served, copy.copy(served)):
        assert torch.equal(each.start(x, y), StyleID().start(x, y))
        assert each.change_clean(x, y, 120) is x and each.default_steps is StyleID.default_steps


def test_rows_that_the_bank_stands_for_are_plain():
    layout = BatchLayout("output", "appearance", "structure").extended("appearance")
    assert layout.roles == ("output", "plain", "structure", "appearance")
    assert (
        layout.rows("appearance", 4) == (3,)
        and layout.rows("structure", 4) == (2,)
        and layout.rows("other", 4) == (1, 2)
    )


def test_refusals():
    with pytest.raises(
        ValueError, match="roles: expected 'appearance', 'structure' or both, got \\('output',\\)"
    ):
        FeatureBank("output")
    with pytest.raises(TypeError, match="method: expected an instance .* QAlign\\(\\), got 'seal'"):
        FeatureBank("appearance").serve("seal")
    unet, inputs = make_unet("small"), unet_inputs(make_unet("small"), batch=2)
    with pytest.raises(ValueError, match="layout: expected 1 roles, as the bank has, got output, output"):
        run(unet, FeatureBank("appearance").record(QAlign()), BatchLayout("output", "output"), inputs)
