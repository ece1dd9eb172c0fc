"""The tuned decoder: its loss, its pictures, and that the VAE is restored."""

import copy

import pytest
import torch

from qalign import AttentionDistillationPipeline, tuned_decoder
from qalign.embedded.scenes import held_out_seed, render
from tests.pipelines.transfers import pictures, seeded
from tests.processors.models import embedded_pipe, make_pipe, quiet


def make(dtype=torch.float32):
    stock = make_pipe("small")
    parts = {
        name: copy.deepcopy(getattr(stock, name)) for name in ("vae", "text_encoder")
    }  # all tests share these
    return quiet(AttentionDistillationPipeline.from_pipe(stock, **parts).to(dtype))


@pytest.fixture(scope="module")
def pipe():
    return make()


def state(pipe):
    """All of the VAE that tuning may change: weights, dtypes, gradients and `requires_grad`."""
    return {
        name: (x.detach().clone(), x.dtype, x.requires_grad, x.grad)
        for name, x in pipe.vae.named_parameters()
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name][0], other[name][0]) and one[name][1:] == other[name][1:], name


def call(pipe, **options):
    return pipe(
        pictures(1)[0],
        pictures(1, seed=1)[0],
        generator=seeded(),
        **{"num_inference_steps": 2, "output_type": "pt", **options},
    )


@pytest.mark.slow
def test_tuning_reproduces_better_and_restores_weights():
    pipe, scene = embedded_pipe(AttentionDistillationPipeline), render([held_out_seed(1)], 64).image
    before, latents = state(pipe), pipe.encode(scene).detach()

    def error():
        with torch.no_grad():
            return (pipe._decode(latents) - (2 * scene - 1)).abs().mean().item()

    stock = error()
    with tuned_decoder(pipe, scene) as losses:
        assert len(losses) == 75 and losses[0] == pytest.approx(stock, rel=1e-5)
        tuned = error()
    assert tuned < 0.75 * stock and error() == stock
    assert_same(state(pipe), before)


def test_tuning_is_adam_on_the_decoders_l1(pipe):
    shown, vae = pictures(2), copy.deepcopy(pipe.vae)
    optimiser, expected = torch.optim.Adam(vae.decoder.parameters(), lr=1e-3), []
    latents = vae.encode(2 * shown - 1).latent_dist.mode().detach()
    for _ in range(4):
        optimiser.zero_grad()
        loss = (vae.decode(latents).sample - (2 * shown - 1)).abs().mean()
        loss.backward()
        optimiser.step()
        expected.append(loss.item())
    original, fixed = (
        pipe.vae.decoder,
        [*pipe.vae.encoder.parameters(), *pipe.vae.post_quant_conv.parameters()],
    )
    with tuned_decoder(pipe, shown, iterations=4, learning_rate=1e-3) as losses:
        assert losses == pytest.approx(expected, rel=2e-5)
        assert pipe.vae.decoder is not original
        assert all(
            each.grad is None and not each.requires_grad
            for each in [*fixed, *original.parameters(), *pipe.vae.decoder.parameters()]
        )
    assert pipe.vae.decoder is original


def test_checkpointing_tiles_and_offloading_change_nothing():
    pipe = make()
    before, plain = state(pipe), call(pipe, tune_decoder=3)
    pipe.vae.enable_gradient_checkpointing()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()  # of larger pictures than these
    assert torch.equal(call(pipe, tune_decoder=3).images, plain.images)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(call(pipe, tune_decoder=3).images, plain.images)
    assert_same(state(pipe), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_errors_leave_the_vae_as_it_was(pipe, monkeypatch, error):
    before, decode, calls = state(pipe), pipe.vae.decode, []

    def fail(*args, **options):
        calls.append(True)
        if len(calls) == 3:
            raise error
        return decode(*args, **options)

    monkeypatch.setattr(pipe.vae, "decode", fail)
    with pytest.raises(error), tuned_decoder(pipe, pictures(1), iterations=5):
        raise AssertionError("the tuning went on")
    monkeypatch.undo()
    assert_same(state(pipe), before)
    with pytest.raises(error), tuned_decoder(pipe, pictures(1), iterations=1):
        raise error
    assert_same(state(pipe), before)


def test_a_vae_in_half_is_tuned_in_float32():
    pipe = make(torch.bfloat16)
    before = state(pipe)
    with tuned_decoder(pipe, pictures(1), iterations=2):
        assert {each.dtype for each in pipe.vae.parameters()} == {torch.float32}
        weights = pipe.vae.decoder.conv_in.weight
        assert not torch.equal(weights, weights.bfloat16().float())
        assert call(pipe).images.isfinite().all()
    assert {each.dtype for each in pipe.vae.parameters()} == {torch.bfloat16}
    assert_same(state(pipe), before)
    assert call(pipe, tune_decoder=2).images.isfinite().all()


def test_call_decodes_same_latents_with_tuned_decoder(pipe):
    style = pictures(1)[0]
    for make_picture in (
        lambda **options: call(pipe, **options),
        lambda **options: pipe.expand(style, 32, 48, generator=seeded(), **options),
    ):
        options = {"output_type": "pt", "num_inference_steps": 1}
        latents, plain = make_picture(**{**options, "output_type": "latent"}).images, make_picture(**options)
        tuned, again = (make_picture(tune_decoder=5, **options) for _ in range(2))
        assert (
            torch.equal(tuned.images, again.images)
            and len(tuned.decoder_losses) == 5
            and len(plain.decoder_losses) == 0
        )
        with tuned_decoder(pipe, style[None], iterations=5) as losses, torch.no_grad():
            expected = pipe._decode(latents) / 2 + 0.5
        assert torch.equal(tuned.images, expected.clamp(0, 1)) and not torch.equal(tuned.images, plain.images)
        assert tuned.decoder_losses.tolist() == pytest.approx(losses, rel=1e-6)
        assert torch.equal(
            make_picture(tune_decoder=5, **{**options, "output_type": "latent"}).images, latents
        )


def test_interrupted_tuning_leaves_the_stock_picture(pipe, monkeypatch):
    plain, decode, calls = call(pipe), pipe.vae.decode, []

    def interrupt(*args, **options):
        calls.append(True)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*args, **options)

    monkeypatch.setattr(pipe.vae, "decode", interrupt)
    result = call(pipe, tune_decoder=5)
    assert result.interrupted and len(result.decoder_losses) == 0 and torch.equal(result.images, plain.images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": -1}, "iterations: expected an integer of at least 0, got -1"),
        ({"iterations": True}, "iterations: expected an integer of at least 0, got True"),
        ({"iterations": 7.5}, "iterations: expected an integer of at least 0, got 7.5"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0, got 0.0"),
    ],
)
def test_bad_arguments_are_one_line(pipe, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"), tuned_decoder(pipe, pictures(1), **options):
        pass


def test_weights_that_are_not_in_memory_are_refused(pipe):
    away = make()
    away.vae = copy.deepcopy(pipe.vae).to("meta")
    with (
        pytest.raises(ValueError, match="^vae: expected its weights in memory"),
        tuned_decoder(away, pictures(1)),
    ):
        pass


def test_a_loss_that_is_not_finite_is_named(pipe):
    before = state(pipe)
    with pytest.raises(FloatingPointError, match="^loss of the decoder: expected finite values"):
        with tuned_decoder(pipe, pictures(1), iterations=3, learning_rate=1e30):
            pass
    assert_same(state(pipe), before)
