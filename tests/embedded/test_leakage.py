"""Leakage: its figures for features with known matches, and the whole run on a small pipeline."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from qalign import BatchLayout, CrossImage, QAlign, QAlignWarp, embedded  # noqa: E402
from qalign import __main__ as command_line  # noqa: E402
from qalign.commands import leakage as command  # noqa: E402
from qalign.commands._leakage_tables import leakage_table  # noqa: E402
from qalign.context.clock import Clock  # noqa: E402
from qalign.context.layer_call import Site  # noqa: E402
from qalign.context.layers import picture_size  # noqa: E402
from qalign.context.layout import ROLES  # noqa: E402
from qalign.embedded.parts import BACKGROUNDS, PARTS  # noqa: E402
from qalign.embedded.scenes import ScenePair, held_out_pairs, render, token_labels  # noqa: E402
from qalign.evaluation import ablation, attention_tally, bootstrap, leakage, picture_metrics  # noqa: E402
from qalign.evaluation.attention_tally import Measured  # noqa: E402
from qalign.evaluation.leakage import PairResult, Settings  # noqa: E402
from qalign.evaluation.noised_features import noised_features  # noqa: E402
from qalign.evaluation.processes import leave, processes  # noqa: E402
from qalign.pipelines import AppearanceTransferPipeline  # noqa: E402
from qalign.pipelines.transfer_inputs import edited_steps  # noqa: E402
from qalign_kernels import label_mass, match_counts, similarity_argmax  # noqa: E402
from qalign_kernels._choices import REFINEMENTS  # noqa: E402
from qalign_kernels.testing import random_features  # noqa: E402
from tests.processors.models import pipe_of  # noqa: E402

TRIPLE = BatchLayout("output", "appearance", "structure")
PAIR = BatchLayout("output", "appearance")
QUICK = Settings(steps=4, adain=None, every=1)
REFINED = [QAlign(refinement=name) for name in REFINEMENTS]
BODY, HEAD, LIMB, TAIL = (PARTS.index(name) for name in ("body", "head", "limb", "tail"))
METHODS = {"cross_image": CrossImage(), "qalign": QAlign()}


@pytest.fixture(scope="module")
def pipe():
    return pipe_of(AppearanceTransferPipeline)


@pytest.fixture(scope="module")
def report(pipe):
    return leakage.run(pipe, pairs=3, settings=QUICK)


def rows(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def random_labels(batch: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(len(PARTS), (batch, tokens), generator=torch.Generator().manual_seed(seed))


def features_of(labels: torch.Tensor, heads: int, norm: float) -> torch.Tensor:
    """Features [B, H, N, PARTS] that say the part and nothing else."""
    return (
        norm
        * torch.nn.functional.one_hot(labels, len(PARTS))
        .float()
        .unsqueeze(1)
        .expand(-1, heads, -1, -1)
        .contiguous()
    )


@pytest.mark.parametrize("method", [CrossImage(), *REFINED], ids=repr)
def test_perfect_features_agree_and_do_not_leak(method):
    labels = random_labels(2, 64, seed=0)
    q = features_of(labels, heads=2, norm=12.0)
    tallies = attention_tally.measure(method, q, q, labels, rows(0), rows(1), Site(PAIR))
    found = attention_tally.figures(tallies)
    assert found["part_agreement"].item() == 1
    assert found["own_part_mass"].item() == pytest.approx(1, abs=1e-6)
    assert found["object_background_leakage"].item() == pytest.approx(0, abs=1e-6)
    assert found["cross_region_mass"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("method", [CrossImage(), *REFINED], ids=repr)
def test_features_that_confuse_every_part_always_leak(method):
    labels = random_labels(2, 96, seed=1)
    q = features_of(torch.stack([(labels[0] + 1) % len(PARTS), labels[1]]), heads=2, norm=12.0)
    tallies = attention_tally.measure(method, q, q, labels, rows(0), rows(1), Site(PAIR))
    found = attention_tally.figures(tallies)
    assert found["part_agreement"].item() == 0
    assert found["cross_region_mass"].item() == pytest.approx(1, abs=1e-6)
    eyes = (labels[0] == PARTS.index("eye")).sum() / (
        labels[0] >= len(BACKGROUNDS)
    ).sum()  # the next part of the last is the first background
    assert found["object_background_leakage"].item() == pytest.approx(eyes.item(), abs=1e-6)


def test_mass_is_label_mass_with_matched_counts():
    q, k = random_features(2, 3, 50, 16, seed=2), random_features(2, 3, 50, 16, seed=3)
    labels = random_labels(2, 50, seed=4)
    counts = match_counts(similarity_argmax(q[:1], q[1:]).index, 50)
    for method, weight in ((CrossImage(), None), (QAlign(refinement="rearranged"), counts)):
        expected = label_mass(q[:1], k[1:], labels[1:].int(), len(PARTS), counts=weight)
        torch.testing.assert_close(
            attention_tally.attention_mass(method, q, k, labels, rows(0), rows(1), Site(PAIR)), expected
        )


@pytest.mark.parametrize("method", [CrossImage(), *REFINED, QAlign(refinement="topk", topk=1)], ids=repr)
def test_mass_sums_to_one_at_every_contrast(method):
    q, k = random_features(2, 3, 50, 16, seed=5), random_features(2, 3, 50, 16, seed=6)
    labels = random_labels(2, 50, seed=7)
    assert method.contrast != 1
    mass = attention_tally.attention_mass(method, q, k, labels, rows(0), rows(1), Site(PAIR))
    torch.testing.assert_close(mass.sum(-1), torch.ones(1, 3, 50))


def test_mass_of_the_warp_is_the_appearance_row():
    """Each query has the mass of the token that it matched, in the appearance's own attention."""
    q, k = random_features(2, 3, 50, 16, seed=26), random_features(2, 3, 50, 16, seed=27)
    labels = random_labels(2, 50, seed=28)
    index = similarity_argmax(q[:1], q[1:]).index[0, 0].long()
    own = label_mass(q[1:], k[1:], labels[1:].int(), len(PARTS))
    mass = attention_tally.attention_mass(QAlignWarp(), q, k, labels, rows(0), rows(1), Site(PAIR))
    torch.testing.assert_close(mass, own[:, :, index])


