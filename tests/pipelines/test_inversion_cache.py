"""Keys of cached inversions stand for all that an inversion depends on; files are checked before use."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers import DDIMScheduler
from torch import nn

from qalign import CrossImage, attach
from qalign.sampling import weights_digest as module
from qalign.sampling.inversion import Inversion, read_inversion
from qalign.sampling.inversion_cache import InversionCache, digest
from qalign.sampling.weights_digest import weights_digest
from tests.pipelines.transfers import PROMPT, make, own, pictures, seeded
from tests.processors.models import make_unet


def inversion(seed=0):
    return Inversion(
        "ddim", torch.randn(3, 1, 4, 8, 8, generator=seeded(seed)), None, torch.tensor([500, 0]), 0.0
    )


def tuned(unet, place=7):
    """A copy in which one value of one weight is the next float."""
    other = copy.deepcopy(unet)
    flat = other.mid_block.resnets[0].conv1.weight.data.view(-1)
    flat[place] = torch.nextafter(flat[place], flat[place] + 1)
    return other


# keys


def in_place(weight):
    with torch.no_grad():
        weight.view(-1)[5] += 1e-3


def uncounted(weight):
    weight.data.view(-1)[5] += 1e-3  # PyTorch's version of the weight stays


def replaced(weight):
    weight.data = weight.data * 1.001


def swapped(weight):
    weight.data = weight.data.flip(0).contiguous()


@pytest.mark.parametrize("change", [in_place, uncounted, replaced, swapped])
def test_every_change_of_weights_changes_the_digest(change):
    unet = make_unet("small")
    before = weights_digest(unet)
    assert weights_digest(copy.deepcopy(unet)) == before
    change(unet.mid_block.resnets[0].conv1.weight)
    assert weights_digest(unet) != before


def test_buffers_and_adapters_belong_to_the_weights():
    unet = make_unet("small")
    found = [weights_digest(unet)]
    unet.register_buffer("table", torch.zeros(2))
    found.append(weights_digest(unet))
    unet.conv_in.lora = nn.Linear(2, 2)
    found.append(weights_digest(unet))
    assert len(set(found)) == 3


def test_the_digest_is_computed_once(monkeypatch):
    unet, read, real = make_unet("small"), [], module.tensor_bytes
    monkeypatch.setattr(module, "tensor_bytes", lambda tensor: read.append(tensor) or real(tensor))
    first = weights_digest(unet)
    once = len(read)
    assert once and weights_digest(unet) == first and len(read) == once
    in_place(unet.conv_out.weight)
    assert weights_digest(unet) != first and len(read) == 2 * once


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_weights_count_by_their_values(offload, tmp_path):
    """They are on the meta device between calls; a fine-tune shared its key with the original."""
    unet = make_unet("small")
    digests = [weights_digest(unet), weights_digest(tuned(unet))]
    offloaded = []
    for number, each in enumerate((unet, tuned(unet))):
        if offload == "cpu":
            cpu_offload(each)
        else:
            disk_offload(each, str(tmp_path / str(number)))
        assert each.conv_in.weight.is_meta
        offloaded.append(weights_digest(each))
        assert each.conv_in.weight.is_meta and weights_digest(each) == offloaded[-1]
    assert offloaded == digests and digests[0] != digests[1]


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        empty = nn.Linear(2, 3)
    message = "^cache: expected a UNet with weights that can be read, got weight on the meta device$"
    with pytest.raises(ValueError, match=message):
        weights_digest(empty)


class Packed(nn.Module):
    """Keeps its weights as quantised layers do: in the state dict, and not as parameters."""

    def __init__(self, *values):
        super().__init__()
        self.values = values

    def get_extra_state(self):
        return {"packed": self.values, "bits": 8, "kind": torch.qint8}

    def set_extra_state(self, state):
        self.values = state["packed"]


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize("axis", [None, 0])
def test_quantised_weights_have_keys(axis):
    def quantised(x, scale):
        if axis is None:
            return torch.quantize_per_tensor(x, scale, 0, torch.qint8)
        return torch.quantize_per_channel(
            x, torch.tensor([scale, 0.2]), torch.tensor([0, 0]), axis, torch.qint8
        )

    x = torch.arange(6.0).view(2, 3)
    found = [
        weights_digest(Packed(quantised(x, 0.1), x)),
        weights_digest(Packed(quantised(x + 1, 0.1), x)),
        weights_digest(Packed(quantised(x, 0.05), x)),
        weights_digest(Packed(quantised(x, 0.1), x + 1)),
    ]
    assert len(set(found)) == 4 and weights_digest(Packed(quantised(x, 0.1), x)) == found[0]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization")
def test_dynamically_quantised_layers_have_keys():
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 8))
        found.append(weights_digest(torch.ao.quantization.quantize_dynamic(model, {nn.Linear})))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_narrow_weights_have_keys(dtype):
    model = nn.Module()
    model.register_buffer("weight", torch.arange(9.0).view(3, 3).to(dtype).t())
    before = weights_digest(model)
    model.weight = model.weight.t().contiguous()
    assert weights_digest(model) != before


def test_unknown_weights_are_refused_in_one_line():
    with pytest.raises(
        ValueError, match="^cache: expected a UNet with weights that can be read, got object _extra"
    ):
        weights_digest(Packed(object()))


def test_settings_in_arrays_count_whole():
    betas = torch.linspace(0.1, 0.2, 3000).double().numpy()
    other = betas.copy()
    other[1500] += 1e-9  # str() leaves the middle out
    assert digest({"trained_betas": betas}) != digest({"trained_betas": other})
    assert digest([betas]) != digest([other])


def test_an_attached_method_is_refused_before_work(tmp_path):
    pipe = own(make())
    with (
        attach(pipe, CrossImage()),
        pytest.raises(
            ValueError, match="^cache: expected a UNet without an attached method, or None, got CrossImage on"
        ),
    ):
        pipe.invert(pictures(1)[0], pictures(1, seed=1), PROMPT, num_inference_steps=2, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_fine_tune_has_its_own_inversion(tmp_path):
    settings = {"num_inference_steps": 2, "inversion": "ddim", "cache": tmp_path}
    pipe = own(make())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.invert(pictures(1)[0], pictures(1, seed=1), PROMPT, **settings)
    pipe.unet = tuned(pipe.unet)
    cpu_offload(pipe.unet)
    pipe.invert(pictures(1)[0], pictures(1, seed=1), PROMPT, **settings)
    assert len(list(tmp_path.iterdir())) == 4


# files


def test_swapped_files_are_made_again(tmp_path, caplog):
    cache = InversionCache(tmp_path)
    for key, seed in (("a", 0), ("b", 1)):
        cache.fill([key], lambda rows, seed=seed: inversion(seed))
    one, two = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    one.rename(tmp_path / "c"), two.rename(one), (tmp_path / "c").rename(two)
    again = cache.fill(["a"], lambda rows: inversion(0))
    assert torch.equal(again.latents, inversion(0).latents)
    assert len(caplog.messages) == 1 and "it is that of another inversion" in caplog.messages[0]
    assert torch.equal(cache.fill(["a"], None).latents, again.latents) and len(caplog.messages) == 1


@pytest.mark.parametrize("damage", ["bit", "truncated", "empty", "text"])
def test_damaged_files_are_healed_with_one_warning(damage, tmp_path, caplog):
    cache, path = InversionCache(tmp_path), tmp_path / "a.safetensors"
    cache.fill(["a"], lambda rows: inversion())
    whole = bytearray(path.read_bytes())
    whole[-40] ^= 4  # a value of the latents or the timesteps
    path.write_bytes(
        {"bit": bytes(whole), "truncated": bytes(whole[:-40]), "empty": b"", "text": b"words"}[damage]
    )
    with pytest.raises(ValueError, match="^path: expected a file written by Inversion.save"):
        read_inversion(path)
    found = cache.fill(["a"], lambda rows: inversion())
    assert torch.equal(found.latents, inversion().latents) and len(caplog.messages) == 1
    assert torch.equal(cache.fill(["a"], None).latents, found.latents) and len(caplog.messages) == 1


def test_a_full_disk_does_not_lose_the_inversion(tmp_path, caplog):
    """A limit of the size of files stands for the full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        found = InversionCache(tmp_path).fill(
            ["a", "b"],
            lambda rows: Inversion(
                "ddim",
                torch.cat([inversion(row).latents for row in rows], 1),
                None,
                torch.tensor([500, 0]),
                0.0,
            ),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(found.latents[:, 1:], inversion(1).latents)
    assert (
        len(caplog.messages) == 1
        and "used and not kept" in caplog.messages[0]
        and "\n" not in caplog.messages[0]
    )
    assert not list(tmp_path.iterdir())


def test_a_file_as_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="^cache: expected a folder, got the file "):
        InversionCache(tmp_path / "file")
