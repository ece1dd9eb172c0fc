"""What is installed: each extra brings what the code behind it imports, and each archive holds its files."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from qalign import __main__ as command_line
from tests.project import ROOT, own_files, packaging_arguments

OURS = ("benchmarks", "qalign", "qalign_kernels", "tests")
DISTRIBUTIONS = {
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}  # by import
BROUGHT = {"triton"}  # by a torch for GPUs; where it is absent, "auto" does without
COMMANDS_OF_DIFFUSERS = ("bound", "distill", "leakage", "methods", "scenes", "texture", "transfer")


def _file(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _imports(module: str) -> Iterator[str]:
    """The modules that a module of ours imports, anywhere in it but for type checkers alone."""
    file = _file(module)
    parts = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    guarded = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    typing_only = {inner for node in guarded for statement in node.body for inner in ast.walk(statement)}
    for node in set(ast.walk(tree)) - typing_only:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = parts[: len(parts) - node.level + 1] if node.level else []
            source = ".".join([*package, *([node.module] if node.module else [])])
            yield source
            yield from (name for name in (f"{source}.{alias.name}" for alias in node.names) if _file(name))


def _packages(modules: list[str]) -> set[str]:
    """The third-party packages that modules of ours import, directly or by other modules of ours."""
    found, seen, waiting = set(), set(), list(modules)
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for name in _imports(module):
            top = name.split(".")[0]
            if top in OURS:
                parts = name.split(".")
                waiting += [
                    name
                    for name in (".".join(parts[:end]) for end in range(1, len(parts) + 1))
                    if _file(name)
                ]
            elif top not in sys.stdlib_module_names | BROUGHT:
                found.add(top)
    return found


def _distributions(packages: set[str]) -> set[str]:
    return {canonicalize_name(DISTRIBUTIONS.get(package, package)) for package in packages}


def _declared(*extras: str) -> set[str]:
    """The distributions that the package and these extras of it require by name."""
    given = packaging_arguments()
    texts = [
        *given["install_requires"],
        *(text for extra in extras for text in given["extras_require"][extra]),
    ]
    return {canonicalize_name(Requirement(text).name) for text in texts}


def _modules(package: str) -> list[str]:
    files = (ROOT / package).rglob("*.py")
    return [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files
    ]


@pytest.mark.parametrize(
    ("package", "extras"),
    [
        ("qalign_kernels", ()),
        ("qalign", ("demo",)),
        ("benchmarks", ("bench",)),
        ("tests", ("bench", "demo", "dev")),
    ],
)
def test_extras_bring_what_a_package_imports(package, extras):
    imported = _distributions(_packages(_modules(package)))
    assert imported <= _declared(*extras), imported - _declared(*extras)


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_commands_name_the_packages_beyond_diffusers(command):
    module = importlib.import_module(f"qalign.commands.{command}")
    named = {*getattr(module, "NEEDS", command_line.NEEDS)}
    named |= {name for names in getattr(module, "OPTION_NEEDS", {}).values() for name in names}
    beyond = {
        name for name in _packages([module.__name__]) if not _distributions({name}) <= _declared("diffusers")
    }
    assert beyond <= named and _distributions(named) <= _declared("demo")


@pytest.mark.parametrize("command", COMMANDS_OF_DIFFUSERS)
def test_diffusers_extra_serves_its_commands(command):
    module = importlib.import_module(f"qalign.commands.{command}")
    needed = _distributions({*getattr(module, "NEEDS", command_line.NEEDS)})
    assert needed <= _declared("diffusers"), needed - _declared("diffusers")


def test_hint_names_an_extra_that_exists():
    (hint,) = set(
        re.findall(r"pip install '([^']+)'", Path(command_line.__file__).read_text(encoding="utf-8"))
    )
    requirement = Requirement(hint)
    given = packaging_arguments()
    assert requirement.name == given["name"] and requirement.extras <= given["extras_require"].keys()


def test_urls_invent_no_repository():
    """The project has no public repository that it could name: the paper is the one address."""
    assert packaging_arguments()["urls"] == {"Paper": "https://arxiv.org/abs/2508.21090"}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The names in the source distribution and in the wheel that a copy of the checkout builds."""
    folder = tmp_path_factory.mktemp("archives")
    for file in own_files():
        copy = folder / "source" / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", folder, "bdist_wheel", "-d", folder]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(source) as archive:
        members = {member.name.partition("/")[2]: member for member in archive if member.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        return members, set(archive.namelist())


def test_source_distribution_holds_every_file(archives):
    members, _ = archives
    generated = {name for name in members if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert members.keys() - generated == {file.relative_to(ROOT).as_posix() for file in own_files()}
    assert members[".ci/run"].mode & 0o100


def test_wheel_holds_the_two_packages_alone(archives):
    _, names = archives
    kept = {name for name in names if ".dist-info/" not in name}
    code = {
        file.relative_to(ROOT).as_posix()
        for package in ("qalign", "qalign_kernels")
        for file in (ROOT / package).rglob("*.py")
    }
    assert code <= kept and {name.split("/")[0] for name in kept} == {"qalign", "qalign_kernels"}
    assert "qalign/embedded/weights/model_index.json" in kept and not [
        name for name in kept if name.endswith(".png")
    ]
