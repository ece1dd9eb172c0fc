"""The frame of the project: what its documents say is so, and its parts agree with each other."""

import doctest
import functools
import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qalign_kernels
from tests.project import ROOT, own_files, packaging_arguments

PAGES = ("docs/quickstart.md", "docs/pipelines.md", "docs/leakage.md", "docs/adding-a-method.md")
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
)
SHOWN_ONLY = ("qalign/embedded/weights/samples.png",)  # linked by documents, read by no code
STEMS = ("similarity", "rearrange", "attention", "probe", "qalign_attention", "distillation")
SECTIONS = ("Args:", "Returns:", "Raises:", "Example:", "Memory:", "Source:")
OPS = [
    name
    for name in qalign_kernels.__all__
    if inspect.isfunction(getattr(qalign_kernels, name)) and name != "use_backend"
]


def _read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def _snippets(name):
    return re.findall(r"```python\n(.*?)```", _read(name), re.DOTALL)


@pytest.fixture(scope="module")
def packaging():
    return packaging_arguments()


@pytest.mark.slow
@pytest.mark.parametrize("model, side", [("embedded", 128), ("sd15", 32), ("sdxl", 32)])
def test_readme_python_runs_from_top_to_bottom(model, side, monkeypatch):
    """Every block in one namespace, as a reader pastes them, with fewer steps; small models in its place.

    Behind them the blocks of docs/pipelines.md, and the docstrings of what the README drops in.
    """
    pytest.importorskip("diffusers")
    models = importlib.import_module("tests.processors.models")
    embedded = importlib.import_module("qalign.embedded")
    scenes = importlib.import_module("qalign.embedded.scenes")
    load = embedded.load if model == "embedded" else lambda *arguments: models.make_pipe(model)
    monkeypatch.setattr(embedded, "load", lambda *arguments: models.quiet(load(*arguments)))
    monkeypatch.setattr(scenes, "render", functools.partial(scenes.render, size=side))
    qalign, examples = importlib.import_module("qalign"), doctest.DocTestParser().get_examples
    parts = (qalign.QAlignAttnProcessor, qalign.attach)
    shown = ["".join(example.source for example in examples(part.__doc__)) for part in parts]
    blocks = [*_snippets("README.md"), *_snippets("docs/pipelines.md"), *shown]
    names, edits = {}, 0
    for block in blocks:
        names.pop("images", None)
        exec(compile(re.sub(r'(num_inference_steps"?[=:]) ?\d+', r"\1 6", block), "README.md", "exec"), names)
        if "images" in names:
            edits += 1
            output, appearance, structure = (numpy.asarray(image, dtype=float) for image in names["images"])
            assert output.shape == (side, side, 3), block
            assert (output != structure).any() and (output != appearance).any(), block
            left = {type(processor).__name__ for processor in names["pipe"].unet.attn_processors.values()}
            assert left == {"AttnProcessor2_0"}, block
    assert edits == sum(bool(re.search(r"\bimages = ", block)) for block in blocks) >= 6
    assert names["image"].size == (side, side)
    output, appearance, structure = names["latents"]
    assert torch.equal(output, structure) and not torch.equal(output, appearance)
    assert names["output"].shape == names["query"].shape