def test_mass_of_one_candidate_is_at_its_match():
    q, k = random_features(2, 3, 50, 16, seed=8), random_features(2, 3, 50, 16, seed=9)
    labels = random_labels(2, 50, seed=10)
    for method in (QAlign(refinement="none"), QAlign(refinement="topk", topk=1)):
        tokens, counterparts, right, own, background = attention_tally.measure(
            method, q, k, labels, rows(0), rows(1), Site(PAIR)
        )[0].T
        torch.testing.assert_close(own, right)
        assert 0 < right.sum() < counterparts.sum() <= tokens.sum() == 50
        assert background.sum() < 50


def test_all_candidates_are_cross_image():
    q, k = random_features(2, 3, 50, 16, seed=11), random_features(2, 3, 50, 16, seed=12)
    labels = random_labels(2, 50, seed=13)
    methods = (CrossImage(), QAlign(refinement="topk", topk=50))
    masses = [
        attention_tally.attention_mass(method, q, k, labels, rows(0), rows(1), Site(PAIR))
        for method in methods
    ]
    torch.testing.assert_close(*masses)


def test_match_follows_the_signal_of_the_method():
    q, k = random_features(2, 3, 50, 16, seed=14), random_features(2, 3, 50, 16, seed=15)
    whole = [x.transpose(1, 2).flatten(2) for x in (q, k)]
    dot = (whole[0][0] @ whole[1][1].T).argmax(-1)
    cosine = torch.cosine_similarity(whole[0][0].unsqueeze(1), whole[0][1].unsqueeze(0), dim=-1).argmax(-1)
    site = Site(PAIR)
    assert (
        attention_tally.match(CrossImage(), q, k, rows(0), rows(1), site).flatten().tolist() == dot.tolist()
    )
    assert attention_tally.match(QAlign(), q, k, rows(0), rows(1), site).flatten().tolist() == cosine.tolist()
    assert attention_tally.match(QAlign(heads="per_head"), q, k, rows(0), rows(1), site).shape == (1, 3, 50)


