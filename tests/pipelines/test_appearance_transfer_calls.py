"""AppearanceTransferPipeline around a call: given and cached inversions, callbacks, interrupts, no traces."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DDIMScheduler

from qalign import FeatureBank, SeAl
from qalign.sampling.inversion import Inversion
from qalign.sampling.inversion_cache import digest
from tests.pipelines.transfers import PROMPT, make, own, pictures, seeded, transfer, watch
from tests.processors.models import self_attention

# inversions: given, cached


def test_a_given_inversion_is_what_the_call_makes(small, pair, tmp_path) -> None:
    pair.save(tmp_path / "pair.safetensors")
    loaded = Inversion.load(tmp_path / "pair.safetensors")
    alone = small(None, None, PROMPT, inversion=loaded, adain="whole", output_type="latent").images
    assert torch.equal(alone, transfer(small).images)


def test_cached_inversions_are_not_made_again(small, tmp_path, monkeypatch) -> None:
    inversions, loop = watch(small, monkeypatch), 4
    first = transfer(small, cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 and len(inversions) > loop
    inversions.clear()
    again = transfer(small, cache=tmp_path)
    assert len(inversions) == loop and torch.equal(first.images, again.images)
    assert torch.equal(first.images, transfer(small).images)
    inversions.clear()
    transfer(small, pictures(2, seed=1), cache=tmp_path, method=None)
    assert sum(map(len, inversions)) == 5 * loop + 2 * 6, "the second structure alone, with guidance"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a horse"},
        {"num_inference_steps": 3},
        {"inversion_guidance_scale": 2.0},
        {"freeu": True},
        {"inversion": "ddim"},
        {"generator": None},
        "weights",
        "scheduler",
        "official FreeU",
    ],
    ids=str,
)
def test_whatever_changes_an_inversion_makes_a_new_one(tmp_path, change) -> None:
    pipe = make()

    def files(**options) -> set:
        settings = {"prompt": PROMPT, "num_inference_steps": 2, "generator": seeded(), "cache": tmp_path}
        pipe.invert(pictures(1)[0], pictures(1, seed=1), **{**settings, **options})
        return {path.name for path in tmp_path.iterdir()}

    first, options = files(), change if isinstance(change, dict) else {}
    if change == "weights":
        pipe.unet.conv_out.bias.data += 1
    elif change == "scheduler":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False)
    elif change == "official FreeU":
        pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    second = files(**options)
    assert len(first) == 2 and len(second) == 4 and files(**options) == second


def test_other_noise_is_another_inversion(small, tmp_path) -> None:
    for seed, files in ((0, 2), (1, 4), (0, 4)):
        transfer(small, generator=seeded(seed), cache=tmp_path)
        assert len(list(tmp_path.iterdir())) == files


def test_without_a_generator_any_cached_noise_serves(small, tmp_path) -> None:
    images = [transfer(small, cache=tmp_path, generator=None).images for _ in range(2)]
    assert torch.equal(*images) and len(list(tmp_path.iterdir())) == 2
    assert not torch.equal(*(transfer(small, generator=None).images for _ in range(2)))


def test_spoilt_cache_file_is_remade_with_one_warning(small, tmp_path, caplog) -> None:
    smooth = {"cache": tmp_path, "method": "cross_image"}  # rounding changes no choice of tokens
    first = transfer(small, **smooth)
    spoilt = min(tmp_path.iterdir())
    spoilt.write_bytes(spoilt.read_bytes()[:100])
    torch.testing.assert_close(transfer(small, **smooth).images, first.images, rtol=1e-4, atol=1e-4)
    messages = [message for message in caplog.messages if message.startswith("cache:")]
    assert len(messages) == 1 and spoilt.name in messages[0] and "\n" not in messages[0]
    transfer(small, **smooth)
    assert len(list(tmp_path.iterdir())) == 2
    assert len([message for message in caplog.messages if message.startswith("cache:")]) == 1


def test_digest_depends_on_values_dtypes_and_order() -> None:
    tensor = torch.arange(6.0)
    different = [
        digest(tensor),
        digest(tensor.view(2, 3)),
        digest(tensor + 1e-6),
        digest(1, 2),
        digest(2, 1),
        digest([1, 2]),
        digest({"a": tensor}),
        digest(None),
    ]
    assert len(set(different)) == len(different)
    assert digest({"a": 1, "b": {"c": tensor}}) == digest({"b": {"c": tensor.clone()}, "a": 1})


# callbacks, interrupts, what stays behind


def test_callbacks_see_steps_and_may_replace_latents(small, pair) -> None:
    seen = []

    def zero(pipe, step, timestep, given):
        seen.append((step, int(timestep), sorted(given)))
        return {"latents": torch.zeros_like(given["latents"])} if step == 3 else {}

    result = transfer(small, inversion=pair, callback_on_step_end=zero)
    scheduler = DDIMScheduler.from_config(small.scheduler.config)
    scheduler.set_timesteps(6)
    assert seen == [
        (step, timestep, ["latents"]) for step, timestep in enumerate(scheduler.timesteps.tolist()[2:])
    ]
    assert not result.images.any()


def test_interrupt_ends_the_loop(small, pair) -> None:
    seen = []

    def stop(pipe, step, timestep, given):
        seen.append(given)
        pipe._interrupt = True

    transfer(small, inversion=pair, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=())
    assert seen == [{}]
    transfer(small, inversion=pair, callback_on_step_end=lambda pipe, step, *given: seen.append(step))
    assert seen[1:] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_interrupt_ends_the_inversion_too(small, kind, tmp_path) -> None:
    calls = []

    def interrupt(module, given):
        calls.append(1)
        small._interrupt = len(calls) == 2

    settings = {"num_inference_steps": 6, "inversion": kind, "cache": tmp_path}
    for run in (transfer, lambda pipe, **options: pipe.invert(*pictures(2), PROMPT, **options)):
        calls.clear()
        hook = small.unet.register_forward_pre_hook(interrupt)
        with pytest.raises(
            RuntimeError, match="interrupt: expected the inversion to run to its end, got pipe"
        ):
            run(small, **settings)
        hook.remove()
        assert len(calls) == 2 and list(tmp_path.iterdir()) == []
    assert transfer(small, inversion=kind).images.isfinite().all()  # the flag is of one call


def test_few_steps_are_warned_of_before_the_inversion(small, caplog) -> None:
    from_unet = []
    hook = small.unet.register_forward_pre_hook(lambda *given: from_unet.append(len(caplog.messages)))
    for steps, expected in (
        (1, "QAlign: it edits none of 1 steps, as steps=(0.162, 1) holds none"),
        (2, "QAlign: in all of its 1 of 2 steps it reads the structure, not the appearance"),
    ):
        caplog.clear()
        transfer(small, method="qalign", num_inference_steps=steps, skip=0.0, adain=None)
        assert caplog.messages == [expected]
    caplog.clear()
    transfer(small, method="qalign", num_inference_steps=3, skip=0.0)
    assert caplog.messages == [] and from_unet[0] == 1
    transfer(small, method=None, num_inference_steps=1, skip=0.0, adain="whole")
    hook.remove()
    assert caplog.messages == ["adain: it has no effect, as none of 1 steps reaches adain_start=0.294"]


def test_progress_bars_count_the_inversion_and_the_loop(small, monkeypatch) -> None:
    bars = []

    class Bar:
        def __init__(self, total):
            self.total, self.done = total, 0
            bars.append(self)

        def update(self, count=1):
            self.done += count

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731

    monkeypatch.setattr(small, "progress_bar", lambda total: Bar(total))
    for inversion in ("ddpm", "ddim"):
        transfer(small, inversion=inversion)
    assert [(bar.total, bar.done) for bar in bars] == [(6, 6), (4, 4)] * 2


def test_calls_and_exceptions_leave_everything_as_before(small) -> None:
    def state():
        hooks = Counter(
            name
            for name, module in small.unet.named_modules()
            for _ in (*module._forward_hooks, *module._forward_pre_hooks)
        )
        return (
            {name: id(layer.processor) for name, layer in self_attention(small.unet).items()},
            hooks,
            dict(vars(small.scheduler)),
        )

    before = state()
    transfer(small, freeu=True, adain="masked")
    assert state() == before
    with pytest.raises(ZeroDivisionError):
        transfer(small, freeu=True, callback_on_step_end=lambda *given: 1 / 0)
    assert state() == before


def test_offloading_hooks_run_in_order_and_are_freed(monkeypatch) -> None:
    pipe, order = own(make()), []

    class Note(ModelHook):
        def __init__(self, name):
            self.name = name

        def pre_forward(self, module, *args, **kwargs):
            order.extend([self.name] if order[-1:] != [self.name] else [])
            return args, kwargs

    for name in ("text_encoder", "unet", "vae"):
        add_hook_to_module(getattr(pipe, name), Note(name))
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: order.append("free"))
    transfer(pipe, output_type="pt")
    assert order == ["vae", "text_encoder", "unet", "free", "text_encoder", "unet", "vae", "free"]


# a noise-free pass


def test_noise_free_appearance_is_always_its_clean_latents(pair) -> None:
    """The result is that of clean latents in the appearance's row at each UNet call."""
    pipe = make("sd15")
    clean = pair.latents[-1, 0]
    latents = pair.latents.clone()
    latents[:, 0] = clean
    set_back = replace(pair, latents=latents)

    def back(pipe, step, timestep, given):
        given["latents"][1] = clean
        return given

    options = {"adain": None, "edit_steps": (0.2, 1)}
    expected = transfer(pipe, inversion=set_back, method=SeAl(), callback_on_step_end=back, **options).images
    bank = FeatureBank("appearance")
    method = pipe.noise_free("seal", pair, PROMPT, edit_steps=(0.2, 1), bank=bank)
    served = transfer(pipe, inversion=pair, method=method, **options)
    torch.testing.assert_close(served.images, expected, rtol=0, atol=2e-5)
    assert bank.nbytes > 0 and served.reconstructions.isfinite().all()
    assert not torch.allclose(
        transfer(pipe, inversion=pair, method=SeAl(), **options).images, expected, atol=1e-3
    )


def test_noise_free_refuses_non_methods_and_other_banks(small, pair) -> None:
    for method, bank in ((None, None), ("seal", FeatureBank("structure"))):
        with pytest.raises(
            ValueError, match="method, bank: expected a method and a bank of the appearance, got"
        ):
            small.noise_free(method, pair, PROMPT, bank=bank)
