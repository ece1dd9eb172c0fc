"""All command lines: help, destinations before work, options that are read, and how a run ends."""

import argparse
import contextlib
import errno
import importlib
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from benchmarks import __main__ as benchmarks_line  # noqa: E402
from benchmarks.quality.method_report import MethodReport  # noqa: E402
from qalign import __main__ as qalign_line  # noqa: E402
from qalign.commands import _shared  # noqa: E402
from qalign.embedded import train  # noqa: E402
from qalign.methods.qalign import QAlign  # noqa: E402
from qalign_kernels import _command_line, _files, env  # noqa: E402
from qalign_kernels._files import Files, replacing  # noqa: E402
from qalign_kernels.validation import command as validate  # noqa: E402
from tests.processors import models  # noqa: E402

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "qalign": qalign_line,
    "qalign_kernels.validate": validate,
    "qalign_kernels.env": env,
    "benchmarks": benchmarks_line,
    "qalign.embedded.train": train,
}
PAIR = "--appearance {}/a.png --structure {}/b.png"
TRANSFER = f"qalign transfer {PAIR}"
DISTILL = "qalign distill --style {}/a.png --out {}/o.png"


def leaves() -> dict[str, argparse.ArgumentParser]:
    """The parser of each program and of each command, by what is typed."""
    found = {}
    for name, program in PROGRAMS.items():
        top = program.parser()
        subparsers = [action for action in top._actions if isinstance(action, argparse._SubParsersAction)]
        found |= {
            f"{name} {command}": parser for action in subparsers for command, parser in action.choices.items()
        }
        if not subparsers:
            found[name] = top
    return found


LEAVES = leaves()


@pytest.fixture
def folder(tmp_path):
    """Pictures a.png and b.png, a file, a folder dir.png, and labels.png."""
    from PIL import Image

    for name in "ab":
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dir.png").mkdir()
    return tmp_path


def run(folder, text):
    """The exit status of a call whose {} is the folder."""
    program, *arguments = shlex.split(text.replace("{}", str(folder)))
    try:
        return PROGRAMS[program].main(arguments)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("text", [*PROGRAMS, *LEAVES])
def test_every_help_is_printed(text, capsys):
    assert run("", f"{text} --help") == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"usage: python -m {text} ") and not said.err


@pytest.mark.parametrize("name", LEAVES)
def test_every_number_has_a_type_that_checks_it(name):
    for action in LEAVES[name]._actions:
        assert action.type is not float, action.dest
        assert action.type is not int or action.choices, action.dest
        assert action.dest != "seed" or action.type is _command_line.seed


@pytest.mark.parametrize("name", LEAVES)
def test_nan_infinity_and_huge_seeds_are_refused(name, capsys):
    wrong = {
        _command_line.number: ("nan", "inf", "x"),
        _command_line.positive: ("nan", "inf", "0"),
        _command_line.fraction: ("nan", "1", "1e9"),
        _command_line.seed: ("x", str(2**70)),
        _command_line.count: ("0", "1.5", "²"),
        _command_line.whole: ("1.5", "nan"),
    }
    for action in LEAVES[name]._actions:
        values = action.nargs if isinstance(action.nargs, int) else 1
        for bad in wrong.get(action.type, ()):
            with pytest.raises(SystemExit) as refusal:
                LEAVES[name].parse_args([action.option_strings[0], *[bad] * values])
            (line,) = capsys.readouterr().err.splitlines()
            assert refusal.value.code == 2 and f"argument {action.option_strings[0]}: " in line


