"""The demo on small networks: true matches, figures, files, and the command line of both parts."""

import json
import math

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("skimage")

from qalign import __main__ as command_line  # noqa: E402
from qalign.commands import _demo_step, _demo_transfer  # noqa: E402
from qalign.commands import demo as command  # noqa: E402
from qalign.embedded.scenes import held_out_pairs, render  # noqa: E402
from qalign.evaluation import denoising_step, photographs  # noqa: E402
from qalign.evaluation.peak_memory import MIB, PeakMemory  # noqa: E402
from qalign.pipelines import AppearanceTransferPipeline  # noqa: E402
from qalign_kernels.testing import judge  # noqa: E402
from tests.processors import models  # noqa: E402

CHANNELS = (32, 64, 128)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    found = denoising_step.run(size=128, channels=CHANNELS)
    _demo_step.write_step(found, out)
    return out, found.report


def test_writes_the_picture_and_all_figures(finished):
    out, report = finished
    assert (out / "correspondences.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "demo.json").read_text()) == report
    assert [layer["tokens"] for layer in report["layers"]] == [16, 16, 64, 64, 256, 256]
    assert set(report["steps"]) == set(denoising_step.VARIANTS)


def test_both_paths_agree_and_edit_only_output(finished):
    agreement = finished[1]["agreement"]
    assert 0 < 100 * agreement["shipped_to_materialised"] < agreement["output_row_to_stock"]
    assert agreement["reference_rows_to_stock"] == 0


def test_figures_are_within_what_they_can_be(finished):
    for layer in finished[1]["layers"]:
        assert 0 < layer["unique_fraction"] <= 1
        assert (
            1
            <= layer["effective_keys"]["rearranged"]
            <= layer["unique_fraction"] * layer["tokens"] * (1 + 1e-5)
        )
        assert layer["effective_keys"]["all_keys"] <= layer["tokens"] * (1 + 1e-5)
        assert all(0 <= share <= 1 for share in layer["within_one_token"].values())


def test_render_prints_every_layer_and_every_step(finished):
    text = _demo_step.render_step(finished[1])
    assert all(layer["layer"] in text for layer in finished[1]["layers"])
    assert all(text.count(name) >= 1 for name in denoising_step.VARIANTS.values())


def test_photographs_show_points_at_their_true_positions():
    pair = photographs.load_pair(512)
    truth = photographs.grid_truth(pair, 32 * 32)
    known = truth.known

    def colours(picture, points):
        place = (points / pair.size * 2 - 1).view(1, 1, -1, 2)
        blurred = torch.nn.functional.avg_pool2d(picture.unsqueeze(0), 9, 1, 4)
        return torch.nn.functional.grid_sample(blurred, place, align_corners=False)[0, :, 0].T

    here = colours(pair.structure, truth.position[known])
    true_error = (here - colours(pair.appearance, truth.target[known])).abs().mean()
    same_place_error = (here - colours(pair.appearance, truth.position[known])).abs().mean()
    assert known.double().mean() > 0.7
    assert true_error < same_place_error / 3


def test_no_true_match_lies_in_its_own_place():
    for tokens in (16 * 16, 32 * 32, 64 * 64):
        truth = photographs.grid_truth(photographs.load_pair(512), tokens)
        assert truth.error(torch.arange(tokens)).min() > truth.pitch


def test_truth_error_is_zero_for_true_tokens():
    position = torch.tensor([[0.5, 0.5], [1.5, 0.5], [0.5, 1.5], [1.5, 1.5]])
    truth = photographs.Truth(position, position[[1, 0, 3, 2]], torch.tensor([True, True, True, False]), 1.0)
    assert truth.error(torch.tensor([1, 0, 3, 0])).tolist() == [0, 0, 0]
    distances = torch.tensor([0.0, 1.0, 1.0, math.sqrt(2)])
    assert len(truth.chance()) == 64 * 3
    assert set(truth.chance().round(decimals=4).tolist()) == set(distances.round(decimals=4).tolist())


def test_effective_keys_is_the_exponential_of_the_entropy():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 8, 48, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    counts = torch.randint(0, 4, (1, 1, 48), generator=generator, dtype=torch.int32)

    def truth(query, key, weight):
        map_ = (query @ key.mT / 4).exp() * weight
        map_ = map_ / map_.sum(-1, keepdim=True)
        return torch.special.entr(map_).sum(-1).exp().mean()

    for given, weight in ((None, torch.ones(1, 1, 1, 48)), (counts, counts.unsqueeze(2))):
        actual = torch.tensor(denoising_step.effective_keys(query.float(), key.float(), given))
        same_precision = truth(query.float(), key.float(), weight.float())
        verdict = judge(actual, same_precision, truth(query, key, weight.double()), 48)
        assert verdict.passed, verdict


def test_spread_of_uniform_and_of_one_hot_attention():
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    moments = torch.cat([points, points.square().sum(-1, keepdim=True)], -1)
    assert denoising_step.spread_px(moments.mean(0)) == pytest.approx(math.sqrt(2))
    assert denoising_step.spread_px(moments) == 0


def test_peak_memory_sees_what_was_held_inside_only():
    with PeakMemory(torch.device("cpu")) as large:
        torch.ones(64 * MIB // 4).sum()
    with PeakMemory(torch.device("cpu")) as small:
        torch.ones(1).sum()
    assert 60 < large.peak_mib < 96
    assert small.peak_mib < 16


@pytest.mark.parametrize(
    "arguments",
    [["demo", "--size", "100"], ["demo", "--size", "32"], ["demo", "--size", "x"], ["demo", "--only", "x"]],
)
def test_command_line_refuses_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as refusal:
        command_line.main(arguments)
    assert refusal.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_command_line_names_what_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(command, "NEEDS", ("torch", "no_such_package"))
    assert command_line.main(["demo"]) == 2
    assert "found no no_such_package" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("--size 256 --pairs 2", ["step", "transfer"]),
        ("--size 256 --only step", ["step"]),
        ("--pairs 2 --only transfer", ["transfer"]),
    ],
)
def test_command_line_hands_its_options_on(given, parts, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(command, "show_step", lambda out, *options: calls.append(("step", out, options)))
    monkeypatch.setattr(
        command, "show_transfer", lambda out, *options: calls.append(("transfer", out, options))
    )
    assert command_line.main(["demo", "--out", str(tmp_path), "--seed", "3", *given.split()]) == 0
    expected = [("step", tmp_path, (256, 3)), ("transfer", tmp_path, (2, 3))]
    assert calls == [call for call in expected if call[0] in parts]


def test_the_second_part_transfers_matches_and_measures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        AppearanceTransferPipeline,
        "embedded",
        classmethod(lambda cls, dtype: cls.from_pipe(models.make_pipe("small"))),
    )
    for name, value in {"STEPS": 4, "MEASURED_STEPS": 8, "ROWS": 1}.items():
        monkeypatch.setattr(_demo_transfer, name, value)
    assert command_line.main(["demo", "--only", "transfer", "--pairs", "1", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    written = {"transfer.png", "transfer_matches.png", "heat_maps.png", "leakage.png", "leakage.json"}
    assert {path.name for path in tmp_path.iterdir()} == written
    assert all(f": {tmp_path / name}\n" in said for name in written)
    report = json.loads((tmp_path / "leakage.json").read_text())
    assert report["pairs"] == 1 and report["settings"]["steps"] == 8
    assert f"{report['methods']['qalign']['part_agreement']:.3f}" in said


def test_grid_row_is_what_the_pipeline_paints():
    pipe = AppearanceTransferPipeline.from_pipe(models.make_pipe("small"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_demo_transfer, "STEPS", 4)
        row = _demo_transfer.transfer(pipe, seed=2)
    assert list(row) == ["structure", "appearance", "Cross-Image", "Q-Align", "QAlignWarp"]
    pair = held_out_pairs(1, 2)[0]
    size = row["structure"].shape[-1]
    scenes = render([pair.structure, pair.appearance], size)
    assert torch.equal(torch.stack([row["structure"], row["appearance"]]), scenes.image)
    caption, generator = f"a photo of a {scenes.plans[0]}", torch.Generator().manual_seed(2)
    painted = pipe(
        row["appearance"],
        row["structure"],
        caption,
        method="cross_image",
        num_inference_steps=4,
        adain=None,
        generator=generator,
    )
    assert painted.images[0].tobytes() == row["Cross-Image"].tobytes()
    assert len({row[name].tobytes() for name in ("Cross-Image", "Q-Align", "QAlignWarp")}) == 3