def test_commands_of_pages_read_what_earlier_ones_write(tmp_path, monkeypatch):
    """Each parses, and its pictures are there: those of `scenes`, or written by a command above it."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    parser = importlib.import_module("qalign.__main__").parser()
    text = "".join(map(_read, ("README.md", *PAGES)))
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    lines = [line for line in blocks.splitlines() if line.startswith("python -m qalign ")]
    made, commands = set(), [shlex.split(line, comments=True)[3:] for line in lines]
    for words in commands:
        options = parser.parse_args(words)
        written = {str(getattr(options, name, None)) for name in ("out", "labels_out", "grid")}
        missing = {word for word in words if word.endswith(".png")} - written - made
        assert not missing, words
        made |= written
        if options.command == "scenes":
            seeds = [2 * (options.seed + number) + options.held_out for number in range(options.count)]
            made |= {f"{options.out}/{seed:04}{kind}.png" for seed in seeds for kind in ("", "-labels")}
    assert {"scenes", "transfer", "distill", "texture", "bound", "compare"} <= {
        words[0] for words in commands
    }


def test_readme_names_every_op():
    missing = [name for name in OPS if f"`{name}`" not in _read("README.md")]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_named_in_documents_exist(document):
    text = re.sub(r"```.*?```", "", _read(document), flags=re.DOTALL)
    quoted = re.findall(r"`([\w./-]+(?:/|\.(?:py|md|txt|json|toml|png)))`", text) + re.findall(
        r"\]\((?!http)([^)#]+)\)", text
    )
    made_by_commands = {"benchmarks/results/", "dist/"}
    folders = ("", "qalign_kernels")
    roots = [ROOT / folder for folder in folders] + [(ROOT / document).parent]
    missing = [
        path
        for path in quoted
        if path not in made_by_commands and not any((root / path).exists() for root in roots)
    ]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_named_in_documents_exist(document):
    for module in re.findall(r"python -m ((?:qalign|benchmarks|tests)[\w.]*\w)", _read(document)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    if document != "CHANGELOG.md":
        for verb in re.findall(r"(?:`|^)make (\w+)", _read(document), re.MULTILINE):
            assert re.search(rf"^{verb}:", _read("Makefile"), re.MULTILINE), verb


@pytest.mark.parametrize("stem", STEMS)
def test_every_stem_stands_in_five_places(stem):
    places = (
        f"qalign_kernels/{stem}.py",
        *(f"qalign_kernels/{package}/{stem}.py" for package in ("reference", "tiled", "_triton")),
    )
    missing = [place for place in (*places, f"tests/kernels/test_{stem}.py") if not (ROOT / place).is_file()]
    assert not missing


@pytest.mark.parametrize("name", OPS)
def test_every_public_op_is_documented_and_tested(name):
    op = getattr(qalign_kernels, name)
    stem = op.__module__.removeprefix("qalign_kernels.")
    assert stem in STEMS
    missing = [section for section in SECTIONS if section not in op.__doc__]
    assert not missing
    assert f"{name}(" in _read(f"tests/kernels/test_{stem}.py")
    assert name in _read("qalign_kernels/validation/cases.py")


def test_version_is_the_same_everywhere(packaging):
    assert packaging["version"] == qalign_kernels.__version__
    assert re.search(
        rf"^## \[(?:Unreleased|{re.escape(qalign_kernels.__version__)})\]",
        _read("CHANGELOG.md"),
        re.MULTILINE,
    )


def test_constraints_cover_all_requirements(packaging):
    pins = dict(
        line.split("==")
        for line in _read("constraints.txt").splitlines()
        if line and not line.startswith("#")
    )
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = packaging["extras_require"].values()
    for text in [*packaging["install_requires"], *(requirement for extra in extras for requirement in extra)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_triton_is_never_required_beside_torch(packaging):
    """A torch for AMD brings a Triton under another name: a second one would overwrite its files."""
    assert not [text for text in packaging["install_requires"] if "triton" in text]
    (triton,) = map(Requirement, packaging["extras_require"]["triton"])
    assert triton.marker.evaluate({"platform_system": "Linux"})
    assert not any(triton.marker.evaluate({"platform_system": system}) for system in ("Darwin", "Windows"))


def test_packages_say_that_they_are_typed(packaging):
    for package in packaging["package_data"]:
        assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize("package", ["qalign_kernels", "qalign"])
def test_data_files_are_packaged(package, packaging):
    folder = ROOT / package
    packaged = {path for pattern in packaging["package_data"][package] for path in folder.glob(pattern)}
    packaged |= {ROOT / name for name in SHOWN_ONLY}
    assert not [
        path
        for path in own_files()
        if folder in path.parents and path.suffix != ".py" and path not in packaged
    ]


def test_wheels_hold_no_file_for_show(packaging):
    patterns = [
        (package, pattern) for package, names in packaging["package_data"].items() for pattern in names
    ]
    packaged = {path for package, pattern in patterns for path in (ROOT / package).glob(pattern)}
    assert packaged and not packaged & {ROOT / name for name in SHOWN_ONLY}


def test_no_file_holds_a_path_of_somebodys_machine():
    machine = re.compile(rb"(?<![\w.])/(?:home|root|Users|work|tmp|mnt|opt|var)/\w")
    holders = [
        str(path)
        for path in own_files()
        if path.suffix != ".png" and path != Path(__file__) and machine.search(path.read_bytes())
    ]
    assert not holders


def test_ci_runs_both_tiers_of_the_tests():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    lines = [line.split(" <")[0] for line in _read(".ci/run").splitlines()]
    assert {"set -euo pipefail", "make test", "make test-slow"} <= set(lines)


def test_two_tiers_are_all_of_the_tests(bare_copy):
    command = ["make", "-n", "test", "test-slow"]
    text = subprocess.run(command, cwd=bare_copy, capture_output=True, text=True, check=True).stdout
    (fast,) = re.findall(r"^(.* -m pytest .*) -m \"not slow\"", text, re.MULTILINE)
    (slow,) = re.findall(r"^(.* -m pytest .*) -m slow *$", text, re.MULTILINE)
    assert fast == slow


def test_test_processes_share_the_threads():
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    assert torch.get_num_threads() * processes <= max(os.cpu_count(), processes)


@pytest.fixture
def bare_copy(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("no make")
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_make_lists_its_verbs(bare_copy):
    text = subprocess.run(["make"], cwd=bare_copy, capture_output=True, text=True, check=True).stdout
    (verbs,) = re.findall(r"^\.PHONY: (.*)$", _read("Makefile"), re.MULTILINE)
    assert all(f"make {verb} " in text for verb in verbs.split() if verb != "help")


@pytest.mark.parametrize("elsewhere", (False, True), ids=("in the folder", "from another"))
def test_make_demo_says_how_to_go_on(bare_copy, elsewhere):
    """Its last lines run in a shell without `python`: enter the environment, then a command of the README."""
    binaries = bare_copy / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").write_text('#!/bin/sh\necho "ran in $(basename "$PWD"): $*"\n')
    (binaries / "python").chmod(0o755)
    (binaries / "activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    (bare_copy / ".venv" / ".ready").touch()
    folder = bare_copy.parent if elsewhere else bare_copy
    command = ["make", *(["-C", str(bare_copy)] if elsewhere else []), "--no-print-directory", "demo"]
    settings = {"cwd": folder, "capture_output": True, "text": True, "check": True}
    printed = subprocess.run(command, env={"PATH": os.environ["PATH"], "PWD": str(folder)}, **settings).stdout
    *_, enter, scenes, transfer = (line.strip() for line in printed.splitlines())
    assert all(shown in _read("README.md") for shown in (f"`{enter.split('&& ')[-1]}`", scenes, transfer))
    went = subprocess.run(["bash", "-c", f"{enter} && {transfer}"], env={"PATH": "/usr/bin:/bin"}, **settings)
    assert went.stdout == f"ran in {bare_copy.name}: {transfer.removeprefix('python ')}\n"


def test_make_refuses_old_python_in_one_line(bare_copy):
    old = bare_copy / "python2"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 2.7.18\nexit 1\n')
    old.chmod(0o755)
    refusal = subprocess.run(["make", "test", f"PYTHON={old}"], cwd=bare_copy, capture_output=True, text=True)
    first, *rest = refusal.stderr.splitlines()
    assert refusal.returncode != 0 and not (bare_copy / ".venv").exists()
    assert "expected Python 3.11 to 3.14, got Python 2.7.18" in first
    assert all(line.startswith("make") for line in rest)


def _write_wheel(folder, name, version, *requirements):
    """An empty package that says what it requires."""
    info = f"{name}-{version}.dist-info"
    metadata = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}",
        *(f"Requires-Dist: {x}" for x in requirements),
    ]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_make_installs_every_extra_it_needs(bare_copy):
    """A comma in an argument of $(call) cuts it: the shell then met half a command."""
    text = subprocess.run(
        ["make", "-n", "test"], cwd=bare_copy, capture_output=True, text=True, check=True
    ).stdout
    assert 'install -e ".[diffusers,bench,demo,docs,dev]" -c constraints.txt' in text


@pytest.mark.slow
def test_make_shows_why_pip_refuses(bare_copy, tmp_path_factory):
    """A quiet pip says that pins conflict and hides which."""
    wheels = tmp_path_factory.mktemp("wheels")
    _write_wheel(wheels, "torch", "9.0", "triton==1.0")
    _write_wheel(wheels, "triton", "1.0")
    _write_wheel(wheels, "triton", "2.0")
    (bare_copy / "constraints.txt").write_text("torch==9.0\ntriton==2.0\n")
    offline = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
    refusal = subprocess.run(
        ["make", "test", f"PYTHON={sys.executable}"],
        cwd=bare_copy,
        env=offline,
        capture_output=True,
        text=True,
    )
    assert refusal.returncode != 0 and not (bare_copy / ".venv/.ready").exists()
    assert "torch 9.0 depends on triton==1.0" in refusal.stderr
    assert "pip could not install torch==9.0" in refusal.stderr
