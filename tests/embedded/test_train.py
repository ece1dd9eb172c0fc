"""Training: resumable, a function of its settings, and its result is an ordinary Stable Diffusion folder."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from qalign.embedded.checkpoints import Checkpoints
from qalign.embedded.losses import NEIGHBOURS, neighbours_loss
from qalign.embedded.networks import (
    LOG_VARIANCE,
    MAX_TOKENS,
    PART_SCALE,
    build_autoencoder,
    build_tokenizer,
)
from qalign.embedded.pool import Pool
from qalign.embedded.scenes import COLOURS, PLANS, TEXTURES, held_out_seed, render
from qalign.embedded.train import main
from qalign.embedded.training import Settings, Training

TINY = {
    "autoencoder_steps": 3,
    "autoencoder_batch": 4,
    "steps": 2,
    "refine_steps": 2,
    "batch": 2,
    "warmup": 1,
    "first_scenes": 6,
    "scenes_per_step": 2,
    "scenes": 10,
}


def train(folder, limit_s=float("inf")):
    training = Training(folder, Settings(**TINY), torch.device("cpu"), lambda line: None, limit_s=limit_s)
    training.train_autoencoder()
    training.train_denoiser()
    return training


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(trained, tmp_path):
    for _ in range(20):
        try:
            resumed = train(tmp_path, limit_s=0.0)  # stops after every step
            break
        except KeyboardInterrupt:
            continue
    for name in ("autoencoder", "denoiser", "text_encoder"):
        whole, parts = getattr(trained, name).state_dict(), getattr(resumed, name).state_dict()
        for key in whole:
            torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=1e-6, msg=f"{name} {key}")


def checkpoints(folder, **settings):
    return Checkpoints(folder, {"seed": 0, "rate": 0.1, "start": None} | settings, torch.device("cpu"))


@pytest.mark.parametrize("changed", [{"seed": 1}, {"rate": 0.2}, {"start": "abc"}, {"new": 1}])
def test_other_settings_do_not_get_old_checkpoints(tmp_path, changed):
    kept = checkpoints(tmp_path)
    kept.save("stage", {"step": 3})
    assert checkpoints(tmp_path).load("stage") == {"step": 3} and kept.load("other") is None
    (name, value), path = *changed.items(), tmp_path / "stage.pt"
    message = (
        f"^{path}: expected a checkpoint of {name} {value}, got one of {name} .*; delete it or take another"
    )
    with pytest.raises(ValueError, match=message):
        checkpoints(tmp_path, **changed)


@pytest.mark.parametrize("content", [b"", b"words", "truncated", {"step": 1}, [1]], ids=repr)
def test_damaged_checkpoints_are_named_in_one_line(tmp_path, content):
    path = tmp_path / "stage.pt"
    checkpoints(tmp_path).save("stage", {"step": 3, "weights": torch.ones(100)})
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:-300])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(
        ValueError, match=f"^{path}: expected a checkpoint, got a file without its settings"
    ) as error:
        checkpoints(tmp_path)
    assert "\n" not in str(error.value)


def test_scenes_are_replaced_whole(tmp_path, monkeypatch):
    kept = checkpoints(tmp_path)
    kept.save("scenes", {"latents": torch.zeros(2)})

    def interrupted(state, path):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    training = SimpleNamespace(
        checkpoints=kept,
        settings=Settings(**TINY),
        device=torch.device("cpu"),
        tokenizer=build_tokenizer(),
    )
    with pytest.raises(KeyboardInterrupt):
        Pool(training)._save()
    assert kept.load("scenes")["latents"].shape == (2,) and len(list(tmp_path.iterdir())) == 1


def test_another_seed_is_refused_before_training(tmp_path, capsys):
    Checkpoints(tmp_path, asdict(Settings(**TINY)) | {"start": None}, torch.device("cpu")).save(
        "denoiser", {}
    )
    options = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    arguments = ["--work", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu", *options]
    assert main([*arguments, "--seed", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "denoiser.pt: expected a checkpoint of seed 1, got one of seed 0; delete it" in line


@pytest.mark.slow
def test_a_written_model_is_trained_on(trained, tmp_path):
    trained.pipeline().to(torch.float16).save_pretrained(tmp_path / "written")
    (tmp_path / "written" / "record.json").write_text(json.dumps(trained.record))
    settings = Settings(**TINY | {"steps": 0, "first_scene": 10})
    further = Training(
        tmp_path / "work", settings, torch.device("cpu"), lambda line: None, start=tmp_path / "written"
    )
    for name in ("autoencoder", "denoiser", "text_encoder"):
        begun, before = (getattr(one, name).state_dict() for one in (further, trained))
        for key in before:
            torch.testing.assert_close(
                begun[key], before[key].half().float(), rtol=0, atol=0, msg=f"{name} {key}"
            )
    further.train_denoiser()
    assert not torch.equal(further.denoiser.conv_in.weight, trained.denoiser.conv_in.weight)
    assert (
        further.record["denoiser"]["samples"] == 4
        and further.record["started_from"]["denoiser"]["samples"] == 8
    )
    first = Pool(further).batch(0)[0], Pool(trained).batch(0)[0]
    assert not torch.equal(*first)  # other scenes


@pytest.mark.slow
def test_training_moves_every_parameter(trained):
    torch.manual_seed(trained.settings.seed)
    fresh = Training(trained.checkpoints.folder, trained.settings, torch.device("cpu"), print)
    for name in ("denoiser", "text_encoder"):
        before = fresh.__dict__[name].state_dict()
        still = [
            key
            for key, value in getattr(trained, name).state_dict().items()
            if value.is_floating_point() and torch.equal(value, before[key])
        ]
        assert not still, f"{name}: {still}"


def test_the_posterior_is_narrow():
    image = render([held_out_seed(1)], 32).image * 2 - 1
    posterior = build_autoencoder().encode(image).latent_dist
    assert torch.equal(posterior.logvar, torch.full_like(posterior.logvar, LOG_VARIANCE))


def test_words_of_captions_are_single_tokens():
    tokenizer = build_tokenizer()
    captions = render([held_out_seed(number) for number in range(60)], 8).captions
    for caption in captions:
        assert tokenizer.tokenize(caption) == caption.split()
        assert len(tokenizer(caption).input_ids) <= MAX_TOKENS
    for word in (*PLANS, *COLOURS, *TEXTURES):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    spelled = tokenizer("zebra", add_special_tokens=False).input_ids
    assert len(spelled) > 1 and tokenizer.unk_token_id not in spelled


@pytest.mark.slow
def test_command_stops_in_time_and_explains_resuming(tmp_path, capsys):
    arguments = [
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "out"),
        "--minutes",
        "0",
        "--device",
        "cpu",
    ]
    assert (
        main(
            arguments
            + [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        )
        == 1
    )
    assert "continues from" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_record_says_what_was_run(trained):
    record = json.loads(json.dumps(trained.record))
    assert (
        record["settings"]["seed"] == 0
        and record["denoiser"]["samples"] == 8
        and record["denoiser"]["wall_s"] > 0
    )
    assert {"device", "threads", "torch"} <= set(record["machine"])


def _features_and_labels(parts, seed=0):
    """Three pictures of 64 tokens with two parts each; the features of a part share one direction."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(parts).repeat_interleave(32, dim=1)
    lengths = 0.5 + torch.rand(*labels.shape, 1, generator=generator)
    return lengths * torch.eye(12)[labels], labels, generator


def test_neighbours_cost_only_across_different_parts():
    features, labels, generator = _features_and_labels([[0, 4], [0, 5], [4, 5]])
    weight = torch.ones(12)
    alike = neighbours_loss(features, labels, weight, generator)
    mixed = neighbours_loss(features.flip(1), labels, weight, generator)
    assert alike < 1e-4 < 10 < mixed


def test_neighbours_are_sought_in_other_pictures_only():
    features, labels, generator = _features_and_labels([[0, 4], [1, 5], [2, 6]])
    assert neighbours_loss(features, labels, torch.ones(12), generator) == 0


def test_neighbours_are_drawn_part_by_part():
    """Two of 1,024 tokens show the rare part. Drawn token by token, they would hardly ever be drawn."""
    labels = torch.where(torch.arange(1024) < 1022, 0, 4).repeat(3, 1)
    features = torch.eye(12)[labels]
    features[1, 1022:] = features[0, 0]  # in one picture the rare part looks like the other
    loss = neighbours_loss(features, labels, torch.ones(12), torch.Generator().manual_seed(0))
    assert loss > 2 * PART_SCALE / (3 * NEIGHBOURS)
