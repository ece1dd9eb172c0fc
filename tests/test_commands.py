"""The command line on a tiny Stable Diffusion: help without torch, errors of one line, written files."""

import json
import shlex
import subprocess
import sys
from argparse import Namespace

import numpy
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from PIL import Image  # noqa: E402

from qalign import QAlign, attach, embedded, methods, pipelines  # noqa: E402
from qalign import __main__ as command_line  # noqa: E402
from qalign.commands import _demo_transfer, _leakage_tables, _shared, compare, transfer  # noqa: E402
from qalign.context.layers import short_name, token_grid  # noqa: E402
from qalign.context.regions import Regions  # noqa: E402
from qalign.embedded import scenes  # noqa: E402
from qalign.evaluation import correspondence, match_figures  # noqa: E402
from qalign.evaluation.correspondence import Capture  # noqa: E402
from qalign.methods.attention_distillation import AttentionDistillation  # noqa: E402
from qalign.pipelines import bounded_attention, distillation_run  # noqa: E402
from qalign.sampling.bounded_guidance import BoundedGuidance  # noqa: E402
from qalign_kernels._files import replacing  # noqa: E402
from qalign_kernels.testing import random_features  # noqa: E402
from tests.processors import models  # noqa: E402

SIZE = 32  # pixels of the tiny model
TRANSFER = "transfer --appearance {}/a.png --structure {}/b.png --out {}/o.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and pictures a.png, b.png, c.png of its size, odd.png of 30 x 45 and text.png that is none."""
    folder = tmp_path_factory.mktemp("commands")
    models.make_pipe("sd15").save_pretrained(folder / "model")
    for seed, name in enumerate("abc"):
        picture(seed).save(folder / f"{name}.png")
    picture(3).resize((30, 45)).save(folder / "odd.png")
    picture(3).resize((64, 64)).save(folder / "large.png")
    (folder / "text.png").write_text("no picture")
    return folder


def picture(seed):
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(
        torch.randint(256, (SIZE, SIZE, 3), dtype=torch.uint8, generator=generator).numpy()
    )


def pixels(path):
    with Image.open(path) as image:
        return torch.tensor(numpy.asarray(image.convert("RGB")))


def run(folder, text):
    """The exit status of a command whose {} is the folder."""
    return command_line.main(text.replace("{}", str(folder)).split())