def test_every_path_option_is_checked_before_work():
    """What a command reads or writes stands in its `files`."""
    elsewhere = {"start", "model"}  # folders that hold a model
    for name, parser in LEAVES.items():
        paths = [action for action in parser._actions if action.type in (Path, _shared.picture_path)]
        options = argparse.Namespace(
            **{action.dest: parser.get_default(action.dest) for action in parser._actions}
        )
        for action in paths:
            several = action.nargs is not None
            setattr(options, action.dest, [Path(action.dest)] if several else Path(action.dest))
        checked = files_of(parser, options) if paths else Files()
        known = {
            part for _, path in [*checked.reads, *checked.writes, *checked.folders] for part in path.parts
        }
        missing = [
            action.dest
            for action in paths
            if action.dest not in elsewhere and not any(part.split("-")[0] == action.dest for part in known)
        ]
        assert not missing, name


def files_of(parser, options):
    options.regions = None
    return parser.get_default("checked_run").args[1].files(options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"{TRANSFER} --out {{}}/file/o.png",
            "--out: expected a folder to write to, got {}/file: Not a directory",
        ),
        (f"{TRANSFER} --out {{}}/dir.png", "--out: expected a file to write, got the folder {}/dir.png"),
        (
            f"{TRANSFER} --out {{}}/a.png",
            "--out: expected another file than that of --appearance, which is read, got {}/a.png",
        ),
        (
            f"{TRANSFER} --out {{}}/./b.png",
            "--out: expected another file than that of --structure, which is read",
        ),
        (
            f"{TRANSFER} --out {{}}/o.png --grid {{}}/o.png",
            "--grid: expected another file than that of --out, got {}/o.png for both",
        ),
        (
            f"{TRANSFER} {{}}/a.png --out {{}}/o.png --grid {{}}/o-2.png",
            "--grid: expected another file than that of --out, got {}/o-2.png",
        ),
        (
            f"{TRANSFER} --out {{}}/o.png --grid {{}}/o.png/g.png",
            "--grid: expected a folder to write to, got {}/o.png, the file of --out",
        ),
        (
            f"{TRANSFER} --out {{}}/o.png --cache {{}}/file",
            "--cache: expected a folder, got the file {}/file",
        ),
        (
            f"{TRANSFER} --out {{}}/o.png --regions {{}}/o.png {{}}/b.png",
            "--out: expected another file than that of --regions",
        ),
        (
            f"{DISTILL} --content {{}}/o.png",
            "--out: expected another file than that of --content, which is read",
        ),
        (
            "qalign texture --size 32 --style {}/a.png --out {}/a.png",
            "--out: expected another file than that of --style",
        ),
        (f"qalign compare {PAIR} --out {{}}/a.png", "--out: expected another file than that of --appearance"),
        ("qalign correspond --scenes 0 --out {}/file", "--out: expected a folder to write to, got {}/file"),
        (
            "qalign bound --prompt fox --box fox 0 0 1 1 --out {}/o.png --labels-out {}/o.png",
            "--labels-out: expected another file",
        ),
        ("qalign scenes --out {}/file", "--out: expected a folder, got the file {}/file"),
        ("qalign demo --out {}/file", "--out: expected a folder to write to, got {}/file"),
        ("qalign leakage --json .", "--json: expected a file to write, got the folder ."),
        ("qalign leakage --json {}/file/x.json", "--json: expected a folder to write to, got {}/file"),
        (
            "qalign_kernels.validate --json {}/dir.png",
            "--json: expected a file to write, got the folder {}/dir.png",
        ),
        ("benchmarks static --json {}", "--json: expected a file to write, got the folder {}"),
        (
            "benchmarks static --budgets {}/file --json {}/file",
            "--json: expected another file than that of --budgets",
        ),
        ("benchmarks speed --json {}/file/x", "--json: expected a folder to write to, got {}/file"),
        (
            "benchmarks distillation --json {}/x --sheet {}/x",
            "--sheet: expected another file than that of --json",
        ),
        ("benchmarks bounded --json {}/x --sheet {}", "--sheet: expected a file to write, got the folder {}"),
        ("benchmarks distillation_step --json {}", "--json: expected a file to write, got the folder {}"),
        ("benchmarks report {}/file --out {}/file", "--out: expected a folder to write to, got {}/file"),
        ("benchmarks gpu --out {}/file", "--out: expected a folder, got the file {}/file"),
        ("qalign.embedded.train --work {}/file", "--work: expected a folder, got the file {}/file"),
        (
            "qalign.embedded.train --work {}/w --out {}/file/x",
            "--out: expected a folder to write to, got {}/file",
        ),
    ],
)
def test_destinations_are_refused_before_any_work(folder, text, message, capsys, monkeypatch):
    def work(*_):
        raise AssertionError("work was begun")

    for module in (
        "transfer",
        "distill",
        "texture",
        "bound",
        "compare",
        "correspond",
        "leakage",
        "demo",
        "scenes",
    ):
        monkeypatch.setattr(importlib.import_module(f"qalign.commands.{module}"), "run", work)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run(folder, text) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message.replace("{}", str(folder)) in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_folder_that_refuses_new_files_is_refused(tmp_path, monkeypatch):
    """A read-only mount. Permission bits alone do not tell: root may ignore them."""

    def refuse(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(_files.tempfile, "mkdtemp", refuse)
    with pytest.raises(
        ValueError, match="^--out: expected a folder to write to, got .*: Read-only file system$"
    ):
        _files.check(Files(writes=[("--out", tmp_path / "new" / "o.png")]))


def test_a_read_only_file_is_refused(folder, monkeypatch):
    monkeypatch.setattr(_files.os, "access", lambda path, mode: False)
    with pytest.raises(
        ValueError, match="^--json: expected a file to write, got .*file, which is read-only$"
    ):
        _files.check(Files(writes=[("--json", folder / "file")]))


def test_only_the_writer_makes_missing_parents(tmp_path):
    path = tmp_path / "one" / "two" / "o.txt"
    _files.check(Files(writes=[("--out", path)], folders=[("--cache", tmp_path / "cache")]))
    assert not list(tmp_path.iterdir())
    with replacing(path) as unfinished:
        unfinished.write_text("whole")
    assert path.read_text() == "whole"


def test_a_link_stays_one(tmp_path):
    link = tmp_path / "link.txt"
    (tmp_path / "far").mkdir()
    link.symlink_to(tmp_path / "far" / "file.txt")
    with replacing(link) as unfinished:
        unfinished.write_text("new")
    assert link.is_symlink() and (tmp_path / "far" / "file.txt").read_text() == "new"
    with pytest.raises(ValueError, match="^--grid: expected another file than that of --out"):
        _files.check(Files(writes=[("--out", link), ("--grid", tmp_path / "far" / "file.txt")]))


@contextlib.contextmanager
def no_room(size=64):
    """Files end after `size` bytes, as on a full disk."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_file_alone(folder, capsys):
    report = folder / "rows.json"
    report.write_text("old")
    with no_room():
        status = run(
            folder,
            f"qalign_kernels.validate --op match_counts --backend tiled --device cpu --quick --json {report}",
        )
    assert status == 2
    assert (
        capsys.readouterr().err
        == f"qalign_kernels.validate: {report}: expected a file that can be written, got File too large\n"
    )
    assert report.read_text() == "old" and {path.name for path in folder.iterdir()} == {
        "a.png",
        "b.png",
        "file",
        "dir.png",
        "rows.json",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"{TRANSFER} --out {{}}/o.png --topk 3",
            "--topk: expected with --method qalign --refinement topk, or with --method seal, got 3",
        ),
        (
            f"{TRANSFER} --out {{}}/o.png --strength 3",
            "--strength: expected with --method qalign --refinement guided or soft, got 3.0",
        ),
        (
            f"{TRANSFER} --out {{}}/o.png --method qalign_warp --contrast 2",
            "--contrast: expected with --method qalign --refinement rearranged",
        ),
        (
            f"{TRANSFER} --out {{}}/o.png --method seal --strength 3",
            "--strength: expected with --method qalign",
        ),
        (
            f"{TRANSFER} --out {{}}/o.png --method masactrl --contrast 2",
            "--contrast: expected with --method qalign",
        ),
        (
            f"{TRANSFER} --out {{}}/o.png --method seal --refinement topk",
            "--refinement: expected with --method qalign, got topk",
        ),
        (
            f"{TRANSFER} --out {{}}/o.png --refinement guided --heads per_head",
            "--heads: expected with --method qalign --refinement rearranged",
        ),
        (
            f"{TRANSFER} --out {{}}/o.png --method z_star --similarity dot",
            "--similarity: expected with --method qalign, or with --method qalign_warp, got dot",
        ),
        (
            f"{TRANSFER} --out {{}}/o.png --noun horse",
            "--noun: expected with --adain masked or --regions self, got horse",
        ),
        (f"{TRANSFER} --out {{}}/o.png --inversion ddim --seed 1", "--seed: expected with --inversion ddpm"),
        (f"{DISTILL} --prompt fox", "--prompt: expected with --mode sample, got fox"),
        (f"{DISTILL} --no-adain", "--no-adain: expected with --mode sample, got --no-adain"),
        (
            f"{DISTILL} --mode sample --guidance 2",
            "--guidance: expected with --mode sample and a --prompt, got 2.0",
        ),
        (f"{DISTILL} --content-weight 1", "--content-weight: expected with --content, got 1.0"),
        (f"{DISTILL} --from-noise", "--from-noise: expected with --mode optimise and --content"),
        (f"{DISTILL} --mode sample --anneal", "--anneal: expected with --mode optimise"),
        (
            f"{DISTILL} --content {{}}/b.png --seed 1",
            "--seed: expected with --mode sample, with --from-noise or without --content",
        ),
        (
            "qalign bound --prompt fox --box fox 0 0 1 1 --iterations 0 --rates 1 1 --out {}/o.png",
            "--rates: expected without --iterations 0",
        ),
        (
            "qalign bound --prompt fox --box fox 0 0 1 1 --out {}/o.png --iterations 0 --keep-boxes "
            "--layers up",
            "--layers: expected without both",
        ),
        (
            "qalign compare --scenes 0 --structure {}/a.png",
            "pictures: expected either --structure and --appearance, or --scenes",
        ),
        (
            "qalign correspond --scenes 0 --appearance {}/a.png",
            "pictures: expected either --structure and --appearance, or --scenes",
        ),
        ("qalign correspond --scenes 0 --size 64", "--size: expected without --scenes"),
        ("qalign compare --scenes 0 --size 64", "--size: expected without --scenes"),
        ("qalign leakage --transfers 3", "--transfers: expected with --ablation, got 3"),
        ("qalign leakage --ablation --aligned output", "--aligned: expected without --ablation, got output"),
        ("qalign leakage --topk 4", "--topk: expected with --refinement topk, got 4"),
        ("qalign demo --only transfer --size 64", "--size: expected without --only transfer, got 64"),
        ("qalign demo --only step --pairs 3", "--pairs: expected without --only step, got 3"),
        ("benchmarks static --update", "--update: expected with --json, got --update"),
        (
            "qalign.embedded.train --work {}/w --start {}/m --crop 32",
            "--crop: expected without --start, got 32",
        ),
    ],
)
def test_options_that_would_not_be_read_are_refused(folder, text, message, capsys):
    assert run(folder, text) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_default_refinement_is_the_library_s():
    assert _shared.DEFAULT_REFINEMENT == QAlign().refinement


@pytest.mark.parametrize("refinement", _shared.REFINEMENTS)
def test_settings_are_read_exactly_as_the_table_says(refinement):
    """By its effect on the op, with every other setting at its default."""
    op = importlib.import_module("qalign_kernels.qalign_attention").qalign_attention
    generator = torch.Generator().manual_seed(0)
    query, match_query, ref_query, ref_key, ref_value, own_key = torch.randn(
        6, 1, 3, 12, 8, generator=generator
    )
    ref_query = ref_query * torch.linspace(0.2, 5, 12).view(-1, 1)  # so that "dot" and "cosine" differ
    tensors = {"match_query": match_query, "own_key": own_key if refinement == "warped_values" else None}

    def output(**changed):
        return op(
            query,
            ref_query,
            ref_key,
            ref_value,
            refinement=refinement,
            **{"topk": 3, "strength": 1.0, **tensors, **changed},
        )

    changes = {"similarity": "dot", "heads": "per_head", "topk": 5, "strength": 4.0, "contrast": 2.0}
    read = {name for name, value in changes.items() if not torch.equal(output(), output(**{name: value}))}
    read |= {"aligned"} if not torch.equal(output(), output(match_query=query)) else set()
    assert read == {
        name for name, refinements in _shared.READ_BY_REFINEMENT.items() if refinement in refinements
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folders with the model "sd" and with other kinds: "flux", "unconditional", "inpainting"."""
    from diffusers import (
        DDPMPipeline,
        DDPMScheduler,
        StableDiffusionInpaintPipeline,
        UNet2DConditionModel,
        UNet2DModel,
    )

    folder = tmp_path_factory.mktemp("models")
    pipe = models.make_pipe("sd15")
    pipe.save_pretrained(folder / "sd")
    (folder / "flux").mkdir()
    (folder / "flux" / "model_index.json").write_text(
        json.dumps({"_class_name": "FluxPipeline", "transformer": ["diffusers", "X"]})
    )
    blocks = {
        "block_out_channels": (32,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "layers_per_block": 1,
    }
    DDPMPipeline(UNet2DModel(sample_size=16, **blocks), DDPMScheduler()).save_pretrained(
        folder / "unconditional"
    )
    parts = {
        **pipe.components,
        "unet": UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 9}),
    }
    parts.pop("image_encoder", None)
    StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False).save_pretrained(
        folder / "inpainting"
    )
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--model {}/flux",
            "--model: expected Stable Diffusion or Stable Diffusion XL, "
            "got FluxPipeline without unet, vae, text_encoder",
        ),
        (
            "--model {}/unconditional",
            "--model: expected Stable Diffusion or Stable Diffusion XL, got DDPMPipeline without vae",
        ),
        ("--model {}/inpainting", "--model: expected a UNet for the VAE's 4 latent channels, got one for 9"),
        (
            "--model {}/sd --device banana",
            "--device: expected a device that torch can use here, such as cpu, got 'banana'",
        ),
        (
            "--model {}/sd --device meta",
            "--device: expected a device that torch can use here, such as cpu, got 'meta'",
        ),
        (
            "--model {}/sd --steps 1000 --skip 0.99",
            "steps: expected fewer inference steps than the 1000 of the model's training, got 1000",
        ),
        ("--model {}/sd --steps 5000", "steps: expected fewer inference steps than the 1000"),
    ],
)
def test_bad_models_devices_and_steps_give_one_line(folder, model, options, message, capsys):
    assert run(folder, f"{TRANSFER} --out {{}}/o.png {options.replace('{}', str(model))}") == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (folder / "o.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "text",
    [
        f"{TRANSFER} --out {{}}/o.png --device cuda",
        "qalign leakage --pairs 1 --device cuda",
        "qalign_kernels.validate --device cuda",
        "benchmarks speed --device cuda",
        "benchmarks distillation_step --device cuda",
        "qalign.embedded.train --device cuda --work {}/work --out {}/out",
    ],
)
def test_cuda_without_a_gpu_is_one_line(folder, text, capsys):
    assert run(folder, text) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--device: expected a device that torch can use here, such as cpu, got 'cuda' (" in line


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("steps: expected 1, got\n2"), 2, "steps: expected 1, got 2"),
        (
            RuntimeError("steps: expected a running clock, got none"),
            2,
            "steps: expected a running clock, got none",
        ),
        (TypeError("method: expected a method, got 3"), 2, "method: expected a method, got 3"),
        (FileNotFoundError(2, "No such file", "x.json"), 2, "x.json: No such file"),
        (KeyError("rows"), 3, "internal error: KeyError: 'rows' (--debug shows the traceback)"),
        (
            RuntimeError("Given groups=1, expected input"),
            3,
            "internal error: RuntimeError: Given groups=1, expected input (--debug shows the traceback)",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to"),
            3,
            "out of memory: expected enough memory for this run, got CUDA out of memory",
        ),
        (MemoryError(), 3, "out of memory: expected enough memory for this run, got none"),
    ],
)
def test_errors_have_one_line_and_a_status(error, status, text):
    assert _command_line.describe(error) == (status, text)