def test_tally_is_the_sum_written_out():
    generator = torch.Generator().manual_seed(16)
    index = torch.randint(20, (2, 3, 30), generator=generator, dtype=torch.int32)
    mass = torch.rand(2, 3, 30, len(PARTS), generator=generator)
    query_labels, key_labels = random_labels(2, 30, seed=17), random_labels(2, 20, seed=18)
    expected = torch.zeros(2, len(PARTS), len(attention_tally.TALLIED), dtype=torch.float64)
    for row in range(2):
        for token, label in enumerate(query_labels[row].tolist()):
            right = sum(key_labels[row, index[row, head, token]] == label for head in range(3)) / 3
            own, background = (
                mass[row, :, token, label].mean(),
                mass[row, :, token, : len(BACKGROUNDS)].sum(-1).mean(),
            )
            expected[row, label] += torch.tensor(
                [1, label in key_labels[row].tolist(), right, own, background], dtype=torch.float64
            )
    torch.testing.assert_close(
        attention_tally.tally(index, mass, query_labels, key_labels), expected, rtol=1e-5, atol=1e-5
    )


def test_agreement_averages_over_parts_mass_over_queries():
    tallies = torch.zeros(len(PARTS), len(attention_tally.TALLIED), dtype=torch.float64)
    tallies[0] = torch.tensor([50, 50, 0, 0, 50])  # a background: no query of the object
    tallies[BODY] = torch.tensor([8, 8, 8, 6, 1])
    tallies[HEAD] = torch.tensor([2, 2, 0, 1, 1])
    tallies[TAIL] = torch.tensor([10, 0, 0, 0, 3])  # out of view in the appearance
    found = {figure: value.item() for figure, value in attention_tally.figures(tallies).items()}
    expected = {
        "part_agreement": 0.5,
        "token_agreement": 0.8,
        "own_part_mass": 0.7,
        "object_background_leakage": 0.25,
        "cross_region_mass": 0.3,
    }
    assert found == pytest.approx(expected)
    assert all(math.isnan(value) for value in attention_tally.figures(torch.zeros_like(tallies)).values())


def small_labels(size: int = 32) -> dict[str, torch.Tensor]:
    appearance, structure = render([11, 13], size).labels
    return {"output": structure, "plain": structure, "structure": structure, "appearance": appearance}


def test_measured_changes_nothing_and_takes_roles_from_layout():
    q, k, v = (random_features(4, 2, 64, 16, seed=seed) for seed in (19, 20, 21))
    layout, labels = BatchLayout(*ROLES), small_labels()
    output, appearance = ROLES.index("output"), ROLES.index("appearance")
    tokens = torch.stack([token_labels(labels[role][None], (8, 8))[0] for role in ROLES]).long()
    for method in METHODS.values():
        measured, site = Measured(method, labels), Site(layout)
        assert torch.equal(measured.attend(q, k, v, site), method.attend(q, k, v, site))
        (key, found), *more = measured.tallies.items()
        assert key == ("", 0) and not more
        expected = attention_tally.measure(method, q, k, tokens, rows(output), rows(appearance), site)[0]
        assert torch.equal(found, expected)


def test_measured_skips_idle_steps_and_structure_steps():
    q, k, v = (random_features(3, 2, 64, 16, seed=seed) for seed in (22, 23, 24))
    measured = Measured(CrossImage(structure_every=5, structure_until=1.0), small_labels(), every=2)
    clock = Clock((0.3, 1.0), measured.takes_structure)
    for step in range(20):
        clock.set(step, 20)
        measured.attend(q, k, v, Site(TRIPLE, clock=clock))
    assert [step for _, step in measured.tallies] == [
        8,
        10,
        12,
        14,
        18,
    ]  # 6 and 16 read the structure, one late


