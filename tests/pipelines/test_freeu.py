"""Cross-Image's FreeU against ALGORITHMS.md 2.6 written out, on UNets with SD 1.5's proportions."""

import contextlib
import math

import pytest
import torch
from diffusers import UNet2DConditionModel

from qalign.sampling.freeu import cross_image_freeu
from tests.processors.models import make_pipe, make_unet, unet_inputs


def sd15_like():
    """block_out_channels 16, 32, 64, 64: a twentieth of SD 1.5's. Its up blocks receive 64, 64, 64 and 32."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=32,
    ).eval()


def boosted(x: torch.Tensor, backbone: float, low: float) -> torch.Tensor:
    """Scale the first half of the channels, then the four lowest frequencies of all channels.

    Those are -1 and 0 in each direction, one basis wave at a time.
    """
    height, width = x.shape[-2:]
    x = torch.cat([x[:, : x.shape[1] // 2] * backbone, x[:, x.shape[1] // 2 :]], 1)
    result = x.to(torch.complex128)
    rows, columns = (
        torch.arange(height, dtype=torch.float64).view(-1, 1),
        torch.arange(width, dtype=torch.float64),
    )
    for vertical in (-1, 0):
        for horizontal in (-1, 0):
            wave = torch.exp(2j * math.pi * (vertical * rows / height + horizontal * columns / width))
            amount = (x.double() * wave.conj()).sum((-2, -1), keepdim=True) / (height * width)
            result = result + (low - 1) * amount * wave
    return result.real.to(x.dtype)


@contextlib.contextmanager
def literal_freeu(unet, wide: int, narrow: int):
    """2.6 by replaced forwards."""
    forwards = [block.forward for block in unet.up_blocks]

    def replaced(forward):
        def call(hidden_states, **others):
            if hidden_states.shape[1] == wide:
                hidden_states = boosted(hidden_states, 1.2, 0.9)
            elif hidden_states.shape[1] == narrow:
                hidden_states = boosted(hidden_states, 1.4, 0.2)
            return forward(hidden_states=hidden_states, **others)

        return call

    for block, forward in zip(unet.up_blocks, forwards):
        block.forward = replaced(forward)
    yield
    for block in unet.up_blocks:
        del block.forward


def entered_and_left(unet, widths, context=contextlib.nullcontext, **inputs):
    """The input of each up block of these widths, and the output of the UNet.

    The input is that of the block's first layer, before the skip connection.
    """
    entered = []
    with contextlib.ExitStack() as hooks, context(), torch.no_grad():
        for block, width in zip(unet.up_blocks, widths):
            hook = block.resnets[0].register_forward_pre_hook(
                lambda module, args, width=width: entered.append(args[0][:, :width])
            )
            hooks.callback(hook.remove)
        return entered, unet(**inputs).sample


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_is_the_formula_on_sd15s_proportions(size) -> None:
    unet, widths = sd15_like(), (64, 64, 64, 32)
    inputs = {
        **unet_inputs(unet),
        "sample": torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(1)),
    }
    stock, plain = entered_and_left(unet, widths, **inputs)
    seen, actual = entered_and_left(unet, widths, lambda: cross_image_freeu(unet), **inputs)
    truth, expected = entered_and_left(unet, widths, lambda: literal_freeu(unet, 64, 32), **inputs)
    torch.testing.assert_close(seen[0], boosted(stock[0], 1.2, 0.9), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen, truth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert (actual - plain).abs().max() > 1e-3


@pytest.mark.parametrize("family, wide, narrow", [("sd15", 64, 32), ("sdxl", 64, 32), ("small", 32, 0)])
def test_widths_are_the_unets_own(family, wide, narrow) -> None:
    unet = make_unet(family)
    with torch.no_grad():
        with cross_image_freeu(unet):
            actual = unet(**unet_inputs(unet)).sample
        with literal_freeu(unet, wide, narrow):
            expected = unet(**unet_inputs(unet)).sample
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_neutral_factors_change_nothing_and_each_factor_counts() -> None:
    unet = sd15_like()
    neutral = {"b1": 1.0, "b2": 1.0, "s1": 1.0, "s2": 1.0}

    @torch.no_grad()
    def run(**factors):
        with cross_image_freeu(unet, **factors):
            return unet(**unet_inputs(unet)).sample

    with torch.no_grad():
        plain = unet(**unet_inputs(unet)).sample
    torch.testing.assert_close(run(**neutral), plain, rtol=1e-4, atol=1e-5)
    for name, value in {"b1": 1.2, "b2": 1.4, "s1": 0.9, "s2": 0.2}.items():
        assert (run(**{**neutral, name: value}) - plain).abs().max() > 1e-4, name
    assert torch.equal(run(), run(b1=1.2, b2=1.4, s1=0.9, s2=0.2))


def test_everything_is_restored_after_exceptions_too() -> None:
    pipe = make_pipe("sd15")
    before = [dict(vars(block)) for block in pipe.unet.up_blocks]
    hooks = [
        (dict(block._forward_pre_hooks), dict(block._forward_pre_hooks_with_kwargs))
        for block in pipe.unet.up_blocks
    ]
    with torch.no_grad():
        plain = pipe.unet(**unet_inputs(pipe.unet)).sample
        with pytest.raises(RuntimeError, match="inside"), cross_image_freeu(pipe):
            assert all(block._forward_pre_hooks for block in pipe.unet.up_blocks)
            raise RuntimeError("inside")
        assert torch.equal(pipe.unet(**unet_inputs(pipe.unet)).sample, plain)
    assert [
        (dict(block._forward_pre_hooks), dict(block._forward_pre_hooks_with_kwargs))
        for block in pipe.unet.up_blocks
    ] == hooks
    assert [vars(block).keys() for block in pipe.unet.up_blocks] == [names.keys() for names in before]


def test_it_leaves_the_callers_tensors_alone() -> None:
    unet, entered = sd15_like(), []
    hook = unet.mid_block.register_forward_hook(
        lambda module, args, output: entered.append((output, output.clone()))
    )
    with torch.no_grad(), cross_image_freeu(unet):
        unet(**unet_inputs(unet))
    hook.remove()
    output, copy = entered[0]
    assert torch.equal(output, copy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_works_in_half_precision(dtype) -> None:
    unet = sd15_like()
    with torch.no_grad(), cross_image_freeu(unet):
        expected = unet(**unet_inputs(unet)).sample
        actual = unet.to(dtype)(**unet_inputs(unet, dtype=dtype)).sample
    assert actual.dtype == dtype and actual.isfinite().all()
    assert (actual.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_gradients_pass_through() -> None:
    unet = sd15_like()
    inputs = unet_inputs(unet)
    sample = inputs.pop("sample").requires_grad_()
    with cross_image_freeu(unet):
        unet(sample, **inputs).sample.square().sum().backward()
    assert sample.grad.isfinite().all() and sample.grad.abs().max() > 0


def test_something_without_a_unet_is_refused() -> None:
    with (
        pytest.raises(TypeError, match="expected a pipeline with a UNet, or a UNet, got Linear"),
        cross_image_freeu(torch.nn.Linear(2, 2)),
    ):
        pass