@pytest.mark.parametrize("debug", [False, True])
def test_debug_shows_where_an_error_came_from(debug, monkeypatch, capsys):
    def broken():
        raise KeyError("gone")

    monkeypatch.setattr(env, "report", broken)
    assert env.main(["--debug"] * debug) == 3
    *before, line = capsys.readouterr().err.splitlines()
    assert line == "qalign_kernels.env: internal error: KeyError: 'gone' (--debug shows the traceback)"
    assert any("in broken" in each for each in before) is debug


@pytest.mark.parametrize("name", LEAVES)
def test_ctrl_c_is_one_line_in_every_command(name, monkeypatch, capsys):
    module = LEAVES[name].get_default("checked_run").args[1]

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run", interrupted)
    needed = {
        "benchmarks gpu": "--out x",
        "qalign transfer": "--appearance a --structure b --out o.png",
        "qalign distill": "--style a --out o.png",
    }
    needed |= {
        "qalign texture": needed["qalign distill"],
        "qalign bound": "--prompt fox --box fox 0 0 1 1 --out o.png",
    }
    assert run("", f"{name} {needed.get(name, '')}") == 130
    assert capsys.readouterr().err == f"{name.split()[-1]}: interrupted\n"


def test_an_interrupted_validation_keeps_its_rows(tmp_path, monkeypatch, capsys):
    run_op, called = validate.run_op, []

    def interrupted(*arguments, **options):
        called.append(arguments)
        if len(called) > 2:
            raise KeyboardInterrupt
        return run_op(*arguments, **options)

    monkeypatch.setattr(validate, "run_op", interrupted)
    file = tmp_path / "rows.json"
    arguments = [
        "--backend",
        "tiled",
        "--device",
        "cpu",
        "--quick",
        "--op",
        "match_counts",
        "--json",
        str(file),
    ]
    assert validate.main(arguments) == 130
    assert capsys.readouterr().err == "qalign_kernels.validate: interrupted\n"
    assert [row["dtype"] for row in json.loads(file.read_text())["rows"]] == ["float32", "float16"]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["qalign methods", "qalign_kernels.env"])
def test_closed_pipe_ends_a_command_silently(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *arguments.split()],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
def test_the_embedded_model_loads_without_a_word():
    code = (
        "import qalign\n"
        "for kind in ('AppearanceTransfer', 'AttentionDistillation', 'BoundedAttention'):\n"
        "    getattr(qalign, f'{kind}Pipeline').embedded()\n"
        "from diffusers.utils import logging as first\n"
        "from transformers.utils import logging as second\n"
        "print([(each.get_verbosity(), each.is_progress_bar_enabled()) for each in (first, second)])\n"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={**inherited, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[(30, True), (30, True)]\n"  # as the libraries begin


def test_a_report_of_something_else_is_one_line(tmp_path):
    for content in ("no JSON", "[]", "{}"):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(
            ValueError, match="^--json: expected a report of pairs and their settings, got another file: "
        ):
            MethodReport.open("pairs", {}, tmp_path / "report.json")
