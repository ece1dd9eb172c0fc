"""AppearanceTransferPipeline: pictures of any size and kind, dtypes, components, and errors."""

import dataclasses
import functools

import numpy
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMPipeline, PNDMScheduler, UNet2DModel
from PIL import Image

import qalign
from qalign import AppearanceTransferPipeline, AppearanceTransferXLPipeline, QAlign
from qalign.embedded.scenes import held_out_seed, render
from qalign.pipelines import METHODS
from qalign.pipelines.pictures import cover, to_tensors
from tests.pipelines.transfers import PIXELS, make, own, pictures, seeded, transfer, watch
from tests.processors.models import embedded_pipe, make_pipe, quiet

# sizes, dtypes, kinds of pictures


@pytest.mark.parametrize(("height", "width"), [(32, 48), (40, 24)])
def test_sizes_that_are_not_square(height, width) -> None:
    pipe = make("sd15")
    result = transfer(
        pipe, pictures(1, height, width, seed=1), num_inference_steps=3, adain="masked", output_type="pt"
    )
    assert result.images.shape == (1, 3, height, width) and result.images.isfinite().all()
    assert result.masks.shape == (2, height // 2, width // 2)


def test_pictures_are_scaled_to_cover_the_first_structure(small) -> None:
    wide = pictures(1, 64, 96)[0]
    inverted = small.invert(
        wide, [pictures(1, seed=1)[0], pictures(1, 40, 64)[0]], num_inference_steps=2, generator=seeded()
    )
    assert inverted.latents.shape == (3, 3, 4, 16, 16)
    middle = F.interpolate(wide.unsqueeze(0), (32, 48), mode="bicubic", antialias=True)[0, :, :, 8:40].clamp(
        0, 1
    )
    assert torch.equal(cover(wide, (32, 32)), middle)
    assert small.invert(wide, wide, num_inference_steps=2, width=48, height=32).latents.shape[-2:] == (16, 24)


def test_every_kind_of_picture_is_the_same_tensor() -> None:
    array = numpy.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=numpy.uint8)
    expected = torch.from_numpy(array).permute(2, 0, 1) / 255
    kinds = [
        array,
        array / numpy.float32(255),
        Image.fromarray(array),
        expected,
        torch.from_numpy(array).permute(2, 0, 1),
    ]
    for kind in [*kinds, [Image.fromarray(array)], array[None], expected[None]]:
        (tensor,) = to_tensors(kind, "structure")
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-7)
    assert len(to_tensors(kinds, "structure")) == len(kinds)
    grey = Image.fromarray(array).convert("L")
    assert to_tensors(grey, "structure")[0].shape == (3, 8, 16)


def test_encode_takes_every_kind_of_picture(small) -> None:
    batch = pictures(2)
    expected = small.encode(batch)
    assert expected.shape == (2, 4, 16, 16) and expected.dtype == torch.float32
    arrays = [picture.permute(1, 2, 0).numpy() for picture in batch]
    assert torch.equal(small.encode(list(batch)), expected) and torch.equal(small.encode(arrays), expected)
    assert torch.equal(small.encode(batch[0]), expected[:1])
    image = Image.fromarray((arrays[0] * 255).astype(numpy.uint8))
    assert (small.encode(image) - expected[:1]).abs().mean() < 0.02 * expected.abs().mean()


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ([torch.ones(3, 8, 8), torch.ones(3, 8, 16)], "pictures: expected one size, got 8 x 8 and 8 x 16"),
        (torch.full((3, 32, 32), 2.0), "pictures: expected values from 0 to 1, got 2 to 2"),
        ("a.png", "pictures: expected pictures (PIL, tensors [3, H, W] or arrays [H, W, 3]), got str"),
    ],
    ids=("sizes", "range", "kind"),
)
def test_encode_refuses_what_is_no_batch(small, wrong, line) -> None:
    with pytest.raises((TypeError, ValueError)) as refusal:
        small.encode(wrong)
    assert str(refusal.value) == line


def test_from_pipe_makes_a_subclass_of_its_family() -> None:
    class Own(AppearanceTransferPipeline):
        """A user's."""

    assert type(Own.from_pipe(make_pipe("small"))) is Own and type(Own.embedded()) is Own
    assert type(Own.from_pipe(make_pipe("sdxl"))) is AppearanceTransferXLPipeline


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"), [("small", torch.float16), ("small", torch.bfloat16), ("sdxl", torch.bfloat16)]
)
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
    torch.testing.assert_close(
        transfer(small, inversion=pair, output_type="pt").images, (decoded / 2 + 0.5).clamp(0, 1)
    )


def test_sdxl_is_told_the_size(monkeypatch) -> None:
    pipe, given = make("sdxl"), []
    forward = pipe.unet.forward
    monkeypatch.setattr(
        pipe.unet,
        "forward",
        lambda *args, **kwargs: given.append(kwargs["added_cond_kwargs"]) or forward(*args, **kwargs),
    )
    transfer(pipe, pictures(1, 40, 32, seed=1), num_inference_steps=2, skip=0.0)
    assert given[-1]["time_ids"].tolist() == [[40, 32, 0, 0, 40, 32]] * 4 and given[-1][
        "text_embeds"
    ].shape == (4, 32)
    assert {len(each["time_ids"]) for each in given} == {4}, "inversion in batches of the size of the loop's"


