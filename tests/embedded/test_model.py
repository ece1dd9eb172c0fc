"""The embedded model: small, complete, and fit to judge leakage with."""

import json

import pytest
import torch

from qalign import embedded
from qalign.embedded.fitness import best_decoder_layer, self_attention_fitness
from qalign.embedded.scenes import held_out_seed, render
from tests.processors.models import quiet

MIB = 2**20


@pytest.fixture(scope="module")
def pipe():
    return quiet(embedded.load())


def test_weights_are_half_precision_within_12_mib():
    files = list(embedded.FOLDER.rglob("*.safetensors"))
    assert len(files) == 3 and sum(file.stat().st_size for file in files) <= 12 * MIB
    for file in files:
        header = file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")]
        assert {entry["dtype"] for name, entry in json.loads(header).items() if name != "__metadata__"} == {
            "F16"
        }


def test_its_classes_are_stable_diffusion_s_own(pipe):
    assert [
        type(pipe.components[name]).__name__ for name in ("unet", "vae", "text_encoder", "tokenizer")
    ] == [
        "UNet2DConditionModel",
        "AutoencoderKL",
        "CLIPTextModel",
        "CLIPTokenizer",
    ]
    assert (
        pipe.unet.config.sample_size == 32
        and pipe.vae_scale_factor == 4
        and pipe.scheduler.config.prediction_type == "v_prediction"
    )


def test_self_attention_stays_in_its_part(pipe):
    best = best_decoder_layer(self_attention_fitness(pipe, scenes=16, timesteps=(300, 500)))
    assert best["own_part_mass"] >= 0.6
    assert best["object_to_background"] <= 0.3


def test_the_record_holds_the_fitness_of_these_weights(pipe):
    record = json.loads((embedded.FOLDER / "record.json").read_text())
    recorded = {(row["layer"], row["timestep"]): row for row in record["fitness"]["layers"]}
    for row in self_attention_fitness(pipe, scenes=16, timesteps=(300,)):
        known = recorded[row["layer"], row["timestep"]]
        assert row["own_part_mass"] == pytest.approx(known["own_part_mass"], abs=0.06)  # of 48 scenes there


def test_autoencoder_keeps_held_out_pictures(pipe):
    image = render([held_out_seed(number) for number in range(8)], 128).image * 2 - 1
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(image).latent_dist.mode()).sample
    assert 10 * torch.log10(4 / (decoded - image).square().mean()) > 23


def test_it_denoises_scenes_far_better_than_their_mean(pipe):
    """The error of predicted clean latents at half noise is far below that of mean and deviation alone."""
    drawn = render([held_out_seed(number) for number in range(8)], 128)
    with torch.no_grad():
        clean = pipe.vae.encode(drawn.image * 2 - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        timestep = torch.tensor([400])
        noisy = pipe.scheduler.add_noise(clean, noise, timestep)
        tokens = pipe.tokenizer(list(drawn.captions), padding="max_length", return_tensors="pt").input_ids
        velocity = pipe.unet(noisy, timestep, encoder_hidden_states=pipe.text_encoder(tokens)[0]).sample
    keep = pipe.scheduler.alphas_cumprod[400]
    found = keep.sqrt() * noisy - (1 - keep).sqrt() * velocity
    wiener = keep.sqrt() * clean.var() / (keep * clean.var() + 1 - keep) * noisy
    assert (found - clean).square().mean() < 0.4 * (wiener - clean).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_network_has_the_requested_dtype(dtype, recwarn):
    loaded = embedded.load(dtype)
    found = {
        parameter.dtype
        for part in (loaded.unet, loaded.vae, loaded.text_encoder)
        for parameter in part.parameters()
    }
    assert found == {dtype}
    assert not [warning for warning in recwarn if "dtype" in str(warning.message)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_samples_are_finite(dtype):
    half = quiet(embedded.load(dtype))
    images = half(
        "a photo of a bird",
        num_inference_steps=3,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert images.isfinite().all() and images.std() > 0.05


def test_missing_weights_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "FOLDER", tmp_path)
    with pytest.raises(
        FileNotFoundError, match="^embedded model: expected weights in .*, got none; reinstall"
    ):
        embedded.load()