def test_colours_of_parts_and_their_error():
    labels = torch.full((10, 10), BODY)
    labels[:5], labels[9, 9] = HEAD, LIMB
    picture = torch.rand(3, 10, 10, generator=torch.Generator().manual_seed(25))
    colours = picture_metrics.part_colours(picture, labels)
    torch.testing.assert_close(colours[HEAD], picture[:, :5].double().mean((1, 2)))
    assert colours[TAIL].isnan().all()
    assert picture_metrics.colour_error(picture, labels, picture, labels).nanmean() == 0
    swapped = torch.where(labels == HEAD, BODY, torch.where(labels == BODY, HEAD, labels))
    error, distance = (
        picture_metrics.colour_error(picture, swapped, picture, labels),
        (colours[HEAD] - colours[BODY]).norm(),
    )
    torch.testing.assert_close(
        error[[HEAD, BODY, LIMB]], torch.stack([distance, distance, torch.zeros_like(distance)])
    )


def test_part_iou_of_overlapping_layouts():
    truth = torch.tensor([BODY, BODY, HEAD, HEAD])
    assert picture_metrics.part_iou(truth, truth) == 1
    assert picture_metrics.part_iou(truth.flip(0), truth) == 0
    assert picture_metrics.part_iou(torch.tensor([BODY, BODY, BODY, LIMB]), truth) == pytest.approx(
        (2 / 3 + 0) / 2
    )


