"""A method in a module outside the package runs in `attach`, in the pipeline and on the command line."""

import argparse
import importlib

import pytest
import torch

pytest.importorskip("diffusers")

from PIL import Image  # noqa: E402

from qalign import AppearanceTransferPipeline, attach  # noqa: E402
from qalign import __main__ as command_line  # noqa: E402
from qalign.commands import _shared  # noqa: E402
from qalign.methods import METHODS, find_method  # noqa: E402
from tests.processors.models import SIZE, make_pipe, make_unet, unet_inputs  # noqa: E402

SOURCE = """
from dataclasses import dataclass

import torch

from qalign import Editing, take
from qalign_kernels import attention


@dataclass(frozen=True, kw_only=True)
class Blend(Editing):
    weight: float = 0.5

    def edit(self, q, k, v, output, reference, site):
        read = attention(take(q, output), site.reference(k, v, reference), scale=site.scale)
        return torch.lerp(site.stock(q, k, v, output), read, self.weight)


@dataclass(frozen=True)
class Unset(Blend):
    other: int


class NoMethod:
    pass


SOME = 3
"""
NAME = "own_methods.blends:Blend"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The folder of a package `own_methods` that can be imported."""
    (tmp_path / "own_methods").mkdir()
    (tmp_path / "own_methods" / "blends.py").write_text(SOURCE)
    (tmp_path / "own_methods" / "broken.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


def pictures():
    generator = torch.Generator().manual_seed(0)
    side = 2 * SIZE
    return torch.rand(2, 3, side, side, generator=generator)


@torch.no_grad()
def test_own_class_runs_under_attach(own) -> None:
    kind, unet = find_method(NAME), make_unet("small")
    inputs = unet_inputs(unet)
    stock = unet(**inputs).sample
    with attach(unet, kind(weight=0.9)):
        edited = unet(**inputs).sample
    assert torch.equal(edited[1:], stock[1:]) and not torch.allclose(edited[0], stock[0], atol=1e-3)


def test_pipeline_takes_own_class_by_name(own) -> None:
    pipe = AppearanceTransferPipeline.from_pipe(make_pipe("small"))
    settings = {"num_inference_steps": 6, "adain": None, "output_type": "latent"}
    inversion = pipe.invert(*pictures(), num_inference_steps=6, generator=torch.Generator().manual_seed(1))
    named, given, other = (
        pipe(None, None, method=method, inversion=inversion, **settings).images
        for method in (NAME, find_method(NAME)(), "cross_image")
    )
    assert torch.equal(named, given) and not torch.allclose(named, other, atol=1e-3)


def test_command_takes_own_class_by_name(own, capsys) -> None:
    make_pipe("sd15").save_pretrained(own / "model")
    for name, picture in zip("ab", pictures()):
        pixels = (picture.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels).save(own / f"{name}.png")
    shared = (
        f"--model {own}/model --appearance {own}/a.png --structure {own}/b.png --steps 6 --swap-guidance 1"
    )
    for method, out in ((NAME, "own"), ("cross_image", "other")):
        options = f"{shared} --method {method} --out {own}/{out}.png"
        assert command_line.main(["transfer", *options.split()]) == 0, capsys.readouterr().err
    own_picture, other = (Image.open(own / f"{name}.png").tobytes() for name in ("own", "other"))
    assert own_picture != other
    refused = f"{shared} --method {NAME} --topk 3 --out {own}/c.png"
    assert command_line.main(["transfer", *refused.split()]) == 2
    assert "--topk: expected with --method qalign" in capsys.readouterr().err


REFUSALS = {
    "no_such_package.methods:Blend": "a module to import, got 'no_such_package.methods' of",
    "own_methods.broken:Blend": "(No module named 'no_such_library')",
    "own_methods.blends:Blond": "a class of own_methods.blends, got 'Blond', which it does not define",
    "own_methods.blends:NoMethod": "a class that extends qalign.Editing, got 'own_methods.blends:NoMethod'",
    "own_methods.blends:SOME": "a class that extends qalign.Editing, got 'own_methods.blends:SOME': 3",
    "own_methods.blends:Unset": "got none for other",
    "own_methods.blends:": f"one of {', '.join(METHODS)}, got 'own_methods.blends:'",
}


@pytest.mark.parametrize(("name", "line"), REFUSALS.items())
def test_wrong_names_are_one_line(own, name, line) -> None:
    with pytest.raises(ValueError) as refusal:
        find_method(name)
    text = str(refusal.value)
    assert text.startswith("method: expected ") and line in text and "\n" not in text


def test_command_refuses_a_wrong_name_in_one_line(own, capsys) -> None:
    options = f"--appearance {own}/a.png --structure {own}/a.png --out {own}/o.png"
    arguments = ["transfer", *options.split(), "--method", "own_methods.blends:Blond"]
    assert command_line.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("transfer: method: expected a class of own_methods.blends, got 'Blond'")
    with pytest.raises(argparse.ArgumentTypeError, match="^expected package.module:Class or one of qalign, "):
        _shared.method_name("qaling")