def test_help_needs_neither_torch_nor_diffusers():
    heavy = {"torch", "numpy", "diffusers", "matplotlib"}
    code = f"import sys; from qalign.__main__ import parser; parser(); print({heavy} & set(sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_help_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as finished:
        command_line.main([command, "--help"])
    assert finished.value.code == 0
    text = capsys.readouterr().out.replace("\\\n", " ")
    examples = [
        shlex.split(line.split("-m qalign ", 1)[1], comments=True)
        for line in text.splitlines()
        if f"  python -m qalign {command}" in line
    ]
    assert examples
    for example in examples:
        assert command_line.parser().parse_args(example).command == command


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "transfer --appearance {}/none.png --structure {}/b.png --out {}/o.png",
            "none.png: expected a picture, found no such file",
        ),
        (
            "transfer --appearance {} --structure {}/b.png --out {}/o.png",
            "expected a picture, found a folder",
        ),
        (
            "transfer --appearance {}/text.png --structure {}/b.png --out {}/o.png",
            "text.png: expected a picture (PNG",
        ),
        (
            "transfer --appearance {}/a.png --structure {}/odd.png --out {}/o.png",
            "multiples of 8, got 30x45; --size 32x48 is the nearest",
        ),
        (
            "transfer --appearance {}/a.png --structure {}/b.png --out {}/o.png --size 30x45",
            "multiples of 8, got 30x45; the nearest is 32x48",
        ),
        (
            "transfer --appearance {}/a.png --structure {}/b.png --out {}/o.png --size big",
            "expected a size such as 512",
        ),
        (
            "transfer --appearance {}/a.png --structure {}/large.png --out {}/o.png",
            "large.png: expected the size of",
        ),
        (
            "transfer --appearance {}/a.png --structure {}/b.png --out {}/o.png --method masa",
            "dream_matcher, got 'masa'",
        ),
        (
            f"{TRANSFER} --method cross_image --topk 3",
            "--topk: expected with --method qalign",
        ),
        (
            "transfer --appearance {}/a.png --structure {}/b.png --out {}/o.png --aligned me",
            "--aligned: invalid choice: 'me'",
        ),
        (
            "transfer --appearance {}/a.png --structure {}/b.png --out {}/o.png --method seal --aligned both",
            "--aligned: expected with",
        ),
        (
            "transfer --appearance {}/a.png --structure {}/b.png --out {}/o.txt",
            "expected a file that ends in .png",
        ),
        (
            "transfer --appearance {}/a.png --structure {}/b.png --out {}/o.png --cache {}/a.png",
            "expected a folder, got the file",
        ),
        (
            "transfer --appearance {}/a.png --structure {}/b.png --out {}/o.png --model {}",
            "a path without one",
        ),
        (
            "transfer --appearance {}/a.png --structure {}/b.png --out {}/o.png --model no/such",
            "hf download no/such --local-dir such",
        ),
        (
            f"{TRANSFER} --model {{}}/model --adain masked --noun zebra --prompt horse",
            "noun: expected a word",
        ),
        (
            f"{TRANSFER} --model {{}}/model --layers top",
            "layers: expected names or patterns",
        ),
        (
            "transfer --appearance {}/a.png --structure {}/b.png --out {}/o.png --regions {}/l.png",
            "--regions: expected 'self', or label maps of the appearance and the structure, got",
        ),
        (
            "transfer --appearance {}/a.png --structure {}/b.png {}/c.png --out {}/o.png --regions self",
            "--regions: expected one --structure, got 2",
        ),
        (
            "transfer --appearance {}/a.png --structure {}/b.png --out {}/o.png --regions {}/l.png {}/m.png",
            "l.png: expected a label map, found no",
        ),
        (
            "transfer --appearance {}/a.png --structure {}/b.png --out {}/o.png --regions {}/a.png {}/b.png",
            "a.png: expected a label map, one channel",
        ),
        (
            f"{TRANSFER} --model {{}}/model --regions self",
            "noun: expected a word of the prompt",
        ),
        ("transfer --appearance {}/a.png", "required: --structure, --out"),
        ("correspond --structure {}/a.png", "expected either --structure and --appearance, or --scenes"),
        ("correspond --structure {}/a.png --appearance {}/b.png --scenes 1", "expected either"),
        (
            "correspond --structure {}/a.png --appearance {}/b.png --model {}/model --point 32,3",
            "--point: expected pixels inside 32x32, got 32,3",
        ),
        ("correspond --structure {}/a.png --appearance {}/b.png --point 3", "expected a point such as 40,64"),
        ("correspond --structure {}/a.png --appearance {}/b.png --noise 1.5", "--noise: expected a fraction"),
        ("scenes --count 0 --out {}/s", "expected a number above zero"),
        ("scenes --seed -1 --out {}/s", "expected a whole number, got '-1'"),
        ("compare --structure {}/a.png", "expected either --structure and --appearance, or --scenes"),
        ("compare --scenes 0 --method bounded", "dream_matcher, got 'bounded'"),
        ("distill --content {}/a.png --out {}/o.png", "required: --style"),
        (
            "distill --style {}/a.png --content {}/none.png --out {}/o.png",
            "none.png: expected a picture, found no such file",
        ),
        (
            "distill --style {}/a.png {}/b.png --mask {}/a.png {}/b.png --out {}/o.png",
            "--mask: expected one --style with it, got 2",
        ),
        (
            "distill --style {}/a.png --mask {}/none.png {}/b.png --out {}/o.png",
            "none.png: expected a label map, found no such file",
        ),
        ("distill --style {}/a.png --mask {}/a.png {}/b.png --out {}/o.png", "a.png: expected a label map"),
        ("distill --style {}/a.png --steps 0 --out {}/o.png", "expected a number above zero"),
        ("distill --style {}/a.png --tune-decoder 0 --out {}/o.png", "expected a number above zero"),
        (
            "texture --style {}/a.png --size 32 --tune-decoder x --out {}/o.png",
            "expected a whole number, got 'x'",
        ),
        (
            "texture --style {}/a.png --out {}/o.png",
            "--size: expected the size of the output, or --mask, got neither",
        ),
        (
            "texture --style {}/a.png {}/b.png --mask {}/a.png {}/b.png --out {}/o.png",
            "--mask: expected one --style with it, got 2",
        ),
        (
            "texture --style {}/a.png --mask {}/none.png {}/b.png --out {}/o.png",
            "none.png: expected a label map, found no such file",
        ),
        (
            "texture --style {}/a.png --size 30 --out {}/o.png",
            "multiples of 8, got 30x30; the nearest is 32x32",
        ),
        (
            "texture --style {}/a.png --size 32 --stride 99 --model {}/model --out {}/o.png",
            "stride: expected 1 to the window's 16 latents, got 99",
        ),
        ("bound --prompt fox --out {}/o.png", "required: --box"),
        ("bound --prompt fox --box fox 0 0 1 --out {}/o.png", "argument --box: expected 5 arguments"),
        (
            "bound --prompt fox --box fox 0 0 1 low --out {}/o.png",
            "--box: expected WORDS X0 Y0 X1 Y1, got fox 0 0 1 low",
        ),
        (
            "bound --prompt fox --box ox 0 0 1 1 --model {}/model --out {}/o.png",
            "subjects: expected words of the prompt 'fox', got 'ox'",
        ),
        (
            "bound --prompt fox --box fox 0.5 0 0.4 1 --model {}/model --out {}/o.png",
            "boxes: expected x0 y0 x1 y1 with",
        ),
        ("bound --prompt fox --box fox 0 0 1 1 --size 30 --out {}/o.png", "multiples of 8, got 30x30"),
        ("nonsense", "invalid choice: 'nonsense'"),
        ("", "required: COMMAND"),
    ],
)
def test_errors_are_one_line_and_write_nothing(folder, text, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = sorted(folder.iterdir())
    try:
        status = run(folder, text)
    except SystemExit as refusal:
        status = refusal.code
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert (
        len([line for line in error.splitlines() if line and "Loading" not in line]) == 1
    )  # the bars of a model that is loaded apart
    assert sorted(folder.iterdir()) == before


def test_missing_weights_line_says_how_to_download(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(embedded, "FOLDER", tmp_path)
    assert run(folder, "transfer --appearance {}/a.png --structure {}/b.png --out {}/o.png") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "qalign.embedded.train" in error


def test_choices_are_those_of_the_library():
    assert list(_shared.METHODS) == list(pipelines.METHODS)
    settings = {"refinement": "topk", "topk": 3, "contrast": 1.0, "aligned": "output"}
    given = Namespace(**{"method": "qalign", **dict.fromkeys(transfer.SETTINGS), **settings})
    assert transfer.make_regions(Namespace(regions=["self"], structure=["b.png"]), None) == "self"
    assert transfer.make_method(given) == QAlign(**settings)


def test_transfer_writes_what_the_pipeline_returns(folder, tmp_path, capsys):
    options = "--model {}/model --steps 6 --swap-guidance 2 --inversion ddim"
    options += " --refinement guided --strength 5 --aligned structure"
    outputs = f"--out {tmp_path}/new/o.png --grid {tmp_path}/grid.png"
    assert (
        run(folder, f"transfer --appearance {{}}/a.png --structure {{}}/b.png {{}}/c.png {options} {outputs}")
        == 0
    )
    said = capsys.readouterr().out
    stock = models.make_pipe("sd15")
    expected = pipelines.AppearanceTransferPipeline.from_pipe(stock)(
        picture(0),
        [picture(1), picture(2)],
        method=QAlign(refinement="guided", strength=5, aligned="structure"),
        num_inference_steps=6,
        inversion="ddim",
        swap_guidance_scale=2,
        adain=None,
        generator=torch.Generator().manual_seed(0),
    ).images
    for number, image in enumerate(expected, 1):
        path = tmp_path / "new" / f"o-{number}.png"
        assert torch.equal(pixels(path), torch.tensor(numpy.asarray(image)))
        assert f"picture: {path}" in said
    assert f"grid: {tmp_path / 'grid.png'}" in said
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["grid.png", "o-1.png", "o-2.png"]


def test_label_maps_are_scaled_like_their_pictures(tmp_path):
    labels = torch.zeros(20, 40, dtype=torch.uint8)
    labels[:, 10:20], labels[:, 20:30], labels[:, 30:] = 3, 7, 30
    Image.fromarray(labels.numpy()).save(tmp_path / "labels.png")
    assert torch.equal(_shared.read_label_map(tmp_path / "labels.png", (40, 20), None), labels.long())
    fitted = _shared.read_label_map(tmp_path / "labels.png", (16, 16), (16, 16))  # the middle 20 x 20 pixels
    assert fitted.tolist() == [[3] * 8 + [7] * 8] * 16
    with pytest.raises(
        ValueError, match="labels.png: expected labels of its picture's 40x24 pixels, got 40x20"
    ):
        _shared.read_label_map(tmp_path / "labels.png", (40, 24), None)


def test_transfer_reads_regions_from_files(folder, tmp_path):
    halves = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
    halves[:, SIZE // 2 :] = 1
    for name, labels in (("one", torch.zeros_like(halves)), ("left", halves), ("right", halves.flip(1))):
        Image.fromarray(labels.numpy()).save(tmp_path / f"{name}.png")
    options = "--model {}/model --steps 4 --skip 0 --swap-guidance 1 --method visual_style"
    command = f"transfer --appearance {{}}/a.png --structure {{}}/b.png {options} --out {tmp_path}/o.png"
    found = []
    for given in (
        "",
        "--regions {0}/one.png {0}/one.png",
        "--regions {0}/left.png {0}/left.png",
        "--regions {0}/left.png {0}/right.png",
    ):
        assert run(folder, f"{command} {given.format(tmp_path)}") == 0
        found.append(pixels(tmp_path / "o.png").int())
    assert (found[0] - found[1]).abs().max() <= 1
    assert (found[2] - found[1]).abs().max() > 1 and (found[3] - found[2]).abs().max() > 1


def test_pictures_are_turned_and_scaled_to_cover(tmp_path):
    halves = Image.new("RGB", (40, 20), "red")
    halves.paste("blue", (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    halves.save(tmp_path / "turned.png", exif=exif)
    (read,) = _shared.read_pictures([tmp_path / "turned.png"], (16, 16))
    assert read.size == (16, 16)
    assert read.getpixel((8, 1)) == (255, 0, 0) and read.getpixel((8, 14)) == (0, 0, 255)


def test_file_is_replaced_whole_or_kept(tmp_path):
    path = tmp_path / "made" / "figures.json"
    _shared.write("figures", "old", path)
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("hal")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_scenes_are_written_with_their_labels(tmp_path, capsys):
    assert (
        run(tmp_path, "scenes --count 3 --seed 5 --held-out --size 40 --out {}/held --sheet {}/sheet.png")
        == 0
    )
    assert run(tmp_path, "scenes --count 3 --seed 5 --size 40 --out {}/train") == 0
    assert (
        f"contact sheet: {tmp_path}/sheet.png" in capsys.readouterr().out
        and (tmp_path / "sheet.png").is_file()
    )
    seeds = [scenes.held_out_seed(number) for number in (5, 6, 7)]
    assert sorted(path.name for path in (tmp_path / "held").iterdir()) == [
        *(name for seed in seeds for name in (f"{seed:04}-labels.png", f"{seed:04}.png")),
    ]
    assert not {path.name for path in (tmp_path / "held").iterdir()} & {
        path.name for path in (tmp_path / "train").iterdir()
    }
    truth = scenes.render(seeds[1:2], 40)
    with Image.open(tmp_path / "held" / f"{seeds[1]:04}-labels.png") as labels:
        assert torch.equal(torch.tensor(numpy.asarray(labels)).long(), truth.labels[0])
    written = pixels(tmp_path / "held" / f"{seeds[1]:04}.png").permute(2, 0, 1) / 255
    torch.testing.assert_close(written, truth.image[0], atol=0.51 / 255, rtol=0)


@pytest.fixture
def only_diffusers_extra(monkeypatch):
    """What the extra `demo` adds to `diffusers` does not import."""
    for name in ("matplotlib", "psutil", "skimage"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("qalign.evaluation.plots", "qalign.evaluation.peak_memory"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(
    "text",
    [
        "transfer --appearance {0}/a.png --structure {0}/b.png --model {0}/model --steps 2 --skip 0 "
        "--out {1}/o.png",
        "distill --style {0}/a.png --content {0}/b.png --model {0}/model --steps 2 --out {1}/o.png",
        "texture --style {0}/a.png --size 40x32 --model {0}/model --steps 2 --out {1}/o.png",
        "bound --prompt fox --box fox 0 0 1 1 --model {0}/model --steps 2 --labels-out {1}/l.png "
        "--out {1}/o.png",
        "scenes --count 2 --size 16 --out {1}",
        "methods",
    ],
    ids=lambda text: text.split()[0],
)
def test_diffusers_extra_alone_runs(text, folder, tmp_path, only_diffusers_extra):
    assert command_line.main(text.format(folder, tmp_path).split()) == 0
    assert text == "methods" or any(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        (
            "transfer --appearance {0}/none.png --structure {0}/b.png --grid {1}/g.png --out {1}/o.png",
            "transfer: --grid: expected matplotlib to be installed, found no matplotlib",
        ),
        ("scenes --count 2 --sheet {1}/s.png --out {1}/s", "scenes: --sheet: expected matplotlib"),
        ("compare --scenes 0 --out {1}/c.png", "to be installed, found no matplotlib, psutil"),
        ("correspond --scenes 0 --out {1}/c", "to be installed, found no matplotlib"),
        ("demo --out {1}/d", "to be installed, found no matplotlib, psutil, skimage"),
    ],
    ids=lambda text: text.split()[0],
)
def test_missing_packages_are_named_first(text, refusal, folder, tmp_path, only_diffusers_extra, capsys):
    assert command_line.main(text.format(folder, tmp_path).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert refusal in line and line.endswith(": pip install 'qalign-kernels[demo]'")
    assert not any(tmp_path.iterdir())


def test_correspond_writes_its_pictures(folder, tmp_path, capsys):
    pictures = "--structure {}/a.png --appearance {}/b.png"
    text = f"correspond {pictures} --model {{}}/model --point 3,4 --out {tmp_path}/c"
    assert run(folder, text) == 0
    assert (
        run(folder, f"correspond --scenes 0 --model {{}}/model --layer up_blocks.2 --out {tmp_path}/s") == 0
    )
    said = capsys.readouterr().out
    for path in (tmp_path / out / name for out in "cs" for name in ("correspondences.png", "heat_maps.png")):
        assert pixels(path).float().std() > 10
        assert str(path) in said
    assert said.count("of the object's tokens match their own part") == 2


def test_compare_keeps_a_stock_calls_queries_and_keys():
    pipe = pipelines.AppearanceTransferPipeline.from_pipe(models.make_pipe("sd15"))
    kept = {}
    name, layer = list(models.self_attention(pipe.unet, "up_blocks").items())[-1]
    for projection in ("to_q", "to_k"):
        getattr(layer, projection).register_forward_hook(
            lambda _, __, output, projection=projection: kept.__setitem__(projection, output)
        )
    structure, appearance = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    captures = correspondence.compare(pipe, structure, appearance, "a zebra", noise=0.5)
    capture = captures[-1]
    assert [each.layer for each in captures] == list(
        models.self_attention(pipe.unet, "up_blocks")
    ) and capture.layer == name
    for got, projection, row in (
        (capture.query, "to_q", 0),
        (capture.ref_query, "to_q", 1),
        (capture.ref_key, "to_k", 1),
    ):
        assert torch.equal(got[0].transpose(0, 1).flatten(1), kept[projection][row])
    alone = correspondence.compare(pipe, structure, structure.flip(0), "a zebra", noise=0.5, layers=name)[0]
    torch.testing.assert_close(alone.query, capture.query)
    assert not torch.equal(alone.ref_query, capture.ref_query)
    with attach(pipe, QAlign()):
        pass  # nothing of `compare` is left installed


def test_matches_and_heat_are_the_formulas():
    query, ref_query, ref_key = (random_features(1, 4, 36, 8, seed=seed) for seed in range(3))
    capture = Capture("layer", query, ref_query, ref_key)
    joint = [features[0].transpose(0, 1).flatten(1).double() for features in (query, ref_query, ref_key)]
    cosine = (
        torch.nn.functional.normalize(joint[0], dim=-1) @ torch.nn.functional.normalize(joint[1], dim=-1).T
    )
    assert torch.equal(capture.match("query_query").index.flatten().long(), cosine.argmax(-1))
    assert torch.equal(capture.match("query_key").index.flatten().long(), (joint[0] @ joint[2].T).argmax(-1))
    attention = (query.double() @ ref_key.double().mT / 8**0.5).softmax(-1).mean(1)[0]
    for token in (0, 17, 35):
        torch.testing.assert_close(
            capture.heat(token, "query_key").double(), attention[token], atol=1e-6, rtol=1e-5
        )
        torch.testing.assert_close(
            capture.heat(token, "query_query").double(),
            (20 * cosine[token]).softmax(-1),
            atol=1e-6,
            rtol=1e-5,
        )


def test_shares_count_only_parts_the_appearance_shows():
    labels = torch.full((32, 32), scenes.PARTS.index("sky"))
    labels[:16], labels[16:, :16] = scenes.PARTS.index("body"), scenes.PARTS.index("wing")
    other = labels.where(labels != scenes.PARTS.index("wing"), scenes.PARTS.index("sky"))
    query = random_features(1, 2, 64, 16, seed=0)
    picture = torch.zeros(3, 32, 32)
    capture = Capture("up_blocks.0.attn1", query, query, -query)
    shares = [
        match_figures.draw_lines(capture, picture, picture, pair)[1]["query-query (Q-Align)"]
        for pair in ((labels, labels), (labels, other))
    ]
    assert shares == [1, 1]
    swapped = Capture(
        "up_blocks.0.attn1", query, query.roll(32, 2), -query
    )  # the upper half matches the lower one
    assert (
        match_figures.draw_lines(swapped, picture, picture, (labels, other))[1]["query-query (Q-Align)"] == 0
    )
    assert match_figures.draw_lines(capture, picture, picture, None)[1] == {}


def test_default_points_lie_on_parts_both_scenes_show():
    labels = scenes.render([scenes.held_out_seed(0), scenes.held_out_seed(5)]).labels
    query = random_features(1, 1, 256, 8, seed=0)
    capture = Capture("layer", query, query, query)
    points = match_figures.default_points(capture, torch.zeros(3, 128, 128), tuple(labels))
    centres = correspondence.token_centres((128, 128), (16, 16))
    first, second = scenes.token_labels(labels, (16, 16))
    parts = [int(first[torch.cdist(point[None], centres).argmin()]) for point in points]
    assert torch.cdist(points, centres).amin(1).max() == 0
    assert len(set(parts)) == 3
    assert all(part >= len(scenes.BACKGROUNDS) and (second == part).any() for part in parts)
    assert match_figures.default_points(capture, torch.zeros(3, 40, 80), None).tolist() == [
        [20, 10],
        [40, 20],
        [60, 30],
    ]


@pytest.mark.parametrize(
    ("height", "width", "tokens", "grid"),
    [(512, 768, 384, (16, 24)), (520, 512, 33 * 32, (33, 32)), (40, 40, 9, (3, 3))],
)
def test_token_grid_halves_and_rounds_up(height, width, tokens, grid):
    assert token_grid((height, width), tokens) == grid


@pytest.mark.parametrize("tokens", [0, 17, 64 * 64 * 4])
def test_token_grid_refuses_what_is_no_grid(tokens):
    with pytest.raises(
        ValueError, match=f"^tokens: expected a grid of 64 x 64 halved some times, got {tokens}$"
    ):
        token_grid((64, 64), tokens)


@pytest.mark.parametrize(
    ("layer", "short"),
    [
        ("up_blocks.1.attentions.0.transformer_blocks.0.attn1", "up_blocks.1.attentions.0"),
        (
            "up_blocks.0.attentions.2.transformer_blocks.10.attn1",
            "up_blocks.0.attentions.2.transformer_blocks.10",
        ),
    ],
)
def test_short_layer_names_omit_the_first_block(layer, short):
    assert short_name(layer) == short


def test_token_centres_run_along_rows_first():
    assert correspondence.token_centres((4, 6), (2, 2)).tolist() == [[1.5, 1], [4.5, 1], [1.5, 3], [4.5, 3]]


def _report(pairs, agreement):
    entry = {
        "part_agreement": agreement,
        "own_part_mass": 0.5,
        "object_background_leakage": 0.25,
        "leaking_pairs": 2,
        "colour_error": None,
    }
    layers = {"layers": ["up.0", "up.1"], "steps": [3, 6], "cross_region_mass": [[0.1, 0.2], [0.3, None]]}
    methods = {
        "cross_image": {**entry, "by_layer_and_step": layers},
        "qalign": {**entry, "leaking_pairs_improved": 1, "by_layer_and_step": layers},
        "qalign_warp": {**entry, "leaking_pairs_improved": 2, "by_layer_and_step": layers},
    }
    return {"pairs": pairs, "methods": methods}


def test_demo_sets_its_figures_beside_the_committed_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(_demo_transfer, "COMMITTED", tmp_path / "leakage.json")
    assert _demo_transfer.committed() == {}
    _demo_transfer.COMMITTED.write_text(json.dumps(_report(180, 0.75)))
    lines = _leakage_tables.summary_table(
        {"6 pairs": _report(6, 0.5)} | _demo_transfer.committed()
    ).splitlines()
    assert lines[0].split() == ["attention", "leakage", "6", "pairs", "180", "pairs,", "as", "committed"]
    assert lines[1].split() == ["Cross-Image", "Q-Align", "QAlignWarp"] * 2
    assert lines[2].split()[-6:] == ["0.500"] * 3 + ["0.750"] * 3
    assert [line.split()[-6:] for line in lines if line.startswith(("leaking", "  leak"))] == [
        ["2"] * 6,
        ["-", "1", "2"] * 2,
    ]


def test_demo_reads_a_method_s_leakage_by_layer():
    curves = _demo_transfer.by_layer(_report(6, 0.5)["methods"]["qalign"]["by_layer_and_step"])
    assert curves["up.0"] == [(3, 0.1), (6, 0.2)]
    assert curves["up.1"][0] == (3, 0.3) and numpy.isnan(curves["up.1"][1][1])


def test_methods_are_all_in_the_table(capsys):
    assert command_line.main(["methods"]) == 0
    written = capsys.readouterr().out.splitlines()
    assert max(map(len, written)) <= 100
    assert all(
        card in "\n".join(written)
        for kind in methods.METHODS.values()
        for card in (kind.card.edits, kind.card.layers, kind.card.uses)
    )
    lines = [line for line in written if not line.startswith(" ")]
    assert [line.split()[0] for line in lines] == ["name", *methods.METHODS, "-"]
    assert all(
        _shared.COMPARED.get(name, kind.card.title) == kind.card.title
        for name, kind in methods.METHODS.items()
    )
    assert lines[1].split()[-2:] == ["21.5", "42.9"] and lines[2].split()[-2:] == ["5.4", "10.7"]
    assert lines[-1].split()[-2:] == ["10.7", "21.5"]


@pytest.mark.slow
def test_compare_draws_and_prints_every_named_method(folder, tmp_path, capsys):
    options = f"--model {{}}/model --steps 6 --method qalign ctrl_x eye_for_an_eye --out {tmp_path}/grid.png"
    assert run(folder, f"compare --appearance {{}}/a.png --structure {{}}/b.png {options}") == 0
    head, *lines, first, second, where = capsys.readouterr().out.splitlines()
    assert head.split() == "method time s peak MiB own part ↑ on background ↓ colour error ↓".split()
    assert [first, second] == compare.LEGEND.splitlines()
    assert [line[:24].strip() for line in lines] == ["Q-Align", "Ctrl-X", "Eye-for-an-eye"]
    assert all(
        line.split()[-3:] == ["-", "-", "-"] for line in lines
    )  # the parts of these pictures are unknown
    assert where == f"grid: {tmp_path}/grid.png"
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 800


def test_labels_beside_pictures_are_read_where_they_fit(tmp_path):
    for name, side in (("a", 16), ("b", 16), ("large", 32)):
        Image.new("L", (side, side), 3).save(tmp_path / f"{name}-labels.png")
    picture = torch.zeros(3, 16, 16)
    first, second = compare.labels_beside(tmp_path / "a.png", tmp_path / "b.png", picture)
    assert first.shape == second.shape == (16, 16) and first.unique().tolist() == [3]
    assert compare.labels_beside(tmp_path / "a.png", tmp_path / "large.png", picture) is None
    assert compare.labels_beside(tmp_path / "a.png", tmp_path / "none.png", picture) is None


def test_distill_writes_what_the_pipeline_returns(folder, tmp_path, capsys):
    for name, step in (("a", 3), ("b", 5)):
        Image.fromarray((numpy.arange(SIZE * SIZE).reshape(SIZE, SIZE) // step % 2).astype("uint8")).save(
            tmp_path / f"{name}-labels.png"
        )
    options = "--model {}/model --steps 3 --iterations 2 --rate 0.1 --content-weight 0.7"
    options += " --layers up_blocks.1 --tune-decoder 4"
    masks = [tmp_path / f"{name}-labels.png" for name in "ab"]
    text = (
        f"distill --appearance {{}}/a.png --content {{}}/b.png {options} --mask {masks[0]} {masks[1]} --mode"
    )
    pipe = pipelines.AttentionDistillationPipeline.from_pipe(models.make_pipe("sd15"))
    for mode, own in (("optimise", "--anneal"), ("sample", "--seed 4")):
        assert run(folder, f"{text} {mode} {own} --out {tmp_path}/{mode}.png") == 0
        result = pipe(
            picture(0),
            picture(1),
            mode=mode,
            method=AttentionDistillation(content_weight=0.7),
            num_inference_steps=3,
            iterations=2,
            learning_rate=0.1,
            layers="up_blocks.1",
            regions=Regions.open(*masks),
            tune_decoder=4,
            anneal=mode == "optimise",
            generator=torch.Generator().manual_seed(4),
        )
        assert torch.equal(pixels(tmp_path / f"{mode}.png"), torch.tensor(numpy.asarray(result.images[0])))
        said, progress = capsys.readouterr()
        assert f"loss={result.losses[-1, 0]:.4g}" in progress
        assert f"picture: {tmp_path}/{mode}.png" in said
        assert f"loss: {result.losses[0, 0]:.4g} to {result.losses[-1, 0]:.4g} in 6 iterations" in said
        first, last = result.decoder_losses[0], result.decoder_losses[-1]
        assert f"loss of the decoder: {first:.4g} to {last:.4g} in 4 iterations" in said


@pytest.mark.parametrize(
    "text", ["distill --content {}/b.png", "distill --content {}/b.png --mode sample", "texture --size 48"]
)
def test_interrupted_run_writes_its_best_picture(folder, tmp_path, capsys, monkeypatch, text):
    """Ctrl-C in the third iteration."""
    descend, losses = distillation_run.descend, []

    def interrupted(*given):
        if len(losses) == 2:
            raise KeyboardInterrupt
        losses.append(descend(*given))
        return losses[-1]

    monkeypatch.setattr(distillation_run, "descend", interrupted)
    options = "--style {}/a.png --model {}/model --steps 5 --iterations 1 --tune-decoder 2"
    assert run(folder, f"{text} {options} --out {tmp_path}/o.png") == 130
    assert "interrupted: the picture is the best one so far" in capsys.readouterr().out
    losses.clear()
    pipe = pipelines.AttentionDistillationPipeline.from_pipe(models.make_pipe("sd15"))
    settings = {"num_inference_steps": 5, "iterations": 1, "generator": torch.Generator().manual_seed(0)}
    if "texture" in text:
        result = pipe.expand(picture(0), 48, 48, **settings)
    else:
        result = pipe(picture(0), picture(1), mode="sample" if "sample" in text else "optimise", **settings)
    assert result.interrupted and torch.equal(
        pixels(tmp_path / "o.png"), torch.tensor(numpy.asarray(result.images[0]))
    )


def test_texture_has_the_size_that_was_asked_for(folder, tmp_path, capsys):
    command = "texture --style {}/a.png --size 64x48 --model {}/model --steps 1 --iterations 1"
    assert (
        run(folder, f"{command} --out {tmp_path}/o.png")
        == run(folder, f"{command} --tune-decoder --out {tmp_path}/t.png")
        == 0
    )
    assert pixels(tmp_path / "o.png").shape == pixels(tmp_path / "t.png").shape == (48, 64, 3)
    assert not torch.equal(pixels(tmp_path / "o.png"), pixels(tmp_path / "t.png"))
    said, progress = capsys.readouterr()
    assert f"picture: {tmp_path}/o.png" in said and said.count("in 75 iterations") == 1
    (loss,) = {line.split()[3] for line in said.splitlines() if line.startswith("loss: ")}
    assert progress.count(f"loss={loss}") >= 2


def test_masked_textures_have_the_size_of_their_labels(folder, tmp_path):
    labels = (numpy.arange(48 * 64).reshape(48, 64) // 8 % 2).astype("uint8")
    for name, each in (("style", labels[:SIZE, :SIZE]), ("output", labels), ("odd", labels[:30])):
        Image.fromarray(each).save(tmp_path / f"{name}.png")
    pipe = pipelines.AttentionDistillationPipeline.from_pipe(models.make_pipe("sd15"))
    options = {
        "num_inference_steps": 1,
        "iterations": 1,
        "regions": Regions.open(tmp_path / "style.png", tmp_path / "output.png"),
    }
    expected = {
        "texture": lambda **more: pipe.expand(picture(0), 48, 64, **more),
        "distill": lambda **more: pipe(picture(0), mode="optimise", height=48, width=64, **more),
    }
    for command, make in expected.items():
        text = f"{command} --style {{}}/a.png --mask {tmp_path}/style.png {tmp_path}/%s.png"
        text += " --model {}/model --steps 1 --iterations 1"
        assert run(folder, f"{text % 'output'} --out {tmp_path}/{command}-o.png") == 0
        image = make(generator=torch.Generator().manual_seed(0), **options).images[0]
        assert torch.equal(pixels(tmp_path / f"{command}-o.png"), torch.tensor(numpy.asarray(image)))
        assert run(folder, f"{text % 'output'} --size 32x24 --out {tmp_path}/{command}-s.png") == 0
        assert pixels(tmp_path / f"{command}-s.png").shape == (24, 32, 3)
        assert (
            run(folder, f"{text % 'odd'} --out {tmp_path}/{command}-odd.png") == 2
            and not (tmp_path / f"{command}-odd.png").exists()
        )


BOUND = "bound --prompt fox --box fox 0 0.25 0.5 1 --model {}/model --steps 4 --seed 3 --guidance 3"
BOUND += " --rates 300 100 --iterations 2"


def test_bound_writes_what_the_pipeline_returns(folder, tmp_path, capsys):
    assert (
        run(
            folder,
            f"{BOUND} --size 40x32 --layers up_blocks.1 mid "
            f"--labels-out {tmp_path}/l.png --out {tmp_path}/o.png",
        )
        == 0
    )
    pipe = pipelines.BoundedAttentionPipeline.from_pipe(models.make_pipe("sd15"))
    result = pipe(
        "fox",
        [("fox", (0, 0.25, 0.5, 1))],
        guidance=BoundedGuidance(rates=(300, 100), iterations=2),
        num_inference_steps=4,
        guidance_scale=3,
        layers=["up_blocks.1", "mid"],
        height=32,
        width=40,
        generator=torch.Generator().manual_seed(3),
    )
    assert torch.equal(pixels(tmp_path / "o.png"), torch.tensor(numpy.asarray(result.images[0])))
    with Image.open(tmp_path / "l.png") as labels:
        assert labels.size == (40, 32) and torch.equal(
            torch.tensor(numpy.asarray(labels))[::2, ::2].long(), result.regions.structure
        )
    said = capsys.readouterr().out
    assert f"picture: {tmp_path}/o.png" in said and f"masks: {tmp_path}/l.png" in said
    assert f"loss: {result.losses[0, 1]:.4g} to {result.losses[-1, 1]:.4g} in 2 readings" in said


def test_bound_can_leave_out_each_part(folder, tmp_path, capsys):
    found = []
    without_loss = BOUND.replace("--rates 300 100 --iterations 2", "--iterations 0")
    for text in (BOUND, f"{BOUND} --keep-boxes", without_loss):
        assert run(folder, f"{text} --labels-out {tmp_path}/l.png --out {tmp_path}/o.png") == 0
        found.append(
            (pixels(tmp_path / "o.png"), torch.tensor(numpy.asarray(Image.open(tmp_path / "l.png"))))
        )
    boxes = torch.zeros(SIZE, SIZE)
    boxes[SIZE // 4 :, : SIZE // 2] = 1
    assert torch.equal(found[1][1], boxes) and not torch.equal(found[0][1], boxes)
    assert not torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][0], found[2][0])
    assert capsys.readouterr().out.count("loss: ") == 2


def test_an_interrupted_bound_writes_its_picture(folder, tmp_path, capsys, monkeypatch):
    predict, calls = bounded_attention._Run._predict, []

    def interrupted(*given):
        if calls:
            raise KeyboardInterrupt
        return calls.append(predict(*given)) or calls[0]

    monkeypatch.setattr(bounded_attention._Run, "_predict", interrupted)
    assert run(folder, f"{BOUND} --out {tmp_path}/o.png") == 130
    assert (
        pixels(tmp_path / "o.png").float().std() > 0
        and "interrupted: the picture is the last estimate" in capsys.readouterr().out
    )
