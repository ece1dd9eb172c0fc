"""AppearanceTransferPipeline: what enters the UNet, what comes out, at which steps, and that nothing is left behind."""

import copy
import dataclasses
import functools
from collections import Counter

import numpy
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, PNDMScheduler, UNet2DModel
from PIL import Image

import qalign
from qalign import AppearanceTransferPipeline, AppearanceTransferXLPipeline, CrossImage, QAlign
from qalign.embedded.scenes import held_out_seed, render
from qalign.inversion import Inversion
from qalign.masks import MapCollector, noun_tokens, object_masks
from qalign.pipelines import appearance_transfer
from qalign.pipelines.inversion_cache import digest
from qalign.pipelines.pictures import cover, to_tensors
from tests.processors.models import make_pipe, self_attention

PIXELS = 32  # 16 x 16 latents: the tiny VAE halves once
PROMPT = "a zebra"


def make(family: str = "small"):
    pipe = AppearanceTransferPipeline.from_pipe(make_pipe(family))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own(pipe):
    """The same with networks that no other test shares."""
    copies = {name: copy.deepcopy(part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    pipe = AppearanceTransferPipeline.from_pipe(pipe, **copies)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def small():
    """A UNet of one block; tests leave it as it was."""
    return make()


@pytest.fixture(scope="module")
def pair(small) -> Inversion:
    """That of `transfer`'s default pair, which then does nothing but denoise it."""
    return small.invert(pictures(1)[0], pictures(1, seed=1), PROMPT, num_inference_steps=6, generator=seeded())


def pictures(count: int, height: int = PIXELS, width: int = PIXELS, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bilinear")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def transfer(pipe, structures: torch.Tensor | None = None, **options):
    appearance, structure = pictures(1)[0], pictures(1, seed=1) if structures is None else structures
    defaults = {"prompt": PROMPT, "num_inference_steps": 6, "output_type": "latent", "adain": "whole", "generator": seeded()}
    return pipe(appearance, structure, **{**defaults, **options})


def watch(pipe, monkeypatch) -> list[torch.Tensor]:
    """The samples that the UNet gets from here on."""
    samples, forward = [], pipe.unet.forward

    def record(sample, *args, **kwargs):
        samples.append(sample)
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", record)
    return samples


def trajectory(pipe, **options) -> torch.Tensor:
    """[steps, rows, C, h, w], the latents after each step."""
    latents = []

    def keep(pipe, step, timestep, given):
        latents.append(given["latents"])

    transfer(pipe, callback_on_step_end=keep, **options)
    return torch.stack(latents)


@dataclasses.dataclass(frozen=True)
class Recording(CrossImage):
    """Cross-Image attention that notes the steps that it edits, and those at which it reads the structure."""

    edited: list = dataclasses.field(default_factory=list)
    structure: list = dataclasses.field(default_factory=list)

    def edit(self, q, k, v, output, reference, site):
        self.edited.append(site.clock.step)
        self.structure.extend([site.clock.step] if site.clock.from_structure else [])
        return super().edit(q, k, v, output, reference, site)


# what is computed


@pytest.mark.parametrize(("family", "prediction_type"), [("sd15", "epsilon"), ("sd21", "v_prediction"), ("sdxl", "epsilon")])
def test_without_an_edit_the_output_is_the_structure_and_the_inversion_is_walked_back(family, prediction_type) -> None:
    pipe = make(family)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction_type)
    options = {"method": None, "adain": None, "inversion_guidance_scale": 1.0}
    inverted = pipe.invert(pictures(1)[0], pictures(1, seed=1), PROMPT, num_inference_steps=6, inversion_guidance_scale=1.0, generator=seeded())
    steps = trajectory(pipe, **options)
    assert steps.shape == (4, 3, 4, 16, 16) and steps.dtype == torch.float32
    assert torch.equal(steps[:, 0], steps[:, 2])
    torch.testing.assert_close(steps[:-1, 1:], inverted.latents[3:-1], rtol=1e-4, atol=1e-4)
    result = transfer(pipe, **options)
    assert torch.equal(result.images[0], result.reconstructions[1]) and torch.equal(result.reconstructions, steps[-1, 1:]) and result.masks is None


@pytest.mark.parametrize("family", ["small", "sdxl"])
def test_several_structures_are_as_many_calls(family) -> None:
    pipe, structures = make(family), pictures(2, seed=1)
    together = transfer(pipe, structures, num_inference_steps=3)
    assert together.images.shape[0] == 2 and together.reconstructions.shape[0] == 3
    for structure, image, reconstruction in zip(structures, together.images, together.reconstructions[1:]):
        alone = transfer(pipe, structure, num_inference_steps=3)
        torch.testing.assert_close(alone.images[0], image, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.reconstructions[1], reconstruction, rtol=1e-4, atol=1e-4)
    assert (together.images[0] - together.images[1]).abs().max() > 0.1


def test_one_generator_for_each_picture(small) -> None:
    structures = pictures(2, seed=1)
    together = transfer(small, structures, generator=[seeded(5), seeded(6), seeded(7)])
    alone = transfer(small, structures[1:], generator=[seeded(5), seeded(7)])
    torch.testing.assert_close(together.images[1], alone.images[0], rtol=1e-4, atol=1e-4)


def test_rows_of_one_call(small, monkeypatch) -> None:
    inverted = small.invert(pictures(1)[0], pictures(2, seed=1), PROMPT, num_inference_steps=6, generator=seeded())
    samples = watch(small, monkeypatch)
    transfer(small, inversion=inverted, method=CrossImage(structure_every=0))
    assert [len(sample) for sample in samples] == [7] * 4
    for sample in samples:
        assert torch.equal(sample[:2], sample[2:4])
    first, later = samples[0], samples[-1]
    assert torch.equal(first[4:], inverted.latents[2]) and torch.equal(first[:2], inverted.latents[2, 1:])
    assert not torch.allclose(later[:2], later[5:], atol=1e-2)
    samples.clear()
    transfer(small, inversion=inverted, swap_guidance_scale=1.0)
    assert [len(sample) for sample in samples] == [5] * 4


def test_one_call_with_plain_rows_is_two_calls_with_and_without_the_edit(monkeypatch) -> None:
    pipe, scale = make("sd15"), 2.0
    inverted = pipe.invert(pictures(1)[0], pictures(1, seed=1), PROMPT, num_inference_steps=4, generator=seeded())
    options = {"inversion": inverted, "adain": None, "skip": 0.5, "edit_steps": (0.0, 1.0), "guidance_start": 0.0}
    outputs = {}
    for name, method, swap in (("guided", "qalign", scale), ("edited", "qalign", 1.0), ("plain", None, 1.0)):
        forward, seen = pipe.unet.forward, []
        with monkeypatch.context() as patch:
            patch.setattr(pipe.unet, "forward", lambda *args, forward=forward, seen=seen, **kwargs: seen.append(forward(*args, **kwargs)) or seen[-1])
            outputs[name] = trajectory(pipe, method=method, swap_guidance_scale=swap, **options)[0]
    # a step is affine in the prediction, so guidance of predictions is guidance of what the step makes of them
    expected = outputs["plain"] + scale * (outputs["edited"] - outputs["plain"])
    torch.testing.assert_close(outputs["guided"], expected, rtol=1e-4, atol=1e-4)
    assert (outputs["guided"][0] - outputs["plain"][0]).abs().max() > 1e-3


def test_ddim_inversion_is_walked_back_by_ddim(small) -> None:
    inverted = small.invert(pictures(1)[0], pictures(1, seed=1), PROMPT, num_inference_steps=6, inversion="ddim", inversion_guidance_scale=1.0)
    assert inverted.noises is None
    scheduler = DDIMScheduler.from_config(small.scheduler.config)
    scheduler.set_timesteps(6)
    latents, embeddings = inverted.latents[2], small.encode_prompt(PROMPT, "cpu", 1, False)[0].expand(2, -1, -1)
    steps = trajectory(small, inversion=inverted, method=None, adain=None)
    for timestep, made in zip(scheduler.timesteps[2:], steps):
        with torch.no_grad():
            latents = scheduler.step(small.unet(latents, timestep, embeddings).sample, timestep, latents).prev_sample
        torch.testing.assert_close(made[1:], latents, rtol=1e-4, atol=1e-4)


def test_guidance_of_the_inversion(small, monkeypatch) -> None:
    """Edit-friendly noises of the first step, by hand: (x_{t-1} - μ) / σ with μ of the guided prediction."""
    options = {"num_inference_steps": 2, "generator": seeded(3)}
    inverted = small.invert(pictures(1)[0], pictures(1, seed=1), PROMPT, inversion_guidance_scale=3.5, **options)
    condition, empty = small.encode_prompt(PROMPT, "cpu", 1, True)
    sample, timestep = inverted.latents[0], inverted.timesteps[0]
    with torch.no_grad():
        with_prompt, without = (small.unet(sample, timestep, each.expand(2, -1, -1)).sample for each in (condition, empty))
    scheduler = DDIMScheduler.from_config(small.scheduler.config)
    scheduler.set_timesteps(2)
    stepped = scheduler.step(
        without + 3.5 * (with_prompt - without), timestep, sample, eta=1.0, variance_noise=inverted.noises[0]
    ).prev_sample  # eta = 1, where η and η² are the same
    torch.testing.assert_close(stepped, inverted.latents[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("steps", "skip", "edited", "structure"), [(25, 0.32, range(3, 17), [6]), (20, 0.0, range(4, 20), [6, 11]), (3, 0.0, [1, 2], [1])]
)
def test_steps_of_the_edit(small, steps, skip, edited, structure) -> None:
    method = Recording()
    transfer(small, num_inference_steps=steps, skip=skip, method=method, adain=None)
    assert sorted(set(method.edited)) == list(edited)
    assert sorted(set(method.structure)) == structure


# AdaIN and its masks


def test_adain_inside_masks_from_its_step_on(small, pair, monkeypatch) -> None:
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, :6], masks[1, 9:] = True, True
    monkeypatch.setattr(appearance_transfer, "object_masks", lambda maps, noun: masks)
    without, masked, whole = (trajectory(small, inversion=pair, adain=adain) for adain in (None, "masked", "whole"))
    assert torch.equal(without[:2], masked[:2]) and torch.equal(without[:2], whole[:2]), "before 20/68 of 4 steps"
    (output, appearance, structure), plain = masked[2], without[2]
    assert torch.equal(output[:, ~masks[1]], plain[0][:, ~masks[1]]) and torch.equal(appearance, plain[1]) and torch.equal(structure, plain[2])
    for moment in (torch.mean, torch.std):
        torch.testing.assert_close(moment(output[:, masks[1]], -1), moment(appearance[:, masks[0]], -1), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(moment(whole[2, 0].flatten(1), -1), moment(appearance.flatten(1), -1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(masked[3, 0][:, masks[1]].mean(-1), masked[3, 1][:, masks[0]].mean(-1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["small", "sdxl"])
def test_masks_are_those_of_the_pictures_own_attention(family) -> None:
    pipe = make(family)
    inverted = pipe.invert(pictures(1)[0], pictures(2, seed=1), PROMPT, num_inference_steps=6, generator=seeded())
    options = {"inversion": inverted, "adain": "masked", "noun": "zebra"}
    steps, masks = trajectory(pipe, **options), transfer(pipe, **options).masks
    rows, tokens = steps[1, 2:], 256 if family == "small" else None  # 20/68 of 4 steps: the third, so the latents after the second
    condition = appearance_transfer._expand(pipe.conditions(PROMPT, PIXELS, PIXELS)[0], 3)
    with torch.no_grad(), MapCollector(pipe, self_tokens=tokens) as collector:
        pipe.unet(rows, inverted.timesteps[4], **condition)
    assert masks.shape == (3, 16, 16) and masks.dtype == torch.bool
    assert torch.equal(masks, object_masks(collector.maps(), noun_tokens(pipe.tokenizer, PROMPT, "zebra")))


def test_without_a_prompt_the_whole_picture_is_the_object(small) -> None:
    masked = transfer(small, prompt="", adain="masked")
    assert masked.masks.all()
    torch.testing.assert_close(masked.images, transfer(small, prompt="").images)


# sizes, dtypes, kinds of pictures


@pytest.mark.parametrize(("height", "width"), [(32, 48), (40, 24)])
def test_sizes_that_are_not_square(height, width) -> None:
    pipe = make("sd15")
    result = transfer(pipe, pictures(1, height, width, seed=1), num_inference_steps=3, adain="masked", output_type="pt")
    assert result.images.shape == (1, 3, height, width) and result.images.isfinite().all()
    assert result.masks.shape == (2, height // 2, width // 2)


def test_pictures_of_another_size_cover_that_of_the_first_structure(small) -> None:
    wide = pictures(1, 64, 96)[0]
    inverted = small.invert(wide, [pictures(1, seed=1)[0], pictures(1, 40, 64)[0]], num_inference_steps=2, generator=seeded())
    assert inverted.latents.shape == (3, 3, 4, 16, 16)
    middle = F.interpolate(wide.unsqueeze(0), (32, 48), mode="bicubic", antialias=True)[0, :, :, 8:40].clamp(0, 1)
    assert torch.equal(cover(wide, (32, 32)), middle)
    assert small.invert(wide, wide, num_inference_steps=2, width=48, height=32).latents.shape[-2:] == (16, 24)


def test_every_kind_of_picture_is_the_same_tensor() -> None:
    array = numpy.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=numpy.uint8)
    expected = torch.from_numpy(array).permute(2, 0, 1) / 255
    kinds = [array, array / numpy.float32(255), Image.fromarray(array), expected, torch.from_numpy(array).permute(2, 0, 1)]
    for kind in [*kinds, [Image.fromarray(array)], array[None], expected[None]]:
        (tensor,) = to_tensors(kind, "structure")
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-7)
    assert len(to_tensors(kinds, "structure")) == len(kinds)
    grey = Image.fromarray(array).convert("L")
    assert to_tensors(grey, "structure")[0].shape == (3, 8, 16)


@pytest.mark.parametrize(("family", "dtype"), [("small", torch.float16), ("small", torch.bfloat16), ("sdxl", torch.bfloat16)])
def test_half_precision_keeps_the_latents_in_float32(family, dtype, monkeypatch) -> None:
    exact = transfer(make(family), method=None, adain=None).reconstructions
    pipe = own(make(family)).to(dtype)
    samples = watch(pipe, monkeypatch)
    result = transfer(pipe, method=None, adain=None)
    assert {sample.dtype for sample in samples} == {dtype} and result.images.dtype == torch.float32
    assert (result.reconstructions - exact).abs().mean() < 0.15 * exact.abs().mean()
    assert transfer(pipe, output_type="pt").images.isfinite().all() and pipe.vae.dtype == dtype


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_output_types(small, pair, output_type) -> None:
    images, reconstructions = transfer(small, inversion=pair, output_type=output_type, return_dict=False)
    assert len(images) == 1 and len(reconstructions) == 2
    shape = {"pil": (PIXELS, PIXELS), "np": (PIXELS, PIXELS, 3), "pt": (3, PIXELS, PIXELS)}[output_type]
    assert (images[0].size if output_type == "pil" else tuple(images[0].shape)) == shape


def test_pictures_are_decoded_latents(small, pair) -> None:
    latents = transfer(small, inversion=pair).images
    with torch.no_grad():
        decoded = small.vae.decode(latents / small.vae.config.scaling_factor).sample
    torch.testing.assert_close(transfer(small, inversion=pair, output_type="pt").images, (decoded / 2 + 0.5).clamp(0, 1))


def test_sdxl_is_told_the_size(monkeypatch) -> None:
    pipe, given = make("sdxl"), []
    forward = pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda *args, **kwargs: given.append(kwargs["added_cond_kwargs"]) or forward(*args, **kwargs))
    transfer(pipe, pictures(1, 40, 32, seed=1), num_inference_steps=2, skip=0.0)
    assert given[-1]["time_ids"].tolist() == [[40, 32, 0, 0, 40, 32]] * 4 and given[-1]["text_embeds"].shape == (4, 32)
    assert {len(each["time_ids"]) for each in given} == {4}, "inversion in batches of the size of the loop's"


# methods, layers, FreeU


def test_methods_by_name(small, pair) -> None:
    results = {name: transfer(small, inversion=pair, method=name).images for name in ("qalign", "cross_image")}
    assert torch.equal(results["qalign"], transfer(small, inversion=pair).images)
    assert torch.equal(results["cross_image"], transfer(small, inversion=pair, method=CrossImage()).images)
    assert not torch.allclose(results["qalign"], results["cross_image"], atol=1e-3)


def test_layers_and_a_window_without_steps() -> None:
    pipe = make("sd15")
    inverted = pipe.invert(pictures(1)[0], pictures(1, seed=1), PROMPT, num_inference_steps=4, generator=seeded())
    images = [transfer(pipe, inversion=inverted, adain=None, layers=layers).images for layers in (None, ["up_blocks.2", "up_blocks.3"], "mid")]
    assert torch.equal(images[0], images[1]) and not torch.allclose(images[0], images[2], atol=1e-3)
    nothing = transfer(pipe, inversion=inverted, adain=None, edit_steps=(0.9, 0.95))
    torch.testing.assert_close(nothing.images[0], nothing.reconstructions[1], rtol=1e-5, atol=1e-5)


def test_freeu_is_on_in_inversion_and_denoising_and_off_afterwards(small) -> None:
    before = transfer(small, method=None, adain=None)
    with_freeu = transfer(small, method=None, adain=None, freeu=True, inversion_guidance_scale=1.0)
    clean = small.invert(pictures(1)[0], pictures(1, seed=1), num_inference_steps=1).latents[-1]
    assert not torch.allclose(with_freeu.images, before.images, atol=1e-3)
    assert (with_freeu.reconstructions - clean).abs().mean() < (before.reconstructions - clean).abs().mean() + 1
    inverted = small.invert(
        pictures(1)[0], pictures(1, seed=1), PROMPT, num_inference_steps=6, freeu=True, inversion_guidance_scale=1.0, generator=seeded()
    )
    steps = trajectory(small, inversion=inverted, method=None, adain=None, freeu=True)
    torch.testing.assert_close(steps[:-1, 1:], inverted.latents[3:-1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(trajectory(small, inversion=inverted, method=None, adain=None)[:-1, 1:], inverted.latents[3:-1], atol=1e-2)
    assert torch.equal(transfer(small, method=None, adain=None).images, before.images)


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


def test_a_spoilt_cache_file_is_made_again_with_one_warning(small, tmp_path, caplog) -> None:
    first = transfer(small, cache=tmp_path)
    spoilt = min(tmp_path.iterdir())
    spoilt.write_bytes(spoilt.read_bytes()[:100])
    torch.testing.assert_close(transfer(small, cache=tmp_path).images, first.images, rtol=1e-4, atol=1e-4)
    messages = [message for message in caplog.messages if message.startswith("cache:")]
    assert len(messages) == 1 and spoilt.name in messages[0] and "\n" not in messages[0]
    transfer(small, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert len([message for message in caplog.messages if message.startswith("cache:")]) == 1


def test_digest_tells_values_dtypes_of_settings_and_order_apart() -> None:
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


def test_callbacks_see_every_step_and_may_replace_the_latents(small, pair) -> None:
    seen = []

    def zero(pipe, step, timestep, given):
        seen.append((step, int(timestep), sorted(given)))
        return {"latents": torch.zeros_like(given["latents"])} if step == 3 else {}

    result = transfer(small, inversion=pair, callback_on_step_end=zero)
    scheduler = DDIMScheduler.from_config(small.scheduler.config)
    scheduler.set_timesteps(6)
    assert seen == [(step, timestep, ["latents"]) for step, timestep in enumerate(scheduler.timesteps.tolist()[2:])]
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


def test_everything_is_as_before_after_a_call_and_after_an_exception(small) -> None:
    def state():
        hooks = Counter(name for name, module in small.unet.named_modules() for _ in (*module._forward_hooks, *module._forward_pre_hooks))
        return {name: id(layer.processor) for name, layer in self_attention(small.unet).items()}, hooks, dict(vars(small.scheduler))

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


# from_pipe


def test_from_pipe_shares_everything_and_takes_the_class_of_the_model() -> None:
    for family, kind in (("sd15", AppearanceTransferPipeline), ("sdxl", AppearanceTransferXLPipeline)):
        source = make_pipe(family)
        pipe = AppearanceTransferPipeline.from_pipe(source)
        assert type(pipe) is kind and type(AppearanceTransferXLPipeline.from_pipe(pipe)) is kind
        assert all(pipe.components[name] is component for name, component in source.components.items())
        assert pipe.vae_scale_factor == source.vae_scale_factor


def test_from_pipe_leaves_every_dtype_as_it_is() -> None:
    source = make_pipe("small")
    source.unet.to(torch.bfloat16)
    pipe = AppearanceTransferPipeline.from_pipe(source)
    assert (pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert transfer(pipe).images.isfinite().all()


def test_any_scheduler_serves_by_its_noise_levels(small) -> None:
    scheduler = PNDMScheduler.from_config(small.scheduler.config)
    pipe = AppearanceTransferPipeline.from_pipe(small, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    before = dict(vars(scheduler))
    assert torch.equal(transfer(pipe).images, transfer(small).images)
    assert pipe.scheduler is scheduler and vars(scheduler) == before


def test_the_package_gives_its_pipelines_when_asked() -> None:
    assert all(hasattr(qalign, name) for name in qalign.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = qalign.Nothing


def test_embedded_reconstructs_and_transfers() -> None:
    pipe = AppearanceTransferPipeline.embedded()
    pipe.set_progress_bar_config(disable=True)
    appearance, structure = render([held_out_seed(0), held_out_seed(1)]).image
    inverted = pipe.invert(appearance, structure, num_inference_steps=12, generator=seeded())
    clean = inverted.latents[-1]
    plain = pipe(None, None, inversion=inverted, method=None, adain=None, output_type="latent")
    noise = (plain.reconstructions - clean).square().mean((1, 2, 3))
    psnr = 10 * torch.log10((clean.amax((1, 2, 3)) - clean.amin((1, 2, 3))).square() / noise)
    assert psnr.min() > 30 and torch.equal(plain.images[0], plain.reconstructions[1])
    edited = pipe(None, None, inversion=inverted, adain=None, output_type="pt").images
    assert edited.shape == (1, 3, 128, 128) and edited.isfinite().all()


# errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "qaling"}, "method: expected a method or one of cross_image, qalign, got 'qaling'"),
        ({"method": QAlign}, "method: expected a method such as QAlign(), got <class 'qalign.methods.qalign.QAlign'>"),
        ({"adain": "mask"}, "adain: expected 'masked', 'whole' or None, got 'mask'"),
        ({"skip": 1.0}, "skip: expected a fraction that leaves at least one of 6 steps, got 1.0"),
        ({"skip": 0.95}, "skip: expected a fraction that leaves at least one of 6 steps, got 0.95"),
        ({"inversion": "null"}, "inversion: expected an Inversion or one of ddpm, ddim, got 'null'"),
        ({"output_type": "jpg"}, "output_type: expected one of pil, np, pt, latent, got 'jpg'"),
        ({"callback_on_step_end_tensor_inputs": ["masks"]}, "callback_on_step_end_tensor_inputs: expected ('latents',) or (), got ['masks']"),
        ({"adain": "masked", "noun": "horse"}, "noun: expected a word of the prompt 'a zebra', got 'horse'"),
        ({"edit_steps": (0.5, 0.2)}, "edit_steps: expected None or fractions (start, stop) with 0 <= start < stop <= 1, got (0.5, 0.2)"),
        ({"generator": [seeded()]}, "generator: expected one, or one for each of 2 pictures, got 1"),
        ({"height": 30, "width": 32}, "height and width: expected multiples of 8 pixels, got 30 x 32 (height and width resize a picture)"),
        ({"structures": pictures(1, 32, 30)}, "structure: expected multiples of 8 pixels, got 32 x 30 (height and width resize a picture)"),
        ({"structures": pictures(1) * 2 + 0.5}, "structure: expected values from 0 to 1, got 0."),
        ({"structures": []}, "structure: expected at least one picture, got none"),
        ({"structures": "b.png"}, "structure: expected pictures (PIL, tensors [3, H, W] or arrays [H, W, 3]), got str"),
        ({"structures": torch.zeros(1, 32, 32)}, "structure: expected pictures (PIL, tensors [3, H, W] or arrays [H, W, 3]), got [1, 32, 32]"),
    ],
    ids=lambda given: "",
)
def test_errors_name_the_argument(small, options, message) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        transfer(small, **options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_errors_of_appearances_inversions_and_pipelines(small) -> None:
    with pytest.raises(ValueError, match="^appearance: expected one picture, got 2$"):
        small(pictures(2), pictures(1), num_inference_steps=2)
    inverted = small.invert(pictures(1)[0], pictures(1), num_inference_steps=3)
    single = dataclasses.replace(inverted, latents=inverted.latents[:, :1], noises=inverted.noises[:, :1])
    with pytest.raises(ValueError, match=r"^inversion: expected rows for \[appearance, structures\.\.\.\], got 1$"):
        small(None, None, inversion=single)
    with pytest.raises(ValueError, match="^inversion: expected the 3 timesteps of this pipeline's scheduler, got those of another$"):
        small(None, None, inversion=dataclasses.replace(inverted, timesteps=inverted.timesteps - 1))
    with pytest.raises(TypeError, match="^pipeline: expected a Stable Diffusion or Stable Diffusion XL pipeline, got DDPMPipeline$"):
        sizes = {"block_out_channels": (8, 8), "norm_num_groups": 8, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        AppearanceTransferPipeline.from_pipe(DDPMPipeline(UNet2DModel(**sizes), small.scheduler))


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_nan_says_where_and_what_to_change(part) -> None:
    pipe = own(make())
    module = pipe.unet.conv_out if part == "unet" else pipe.vae.encoder.conv_out
    torch.nn.init.constant_(module.weight, float("nan"))
    with pytest.raises(FloatingPointError) as caught:
        transfer(pipe)
    text = str(caught.value)
    assert text.startswith({"unet": "UNet output: ", "vae": "VAE latents: "}[part]) and "expected finite values" in text and "\n" not in text


def test_a_half_precision_vae_that_overflows_works_in_float32(monkeypatch) -> None:
    pipe, dtypes = own(make()), []
    pipe.vae.to(torch.float16)
    pipe.unet.to(torch.float16)
    encode = functools.partial(AutoencoderKL.encode, pipe.vae)
    monkeypatch.setattr(pipe.vae, "encode", lambda pixels: dtypes.append(pixels.dtype) or encode(pixels))
    assert transfer(pipe, output_type="pt").images.isfinite().all()
    assert dtypes == [torch.float32] * 2 and pipe.vae.dtype == torch.float16
    pipe.vae.register_to_config(force_upcast=False)
    transfer(pipe, output_type="pt")
    assert dtypes[2:] == [torch.float16] * 2
