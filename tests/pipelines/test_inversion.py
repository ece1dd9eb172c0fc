"""Inversion against ALGORITHMS.md 2.1 written out, against diffusers' scheduler, and there and back."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from safetensors.torch import save_file

from qalign import embedded
from qalign.embedded import scenes
from qalign.sampling import inversion
from qalign.sampling.denoising import denoise_step, require_finite
from qalign.sampling.inversion import Inversion, invert_ddim, invert_ddpm
from tests.processors.models import make_unet

STEPS = 20
IMAGES = 3
KINDS = ("epsilon", "v_prediction", "sample")
CASES = list(itertools.product(KINDS, (True, False)))


def make_scheduler(kind: str = "epsilon", final_is_one: bool = False, **settings) -> DDIMScheduler:
    settings = {"steps_offset": 1, "clip_sample": False, **settings}
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=kind,
        set_alpha_to_one=final_is_one,
        **settings,
    )


def make_predict(dtype: torch.dtype = torch.float32):
    """A tiny UNet, its text fixed, in `dtype`."""
    unet = make_unet("small").to(dtype)
    text = torch.randn(1, 7, unet.config.cross_attention_dim, generator=seeded(5)).to(dtype)
    return torch.no_grad()(
        lambda x, t: unet(x.to(dtype), t, encoder_hidden_states=text.expand(len(x), -1, -1)).sample
    )


def cheap_predict(latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Two convolutions, for properties of every model."""
    weights = torch.randn(2, 4, 4, 3, 3, generator=seeded(6)) / 3
    hidden = torch.tanh(F.conv2d(latents, weights[0], padding=1) + timesteps.view(-1, 1, 1, 1) / 500)
    return F.conv2d(hidden, weights[1], padding=1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_clean(images: int = IMAGES, seed: int = 1) -> torch.Tensor:
    return torch.randn(images, 4, 8, 12, generator=seeded(seed))


def psnr(actual: torch.Tensor, truth: torch.Tensor) -> float:
    peak = truth.max() - truth.min()
    return float(10 * torch.log10(peak**2 / (actual.double() - truth.double()).square().mean()))


def regenerate(found: Inversion, predict, scheduler, start: int = 0) -> list[torch.Tensor]:
    """Latents after each step, from the stored ones before step `start`."""
    latents, trajectory = found.latents[start], []
    for step in range(start, len(found.timesteps)):
        timestep = found.timesteps[step]
        output = predict(latents, timestep.expand(len(latents)))
        noise = None if found.noises is None else found.noises[step]
        latents = denoise_step(scheduler, output, timestep, latents, noise=noise, eta=found.eta)
        trajectory.append(latents)
    return trajectory


def literal(
    predict, kind: str, final_is_one: bool, clean: torch.Tensor, seed: int, eta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """2.1, one timestep and one image at a time, in float64: latents [T + 1, B, ...] and z [T, B, ...]."""
    bars, bar = [], 1.0
    for i in range(1000):
        bar *= 1 - (0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
        bars.append(bar)
    final = 1.0 if final_is_one else bars[0]
    timesteps = [1 + i * (1000 // STEPS) for i in range(STEPS)][::-1]
    generator = seeded(seed)
    columns = []
    for image in clean.double():
        draws = torch.randn(STEPS, *image.shape, generator=generator).double()
        x = [
            math.sqrt(bars[t]) * image + math.sqrt(1 - bars[t]) * draw for t, draw in zip(timesteps, draws)
        ] + [image]
        z = [torch.zeros_like(image) for _ in timesteps]
        for i in reversed(range(STEPS - 1)):  # t ascends; z of the last step stays zero
            t, now = timesteps[i], bars[timesteps[i]]
            before = bars[t - 1000 // STEPS] if t >= 1000 // STEPS else final
            output = predict(x[i][None].float(), torch.tensor([t]))[0].double()
            if kind == "v_prediction":
                output = math.sqrt(now) * output + math.sqrt(1 - now) * x[i]
            elif kind == "sample":
                output = (x[i] - math.sqrt(now) * output) / math.sqrt(1 - now)
            x0 = (x[i] - math.sqrt(1 - now) * output) / math.sqrt(now)
            variance = (1 - before) / (1 - now) * (1 - now / before)
            mean = math.sqrt(before) * x0 + math.sqrt(1 - before - eta * variance) * output
            z[i] = (x[i + 1] - mean) / (eta * math.sqrt(variance))
            x[i + 1] = mean + eta * math.sqrt(variance) * z[i]
        columns.append((torch.stack(x), torch.stack(z)))
    return torch.stack([x for x, _ in columns], 1), torch.stack([z for _, z in columns], 1)


@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("kind, final_is_one", CASES)
def test_ddpm_inversion_is_the_published_loop(kind, final_is_one, eta) -> None:
    clean = make_clean()
    found = invert_ddpm(
        cheap_predict, make_scheduler(kind, final_is_one), clean, steps=STEPS, eta=eta, generator=seeded(7)
    )
    latents, noises = literal(cheap_predict, kind, final_is_one, clean, 7, eta)
    assert found.timesteps.tolist() == [951 - 50 * i for i in range(STEPS)]
    torch.testing.assert_close(found.latents.double(), latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        found.noises.double(), noises, rtol=1e-3, atol=1e-3
    )  # divided by σ: float32 latents near the end allow no more
    assert found.noises[-1].count_nonzero() == 0
    assert torch.equal(found.latents[-1], clean)


@pytest.mark.parametrize(
    "kind, final_is_one, eta", [*(case + (1.0,) for case in CASES), ("v_prediction", False, 0.3)]
)
def test_the_noises_lead_back_to_every_stored_latent(kind, final_is_one, eta) -> None:
    predict, scheduler = make_predict(), make_scheduler(kind, final_is_one)
    found = invert_ddpm(predict, scheduler, make_clean(), steps=STEPS, eta=eta, generator=seeded(0))
    for start in (0, 7):
        trajectory = regenerate(found, predict, scheduler, start)
        for step, latents in enumerate(trajectory[:-1], start):
            assert psnr(latents, found.latents[step + 1]) > 60, step
        assert psnr(trajectory[-1], found.latents[-1]) > (
            30 if kind != "sample" else 0
        )  # an untrained x̂_0 is not the picture


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 30])
def test_every_spacing_leads_back(spacing, steps) -> None:
    predict, scheduler = (
        cheap_predict,
        make_scheduler(
            "v_prediction", timestep_spacing=spacing, rescale_betas_zero_snr=spacing == "trailing"
        ),
    )
    found = invert_ddpm(predict, scheduler, make_clean(), steps=steps, generator=seeded(0))
    assert found.noises.isfinite().all() and found.latents.isfinite().all()
    for step, latents in enumerate(regenerate(found, predict, scheduler)[:-1]):
        assert psnr(latents, found.latents[step + 1]) > 60


@pytest.mark.parametrize("kind, final_is_one", CASES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"steps_offset": 0}, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}],
    ids=str,
)
def test_a_step_is_the_schedulers(kind, final_is_one, settings) -> None:
    scheduler, exact = (
        make_scheduler(kind, final_is_one, **settings),
        make_scheduler(kind, final_is_one, **settings),
    )
    exact.alphas_cumprod, exact.final_alpha_cumprod = (
        exact.alphas_cumprod.double(),
        exact.final_alpha_cumprod.double(),
    )
    for each in (scheduler, exact):
        each.set_timesteps(STEPS)
    output, sample, noise = torch.randn(3, 2, 4, 8, 8, generator=seeded(3), dtype=torch.float64)
    for timestep in scheduler.timesteps:
        if kind == "epsilon" and scheduler.alphas_cumprod[timestep] < 1e-6:
            continue  # ε says nothing about x_0 where all is noise
        for eta in (0.0, 1.0):
            truth = exact.step(
                output, timestep, sample, eta=eta, variance_noise=noise if eta else None
            ).prev_sample
            actual = denoise_step(scheduler, output, timestep, sample, noise=noise if eta else None)
            torch.testing.assert_close(actual.double(), truth, rtol=0, atol=2e-6 * float(truth.abs().max()))
        assert torch.equal(denoise_step(scheduler, output, int(timestep), sample, noise=noise), actual)
        quiet = denoise_step(scheduler, output, timestep, sample, noise=noise, eta=0.0)
        assert torch.equal(quiet, denoise_step(scheduler, output, timestep, sample))


def test_sigma_is_the_schedulers_and_scales_with_eta() -> None:
    scheduler = make_scheduler()
    scheduler.set_timesteps(STEPS)
    zero, noise = torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)
    for timestep in scheduler.timesteps.tolist():
        variance = scheduler._get_variance(timestep, timestep - 1000 // STEPS)
        for eta in (1.0, 0.25):
            deviation = denoise_step(scheduler, zero, timestep, zero, noise=noise, eta=eta)
            torch.testing.assert_close(deviation, (eta * variance**0.5).expand_as(noise), rtol=1e-3, atol=0)


def test_half_precision_inputs_are_computed_in_float32() -> None:
    scheduler = make_scheduler()
    scheduler.set_timesteps(STEPS)
    output, sample, noise = torch.randn(3, 2, 4, 8, 8, generator=seeded(3)).half()
    actual = denoise_step(scheduler, output, 501, sample, noise=noise)
    assert actual.dtype == torch.float32
    assert torch.equal(
        actual, denoise_step(scheduler, output.float(), 501, sample.float(), noise=noise.float())
    )


def test_noise_is_normal_and_new_every_timestep() -> None:
    scheduler, clean = make_scheduler(), make_clean(2)
    found = invert_ddpm(cheap_predict, scheduler, clean, steps=STEPS, generator=seeded(4))
    alpha = scheduler.alphas_cumprod[found.timesteps].view(-1, 1, 1, 1, 1)
    draws = ((found.latents[:-1] - alpha.sqrt() * clean) / (1 - alpha).sqrt()).flatten(2).flatten(0, 1)
    correlation = draws @ draws.T / draws.shape[1]
    bound = 6 / draws.shape[1] ** 0.5
    assert (correlation - torch.eye(len(draws))).abs().max() < bound


def test_batch_size_and_company_do_not_matter() -> None:
    predict, scheduler, clean = cheap_predict, make_scheduler("v_prediction"), make_clean()
    whole = invert_ddpm(predict, scheduler, clean, steps=STEPS, generator=seeded(2), batch_size=1000)
    for batch_size in (1, 7):
        again = invert_ddpm(
            predict, scheduler, clean, steps=STEPS, generator=seeded(2), batch_size=batch_size
        )
        torch.testing.assert_close(again.latents, whole.latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(again.noises, whole.noises, rtol=0, atol=1e-3)
    alone = invert_ddpm(predict, scheduler, clean[:1], steps=STEPS, generator=seeded(2))
    torch.testing.assert_close(alone.latents, whole.latents[:, :1], rtol=0, atol=1e-5)
    each = invert_ddpm(predict, scheduler, clean, steps=STEPS, generator=[seeded(8), seeded(2), seeded(9)])
    second = invert_ddpm(predict, scheduler, clean[1:2], steps=STEPS, generator=seeded(2))
    torch.testing.assert_close(each.latents[:, 1:2], second.latents, rtol=0, atol=1e-5)


def test_predictions_keep_timesteps_whole_and_images_ordered() -> None:
    calls, done, clean = [], [], make_clean(2)

    def predict(latents, timesteps):
        calls.append((latents.clone(), timesteps.tolist()))
        return torch.zeros_like(latents)

    found = invert_ddpm(
        predict, make_scheduler(), clean, steps=5, generator=seeded(0), batch_size=5, progress=done.append
    )
    assert [timesteps for _, timesteps in calls] == [[1, 1], [401, 401, 201, 201], [801, 801, 601, 601]]
    torch.testing.assert_close(calls[1][0], found.latents[2:4].flatten(0, 1), rtol=0, atol=1e-6)
    assert done == [1, 2, 2]


def test_ddim_inversion_of_constant_models_undoes_exactly() -> None:
    constant = torch.randn(1, 4, 8, 12, generator=seeded(6))
    for final_is_one in (True, False):
        scheduler = make_scheduler("epsilon", final_is_one)
        found = invert_ddim(lambda x, t: constant.expand_as(x), scheduler, make_clean(), steps=STEPS)
        alpha = scheduler.alphas_cumprod[found.timesteps].view(-1, 1, 1, 1, 1)
        clean = (found.latents[:-1] - (1 - alpha).sqrt() * constant) / alpha.sqrt()
        start = 1.0 if final_is_one else float(scheduler.alphas_cumprod[0])
        expected = (make_clean() - (1 - start) ** 0.5 * constant) / start**0.5  # one x̂_0 all the way
        torch.testing.assert_close(clean, expected.expand_as(clean), rtol=0, atol=1e-4)
        trajectory = regenerate(found, lambda x, t: constant.expand_as(x), scheduler)
        assert all(psnr(latents, truth) > 90 for latents, truth in zip(trajectory, found.latents[1:]))


@pytest.mark.parametrize("invert", [invert_ddpm, invert_ddim])
def test_latents_are_never_clipped(invert) -> None:
    def latents(scheduler):
        seed = {"generator": seeded(0)} if invert is invert_ddpm else {}
        return invert(cheap_predict, scheduler, make_clean(), steps=4, **seed).latents

    assert torch.equal(
        latents(make_scheduler(clip_sample=True, thresholding=True)), latents(make_scheduler())
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_ddim_inversion_gets_nearer_with_more_steps(kind) -> None:
    predict, scheduler, quality = make_predict(), make_scheduler(kind), {}
    for steps in (10, 60):
        found = invert_ddim(predict, scheduler, make_clean(1), steps=steps)
        assert found.noises is None and found.latents.shape[0] == steps + 1
        quality[steps] = psnr(regenerate(found, predict, scheduler)[-1], make_clean(1))
    assert quality[60] > max(22, quality[10] + 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("invert", [invert_ddpm, invert_ddim])
def test_half_precision_models_stay_finite_and_lead_back(invert, dtype) -> None:
    predict, scheduler, clean = make_predict(dtype), make_scheduler("v_prediction"), make_clean(1)
    options = {"generator": seeded(0)} if invert is invert_ddpm else {}
    found = invert(predict, scheduler, clean.to(dtype), steps=30, **options)
    assert found.latents.dtype == torch.float32 and found.latents.isfinite().all()
    assert psnr(regenerate(found, predict, scheduler)[-1], clean) > 25


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, size, steps", [(torch.float32, 128, 20), (torch.bfloat16, 64, 3), (torch.float16, 64, 3)]
)
def test_the_embedded_model_reconstructs_a_held_out_scene(dtype, size, steps) -> None:
    pipe = embedded.load(dtype)
    picture = scenes.render([scenes.held_out_seed(0)], size).image.to(dtype)
    text = pipe.encode_prompt("", "cpu", 1, False)[0]

    @torch.no_grad()
    def predict(latents, timesteps):
        return pipe.unet(
            latents.to(dtype), timesteps, encoder_hidden_states=text.expand(len(latents), -1, -1)
        ).sample

    with torch.no_grad():
        clean = pipe.vae.encode(2 * picture - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
    found = invert_ddpm(predict, pipe.scheduler, clean, steps=steps, generator=seeded(0))
    trajectory = regenerate(found, predict, pipe.scheduler)
    assert all(latents.isfinite().all() for latents in trajectory)
    if dtype == torch.float32:
        assert all(psnr(latents, truth) > 60 for latents, truth in zip(trajectory[:-1], found.latents[1:]))
        assert psnr(trajectory[-1], found.latents[-1]) > 30


@pytest.mark.parametrize("invert", [invert_ddpm, invert_ddim])
def test_a_model_that_overflows_is_named_with_advice(invert) -> None:
    def predict(latents, timesteps):
        return torch.full_like(latents, 1e4).half() * 10

    with pytest.raises(
        FloatingPointError, match=r"^model output: .*float16.*bfloat16.*VAE.*float32.*upcast_attention"
    ) as raised:
        invert(predict, make_scheduler(), make_clean(), steps=2)
    assert "\n" not in str(raised.value)


def test_require_finite_counts_values_that_are_not() -> None:
    good, bad = torch.zeros(2, 3), torch.tensor([0.0, math.nan, math.inf, -math.inf])
    assert require_finite(good, "latents", torch.float32) is good
    with pytest.raises(FloatingPointError, match=r"^latents: expected finite values, got 3 of 4 .*weights"):
        require_finite(bad, "latents", torch.bfloat16)


@pytest.mark.parametrize("invert", [invert_ddpm, invert_ddim])
def test_saved_and_loaded_is_the_same(invert, tmp_path) -> None:
    found = invert(cheap_predict, make_scheduler(), make_clean(), steps=4)
    found.save(tmp_path / "new" / "a.safetensors")
    again = Inversion.load(str(tmp_path / "new" / "a.safetensors"))
    assert (again.kind, again.eta) == (found.kind, found.eta)
    for name in ("latents", "noises", "timesteps"):
        one, two = getattr(found, name), getattr(again, name)
        assert (one is None and two is None) or (one.dtype == two.dtype and torch.equal(one, two))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.safetensors"]


def test_eta_is_saved_to_the_last_digit(tmp_path) -> None:
    found = invert_ddpm(lambda x, t: x, make_scheduler(), make_clean(), steps=2, eta=1 / 3)
    found.save(tmp_path / "a")
    assert Inversion.load(tmp_path / "a").eta == 1 / 3


def test_an_interrupted_save_leaves_the_old_file(monkeypatch, tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    old = invert_ddim(lambda x, t: x, make_scheduler(), make_clean(), steps=2)
    old.save(path)

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(inversion, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        invert_ddim(lambda x, t: -x, make_scheduler(), make_clean(), steps=2).save(path)
    assert torch.equal(Inversion.load(path).latents, old.latents)
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_files_are_refused_in_one_line(tmp_path) -> None:
    whole = tmp_path / "whole"
    invert_ddpm(lambda x, t: x, make_scheduler(), make_clean(), steps=2).save(whole)
    metadata = {"format": "qalign.inversion.1", "kind": "ddpm", "eta": "1.0"}
    contents = {"text": b"no tensors here\n" * 9, "empty": b"", "cut": whole.read_bytes()[:-9]}
    tensors = {
        "latents": torch.zeros(3, 1, 4, 8, 8),
        "noises": torch.zeros(2, 1, 4, 8, 8),
        "timesteps": torch.tensor([501, 1]),
    }
    foreign = {
        "foreign": (tensors, None),
        "short": ({**tensors, "noises": torch.zeros(1, 1, 4, 8, 8)}, metadata),
        "without": ({"latents": tensors["latents"]}, metadata),
        "kind": (tensors, {**metadata, "kind": "edm"}),
        "eta": (tensors, {**metadata, "eta": "one"}),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name, (content, data) in foreign.items():
        save_file(content, tmp_path / name, metadata=data)
    for name in (*contents, *foreign):
        with pytest.raises(
            ValueError, match=rf"^path: expected a file written by Inversion.save, got '.*{name}' \(.+\)$"
        ) as raised:
            Inversion.load(tmp_path / name)
        assert "\n" not in str(raised.value)
    for absent in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError, match="which does not exist"):
            Inversion.load(absent)


def test_bad_arguments_are_named() -> None:
    def predict(latents, timesteps):
        return torch.cat([latents, latents], 1)  # a model with learned variances

    clean, scheduler = make_clean(), make_scheduler()
    with pytest.raises(
        TypeError,
        match=r"^scheduler: expected a DDIMScheduler \(DDIMScheduler.from_config.*got EulerDiscreteScheduler",
    ):
        invert_ddpm(predict, EulerDiscreteScheduler(), clean, steps=2)
    with pytest.raises(ValueError, match="^scheduler: expected set_timesteps"):
        denoise_step(scheduler, clean, 1, clean)
    with pytest.raises(ValueError, match=r"^output: expected \[3, 4, 8, 12\] .*got \[3, 8, 8, 12\]"):
        invert_ddpm(predict, scheduler, clean, steps=1)
    for bad in (
        {"steps": 0},
        {"steps": 2.0},
        {"steps": 2, "eta": 0.0},
        {"steps": 2, "eta": 1.1},
        {"steps": 2, "generator": [seeded(0)]},
    ):
        with pytest.raises(ValueError, match=rf"^{list(bad)[-1]}: expected"):
            invert_ddpm(predict, scheduler, clean, **bad)
    with pytest.raises(
        ValueError,
        match=r"^clean: expected floating-point latents \[B, C, h, w\], got torch.float32 \[4, 8, 12\]",
    ):
        invert_ddim(predict, scheduler, clean[0], steps=2)
    with pytest.raises(FloatingPointError, match="^clean latents: "):
        invert_ddim(predict, scheduler, clean * math.nan, steps=2)