def test_spread_of_paired_resampled_means_is_standard_error():
    values = torch.randn(400, generator=torch.Generator().manual_seed(26), dtype=torch.float64)
    holes = values.masked_fill(torch.arange(400) % 3 == 0, torch.nan)
    means = bootstrap.resample({"a": values, "b": values + 0.25, "c": holes}, seed=1)
    assert bootstrap.estimate(means["a"])["value"] == pytest.approx(values.mean().item())
    assert bootstrap.estimate(means["c"])["value"] == pytest.approx(holes.nanmean().item())
    assert bootstrap.estimate(means["b"] - means["a"])["interval"] == pytest.approx([0.25, 0.25])
    low, high = bootstrap.estimate(means["a"])["interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * values.std().item() / 20, rel=0.05)
    again = bootstrap.resample({"c": holes, "a": values}, seed=1)
    torch.testing.assert_close([again["a"], again["c"]], [means["a"], means["c"]], rtol=1e-12, atol=1e-12)
    assert bootstrap.estimate(bootstrap.resample({"a": torch.full((3,), torch.nan)})["a"]) == {
        "value": None,
        "interval": None,
    }


def made_up(own: dict[str, float], colour: float) -> PairResult:
    """A pair whose only object part is the body, of which `own` stays in place."""
    tallies = {
        name: torch.zeros(len(PARTS), len(attention_tally.TALLIED), dtype=torch.float64) for name in own
    }
    for name, mass in own.items():
        tallies[name][BODY] = torch.tensor([4, 4, 4 * mass, 4 * mass, 4 * (1 - mass)])
    errors = {
        name: torch.full((len(PARTS),), value, dtype=torch.float64)
        for name, value in {"untouched": 0.8, **dict.fromkeys(own, colour)}.items()
    }
    keyed = {
        name: {(layer, step): tally for step in (3, 6) for layer in ("up_blocks.0", "up_blocks.1")}
        for name, tally in tallies.items()
    }
    return PairResult(keyed, errors, dict.fromkeys(("untouched", "appearance", *own), 0.5))


def test_summary_counts_leaking_pairs_and_those_that_improve():
    masses = [(0.2, 0.3), (0.2, 0.1), (0.4, 0.9), (0.6, 0.7), (0.7, 0.2)]  # own-part mass of the two methods
    results = [made_up({"cross_image": a, "qalign": b}, colour=0.4) for a, b in masses]
    report = leakage.summarise(
        results, Settings(threshold=0.5), {name: repr(method) for name, method in METHODS.items()}
    )
    cross_image, qalign = report["methods"]["cross_image"], report["methods"]["qalign"]
    assert (report["pairs"], cross_image["leaking_pairs"], qalign["leaking_pairs"]) == (5, 3, 3)
    assert (qalign["leaking_pairs_improved"], qalign["leaking_pairs_improved_fraction"]) == (
        2,
        pytest.approx(2 / 3),
    )
    assert "leaking_pairs_improved" not in cross_image
    assert cross_image["own_part_mass"] == pytest.approx(0.42) and qalign["part_agreement"] == pytest.approx(
        0.44
    )
    assert cross_image["colour_ratio"] == pytest.approx(0.5) and report["untouched"]["colour_error"][
        "value"
    ] == pytest.approx(0.8)
    difference = report["differences"]["qalign"]
    assert (
        difference["own_part_mass"]["value"] == pytest.approx(0.02)
        and difference["leaking_pairs"]["value"] == 0
    )
    assert difference["own_part_mass"]["interval"][0] < 0.02 < difference["own_part_mass"]["interval"][1]
    table = cross_image["by_layer_and_step"]
    assert (table["layers"], table["steps"]) == (["up_blocks.0", "up_blocks.1"], [3, 6])
    torch.testing.assert_close(torch.tensor(table["object_background_leakage"]), torch.full((2, 2), 0.58))
    assert (
        cross_image["by_part"]["body"]["own_part_mass"] == pytest.approx(0.42)
        and cross_image["by_part"]["sky"]["own_part_mass"] is None
    )
    assert "2 of 3 (66.7%)" in leakage_table(report)


def test_layers_and_steps_are_not_mixed_up():
    result = made_up({"cross_image": 0.5}, 0.4)
    for (layer, step), tally in result.tallies["cross_image"].copy().items():
        tally = tally.clone()
        tally[BODY, attention_tally.TALLIED.index("own")] = 4 * (step / 10 + (layer == "up_blocks.1") / 100)
        result.tallies["cross_image"][layer, step] = tally
    report = leakage.summarise([result, result], Settings(), {"cross_image": ""})
    own = report["methods"]["cross_image"]["by_layer_and_step"]["own_part_mass"]
    assert own[0] == pytest.approx([0.3, 0.6]) and own[1] == pytest.approx([0.31, 0.61])
    assert report["methods"]["cross_image"]["own_part_mass"] == pytest.approx(0.455)


def test_features_of_a_row_depend_on_it_alone(pipe):
    pictures, timesteps = render([1, 3, 5], picture_size(pipe)).image, torch.tensor([100, 400, 700])
    together = noised_features(pipe, pictures, timesteps, "a fish", seeds=[1, 2, 3])
    alone = noised_features(pipe, pictures[1:2], timesteps[1:2], "a fish", seeds=[2])
    assert together and all(name.startswith("up_blocks.") for name in together)
    for name, (q, k, _) in alone.items():
        torch.testing.assert_close(q[0], together[name].q[1])
        torch.testing.assert_close(k[0], together[name].k[1])
    assert not torch.equal(
        *(
            noised_features(pipe, pictures[:1], timesteps[:1], "a fish", seeds=[seed])[name].q
            for seed in (1, 2)
        )
    )


def test_layouts_are_read_from_what_pictures_show(pipe):
    scenes = render([1, 3], picture_size(pipe))
    scores = picture_metrics.read_layouts(
        pipe, {"first": scenes.image[1], "again": scenes.image[1]}, scenes, "a fish", seed=7
    )
    assert scores["first"] == scores["again"] and 0 < scores["first"] < 1
    blank = dataclasses.replace(scenes, labels=torch.zeros_like(scenes.labels))
    assert picture_metrics.read_layouts(pipe, {"any": scenes.image[0]}, blank, "a fish", seed=7) == {"any": 1}


def test_parts_come_from_the_nearest_known_token(pipe):
    known, others = render([1, 3, 5], picture_size(pipe)), render([7, 9], picture_size(pipe))
    read = picture_metrics.read_parts(pipe, others.image, known, "a fish", seed=7)
    rows, timesteps = torch.cat([others.image, known.image]), torch.full((5,), 400)
    for layer, (q, _, _) in noised_features(pipe, rows, timesteps, "a fish", seeds=[7, 7, 8, 9, 10]).items():
        joint = torch.nn.functional.normalize(q.transpose(1, 2).flatten(2).double(), dim=-1)
        side = int(q.shape[2] ** 0.5)
        expected = token_labels(known.labels, (side, side)).flatten()[
            (joint[:2] @ joint[2:].flatten(0, 1).T).argmax(-1)
        ]
        assert (read.pop(layer) == expected).float().mean() > 0.99 and len(
            expected.unique()
        ) > 2  # up to ties
    assert not read


def test_a_pair_is_measured_alike_in_any_company(pipe, report):
    alone = [
        leakage.summarise(
            [leakage.measure_pair(pipe, pair, METHODS, QUICK)], QUICK, dict.fromkeys(METHODS, "")
        )["methods"]
        for pair in reversed(held_out_pairs(3, QUICK.seed))
    ]
    for name in METHODS:
        for figure in (
            "part_agreement",
            "own_part_mass",
            "object_background_leakage",
            "colour_error",
            "layout_iou",
        ):
            assert report["methods"][name][figure] == pytest.approx(
                sum(one[name][figure] for one in alone) / 3, abs=1e-6
            )


def test_scene_transferred_to_itself_keeps_its_colours(pipe):
    result = leakage.measure_pair(pipe, ScenePair(21, 21), {"cross_image": CrossImage()}, QUICK)
    assert result.colour["untouched"].nanmean() == 0
    assert result.layout["appearance"] == result.layout["untouched"]
    assert result.colour["cross_image"].nanmean() > 0


def test_matches_of_a_pair_are_the_transfers_own(pipe):
    """Wrapped for measuring or not, the pipeline paints the same picture."""
    scenes = render([31, 33], picture_size(pipe))
    inversion = pipe.invert(
        *scenes.image, "a bird", num_inference_steps=4, generator=torch.Generator().manual_seed(0)
    )
    options = {"inversion": inversion, "adain": None, "output_type": "latent"}
    wrapped = Measured(QAlign(), {role: scenes.labels[0] for role in ROLES})
    painted = [pipe(None, None, "a bird", method=method, **options).images for method in (QAlign(), wrapped)]
    assert torch.equal(*painted) and wrapped.tallies


def test_run_that_measures_no_step_is_refused_early(pipe, monkeypatch):
    monkeypatch.setattr(leakage, "measure_pair", None)  # no pair is begun
    expected = "an edited step of cross_image among the multiples of 3"
    wanted = f"^every: expected {expected}, got none in 4 inference steps$"
    with pytest.raises(ValueError, match=wanted):
        leakage.run(pipe, pairs=1, settings=Settings(steps=4, adain=None))


@pytest.mark.parametrize("steps", [4, 10, 20])
def test_edited_steps_are_those_that_are_measured(pipe, steps):
    (pair,) = held_out_pairs(1, 0)
    methods = {"cross_image": CrossImage(), "qalign": QAlign(), "qalign_warp": QAlignWarp()}
    result = leakage.measure_pair(pipe, pair, methods, Settings(steps=steps, every=1, adain=None))
    for name, method in methods.items():
        assert sorted({step for _, step in result.tallies[name]}) == edited_steps(method, steps)


def test_the_best_layer_is_named_below_its_agreement():
    result = made_up({"cross_image": 0.5}, 0.4)
    for key, tally in result.tallies["cross_image"].items():
        result.tallies["cross_image"][key] = tally.clone()
    result.tallies["cross_image"]["up_blocks.1", 6][BODY, attention_tally.TALLIED.index("right")] = 4
    lines = leakage_table(leakage.summarise([result, result], Settings(), {"cross_image": ""})).splitlines()
    assert [
        line.split()[-1] for line in lines if line.startswith(("right matches in", "  the best layer"))
    ] == [
        "0.750",
        "up_blocks.1",
    ]


REQUIRED = {"part_agreement", "own_part_mass", "object_background_leakage", "leaking_pairs"}


@pytest.fixture
def stub(monkeypatch, pipe):
    monkeypatch.setattr(command, "load_pipeline", lambda options: pipe)


def test_command_prints_the_table_and_writes_figures(stub, tmp_path, capsys):
    file = tmp_path / "new" / "leakage.json"
    arguments = [
        "leakage",
        "--pairs",
        "2",
        "--steps",
        "4",
        "--every",
        "1",
        "--adain",
        "none",
        "--refinement",
        "topk",
        "--topk",
        "3",
    ]
    arguments += ["--aligned", "output"]
    assert command_line.main([*arguments, "--threshold", "0.9", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["pairs"] == 2 and list(report["methods"]) == ["cross_image", "qalign", "qalign_warp"]
    assert REQUIRED <= set(report["methods"]["cross_image"]) and REQUIRED | {"leaking_pairs_improved"} <= set(
        report["methods"]["qalign"]
    )
    assert report["settings"]["threshold"] == 0.9
    assert report["methods"]["qalign"]["method"] == repr(QAlign(refinement="topk", topk=3, aligned="output"))
    assert report["methods"]["qalign_warp"]["method"] == repr(QAlignWarp())
    said = capsys.readouterr().out
    assert str(file) in said and "2 held-out pairs" in said


def test_the_command_compares_variants(stub, monkeypatch, tmp_path, capsys):
    everything = ablation.refinements()
    assert len(everything) == 18 and {
        method.refinement for method in everything.values() if isinstance(method, QAlign)
    } == set(REFINEMENTS)
    few = {name: everything[name] for name in ("cross_image", "none, both aligned", "topk 1, both aligned")}
    monkeypatch.setattr(ablation, "refinements", lambda: few)
    file = tmp_path / "ablation.json"
    arguments = [
        "leakage",
        "--ablation",
        "--pairs",
        "2",
        "--transfers",
        "1",
        "--steps",
        "4",
        "--every",
        "1",
        "--adain",
        "none",
    ]
    assert command_line.main([*arguments, "--json", str(file)]) == 0
    found, said = json.loads(file.read_text()), capsys.readouterr().out
    assert len(found["matches"]) == 8 and all(
        name in said for name in (*found["matches"], "Cross-Image", *list(few)[1:])
    )
    assert (found["pairs"], found["transfers"]["pairs"]) == (2, 1)
    none, single = (found["refinements"][name] for name in list(few)[1:])
    assert all(
        none[figure]["value"] == pytest.approx(single[figure]["value"]) for figure in ablation.ATTENTION
    )
    assert none["picture"]["colour_error"] == pytest.approx(single["picture"]["colour_error"], rel=1e-3)


def test_ablation_sees_the_signals_that_methods_use(pipe):
    found = ablation.probe(
        pipe,
        ScenePair(41, 43),
        {"cross_image": CrossImage(), "rearranged": QAlign(refinement="rearranged")},
        QUICK,
    )
    right = attention_tally.TALLIED.index("right")
    for signal, variant in (
        ("query_key dot joint", "cross_image"),
        ("query_query cosine joint", "rearranged"),
    ):
        for key, tally in found.tallies[signal].items():
            assert torch.equal(tally[:, right], found.tallies[variant][key][:, right])
            assert 0 < found.matched[signal][key] <= 1
    counterparts = attention_tally.TALLIED.index("counterparts")
    assert all(
        torch.equal(tally[:, 0], tally[:, counterparts]) for tally in found.tallies["self_attention"].values()
    )  # every part meets itself


@pytest.mark.skipif(
    not (embedded.FOLDER / "model_index.json").exists(), reason="the embedded model's weights are not here"
)
def test_query_matches_agree_more_in_the_embedded_model():
    trained = AppearanceTransferPipeline.embedded()
    probes = [ablation.probe(trained, pair, {}, Settings()) for pair in held_out_pairs(4)]
    agreement = {
        signal: attention_tally.figures(attention_tally.stacked([found.tallies[signal] for found in probes]))[
            "part_agreement"
        ].nanmean()
        for signal in ("query_query cosine joint", "query_key dot joint")
    }
    assert agreement["query_query cosine joint"] > 1.5 * agreement["query_key dot joint"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--pairs", "0"],
        ["--pairs", "many"],
        ["--refinement", "best"],
        ["--aligned", "best"],
        ["--adain", "some"],
    ],
)
def test_the_command_refuses_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as refusal:
        command_line.main(["leakage", *arguments])
    assert refusal.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


LEAKAGE = ["leakage", "--steps", "4", "--every", "1", "--pairs"]


@pytest.fixture
def small(pipe, monkeypatch):
    """The command on the small pipeline. It lists measured pairs; Ctrl-C comes after `stop` pairs."""
    measure, state = leakage.measure_pair, SimpleNamespace(measured=[], stop=None)

    def counted(*given):
        if len(state.measured) == state.stop:
            raise KeyboardInterrupt
        state.measured.append(given[1])
        return measure(*given)

    monkeypatch.setattr(leakage, "measure_pair", counted)
    monkeypatch.setattr("qalign.commands.leakage.load_pipeline", lambda options: pipe)
    return state


def test_an_interrupted_run_goes_on_where_it_stopped(small, tmp_path, capsys, report):
    file, partial = tmp_path / "report.json", tmp_path / "report.json.partial"
    small.stop = 2
    assert command_line.main([*LEAKAGE, "3", "--json", str(file)]) == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"leakage: interrupted; 2 results are kept in {partial}, the same command continues"
    small.stop = None
    assert command_line.main([*LEAKAGE, "3", "--json", str(file)]) == 0
    assert len(small.measured) == len(set(small.measured)) == 3
    assert not partial.exists() and list(tmp_path.iterdir()) == [file]
    assert json.loads(file.read_text())["methods"] == json.loads(json.dumps(report["methods"]))


def test_kept_pairs_of_other_settings_are_refused(small, tmp_path, capsys):
    file = tmp_path / "report.json"
    small.stop = 1
    assert command_line.main([*LEAKAGE, "3", "--json", str(file)]) == 130
    capsys.readouterr()
    for changed, wanted in (
        ("--steps 5", "steps 5, got 1 of steps 4"),
        ("--aligned both", "methods"),
        ("--seed 7", "seed 7, got 1 of seed 0"),
    ):
        assert command_line.main([*LEAKAGE, "3", "--json", str(file), *changed.split()]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"report.json.partial: expected results of {wanted}" in line and line.endswith(
            "delete it to begin anew"
        )
    assert len(small.measured) == 1


def test_one_pair_has_no_interval(small, tmp_path, capsys):
    file = tmp_path / "report.json"
    assert command_line.main([*LEAKAGE, "1", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "[" not in text and "one pair has no interval" in text
    report = json.loads(file.read_text())
    for method in report["methods"].values():
        assert set(method["intervals"].values()) == {None}
    assert {entry["interval"] for entry in report["differences"]["qalign"].values()} == {None}


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path, report):
    file = tmp_path / "two.json"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    shared |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    launched = [
        subprocess.Popen(
            [sys.executable, __file__, str(file)],
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
        )
        for rank in "01"  # as accelerate and torchrun launch them
    ]
    errors = [process.communicate(timeout=600)[1].decode() for process in launched]
    assert [process.returncode for process in launched] == [0, 0], errors
    two = json.loads(file.read_text())
    assert two["shares"] == [2, 1]
    for name in METHODS:
        numbers = {
            figure: value
            for figure, value in report["methods"][name].items()
            if isinstance(value, float | int)
        }
        assert numbers == pytest.approx(
            {figure: two["methods"][name][figure] for figure in numbers}, abs=1e-6
        )
        for figure, interval in report["methods"][name]["intervals"].items():
            assert two["methods"][name]["intervals"][figure] == pytest.approx(interval, abs=1e-6), figure


if __name__ == "__main__":  # one of the two processes
    from accelerate.utils import gather_object

    share = []

    def counted(pairs):
        share.append(len(pairs))
        return pairs

    made = leakage.run(pipe_of(AppearanceTransferPipeline), pairs=3, settings=QUICK, progress=counted) | {
        "shares": gather_object(share)
    }
    if processes().is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(made))
    leave()