# from_pipe


def test_from_pipe_shares_parts_and_picks_the_class() -> None:
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
    assert (pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    assert transfer(pipe).images.isfinite().all()


def test_any_scheduler_serves_by_its_noise_levels(small) -> None:
    scheduler = PNDMScheduler.from_config(small.scheduler.config)
    pipe = quiet(AppearanceTransferPipeline.from_pipe(small, scheduler=scheduler))
    before = dict(vars(scheduler))
    assert torch.equal(transfer(pipe).images, transfer(small).images)
    assert pipe.scheduler is scheduler and vars(scheduler) == before


def test_the_package_gives_its_pipelines_when_asked() -> None:
    assert all(hasattr(qalign, name) for name in qalign.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = qalign.Nothing


@pytest.mark.slow
def test_embedded_reconstructs_and_transfers() -> None:
    pipe = embedded_pipe(AppearanceTransferPipeline)
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
        (
            {"method": "qaling"},
            f"method: expected a method, 'package.module:Class' or one of {', '.join(METHODS)}, got 'qaling'",
        ),
        ({"method": QAlign}, "method: expected an instance, got the class QAlign: write QAlign()"),
        ({"adain": "mask"}, "adain: expected 'masked', 'whole' or None, got 'mask'"),
        ({"skip": 1.0}, "skip: expected a fraction that leaves at least one of 6 steps, got 1.0"),
        ({"skip": 0.95}, "skip: expected a fraction that leaves at least one of 6 steps, got 0.95"),
        ({"inversion": "null"}, "inversion: expected an Inversion or one of ddpm, ddim, got 'null'"),
        ({"output_type": "jpg"}, "output_type: expected one of pil, np, pt, latent, got 'jpg'"),
        (
            {"callback_on_step_end_tensor_inputs": ["masks"]},
            "callback_on_step_end_tensor_inputs: expected ('latents',) or (), got ['masks']",
        ),
        ({"adain": "masked", "noun": "horse"}, "noun: expected a word of the prompt 'a zebra', got 'horse'"),
        (
            {"edit_steps": (0.5, 0.2)},
            "edit_steps: expected None or fractions (start, stop) with 0 <= start < stop <= 1, "
            "got (0.5, 0.2)",
        ),
        ({"generator": [seeded()]}, "generator: expected one, or one for each of 2 pictures, got 1"),
        (
            {"height": 30, "width": 32},
            "height and width: expected multiples of 8 pixels, "
            "got 30 x 32 (height and width resize a picture)",
        ),
        (
            {"structures": pictures(1, 32, 30)},
            "structure: expected multiples of 8 pixels, got 32 x 30 (height and width resize a picture)",
        ),
        ({"structures": pictures(1) * 2 + 0.5}, "structure: expected values from 0 to 1, got 0."),
        ({"structures": []}, "structure: expected at least one picture, got none"),
        (
            {"structures": "b.png"},
            "structure: expected pictures (PIL, tensors [3, H, W] or arrays [H, W, 3]), got str",
        ),
        (
            {"structures": torch.zeros(1, 32, 32)},
            "structure: expected pictures (PIL, tensors [3, H, W] or arrays [H, W, 3]), got [1, 32, 32]",
        ),
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
    with pytest.raises(
        ValueError, match=r"^inversion: expected rows for \[appearance, structures\.\.\.\], got 1$"
    ):
        small(None, None, inversion=single)
    with pytest.raises(
        ValueError,
        match="^inversion: expected the 3 timesteps of this pipeline's scheduler, got those of another$",
    ):
        small(None, None, inversion=dataclasses.replace(inverted, timesteps=inverted.timesteps - 1))
    with pytest.raises(
        TypeError,
        match="^pipeline: expected a Stable Diffusion or Stable Diffusion XL pipeline, got DDPMPipeline$",
    ):
        sizes = {
            "block_out_channels": (8, 8),
            "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D",) * 2,
            "up_block_types": ("UpBlock2D",) * 2,
        }
        AppearanceTransferPipeline.from_pipe(DDPMPipeline(UNet2DModel(**sizes), small.scheduler))


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_nan_says_where_and_what_to_change(part) -> None:
    pipe = own(make())
    module = pipe.unet.conv_out if part == "unet" else pipe.vae.encoder.conv_out
    torch.nn.init.constant_(module.weight, float("nan"))
    with pytest.raises(FloatingPointError) as caught:
        transfer(pipe)
    text = str(caught.value)
    assert (
        text.startswith({"unet": "UNet output: ", "vae": "VAE latents: "}[part])
        and "expected finite values" in text
        and "\n" not in text
    )


@pytest.mark.slow
def test_overflowing_half_precision_vae_works_in_float32(monkeypatch) -> None:
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
