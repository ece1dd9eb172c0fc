"""Where the modules of `qalign` and `benchmarks` stand, and which way their imports run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project import ROOT

FLOORS = (  # each imports itself and those after it, and nothing else of the repository
    "__main__",
    "__init__",
    "commands",
    "evaluation",
    "pipelines",
    "embedded",
    "sampling",
    "processors",
    "methods",
    "context",
    "_checks",
    "qalign_kernels",
)
ROOMS_OF_BENCHMARKS = (  # each imports itself, those after it, `qalign` and `qalign_kernels`
    "__main__",
    "pages",
    "report",
    "gpu",
    "quality",
    "tune",
    "static",
    "speed",
    "suite",
    "__init__",
)
OTHER_FILES = dict.fromkeys(("benchmarks/static/two.py", "tests/three.py"), "")


def imports(file: Path, root: Path) -> Iterator[Path]:
    """The files below `root` that a file of it imports, anywhere in it, for type checkers too."""
    package = file.parent.relative_to(root).parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = package[: len(package) - node.level + 1] if node.level else ()
            source += tuple(node.module.split(".")) if node.module else ()
            names = [(*source, alias.name) for alias in node.names]
        else:
            continue
        yield from filter(None, (_file(root, name) for name in names))


def _file(root: Path, name: tuple[str, ...]) -> Path | None:
    """The module of a dotted name, or the one that has it as an attribute."""
    for parts in (name, name[:-1]):
        path = root.joinpath(*parts)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if parts and file.is_file():
                return file
    return None


def wrong_arrows(root: Path) -> list[str]:
    """The imports of the three packages that run the wrong way, both files named."""
    packages = ("benchmarks", "qalign", "qalign_kernels")
    files = sorted(file for package in packages for file in (root / package).rglob("*.py"))
    arrows = [
        (file.relative_to(root), imported.relative_to(root))
        for file in files
        for imported in imports(file, root)
    ]
    wrong = [arrow for arrow in arrows if _is_wrong(*arrow)]
    return [f"{file.as_posix()} imports {imported.as_posix()}" for file, imported in wrong]


def _is_wrong(file: Path, imported: Path) -> bool:
    here, there = _floor(file), _floor(imported)
    if file.parts[0] == "benchmarks":
        if imported.parts[0] == "benchmarks":
            return there not in ROOMS_OF_BENCHMARKS[ROOMS_OF_BENCHMARKS.index(here) :]
        return imported.parts[0] not in ("qalign", "qalign_kernels")
    if imported.parts[0] == "benchmarks":
        return True
    if here == there == "commands":
        return not imported.stem.startswith("_")  # what commands share
    return there not in FLOORS[FLOORS.index(here) :]


def _floor(file: Path) -> str:
    """The folder or the module of its package that a file belongs to; of `qalign_kernels`, the package."""
    parts = file.with_suffix("").parts
    return parts[1] if parts[0] in ("benchmarks", "qalign") else parts[0]


def test_imports_run_down_the_floors():
    assert wrong_arrows(ROOT) == []


def test_folders_of_qalign_are_the_floors():
    package = ROOT / "qalign"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    modules = {path.stem for path in package.glob("*.py")}
    assert folders | modules == {*FLOORS} - {"qalign_kernels"}


def test_rooms_of_benchmarks_are_eight():
    package = ROOT / "benchmarks"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    modules = {path.stem for path in package.glob("*.py")}
    assert folders | modules == {*ROOMS_OF_BENCHMARKS}
    assert len((folders | modules) - {"__init__", "__main__"}) == 8


@pytest.mark.parametrize(
    ("file", "line", "imported"),
    [
        ("qalign/methods/one.py", "from ..sampling.two import name", "qalign/sampling/two.py"),
        ("qalign/methods/one.py", "def late():\n    from ..sampling import two", "qalign/sampling/two.py"),
        ("qalign/context/one.py", "import qalign.sampling.two", "qalign/sampling/two.py"),
        ("qalign/processors/one.py", "from .. import Site", "qalign/__init__.py"),
        ("qalign/commands/one.py", "from .three import run", "qalign/commands/three.py"),
        ("qalign/_checks.py", "from .context import layout", "qalign/context/layout.py"),
        ("qalign/sampling/one.py", "from benchmarks import speed", "benchmarks/speed.py"),
        ("qalign_kernels/one.py", "from qalign.context import layout", "qalign/context/layout.py"),
        ("benchmarks/suite/one.py", "from ..static import two", "benchmarks/static/two.py"),
        ("benchmarks/report.py", "from tests import three", "tests/three.py"),
    ],
    ids=[
        "top",
        "function",
        "dotted",
        "package",
        "command",
        "leaf",
        "benchmarks",
        "kernels",
        "rooms",
        "tests",
    ],
)
def test_a_wrong_import_is_found_with_both_files(file, line, imported, tmp_path):
    empty = ("sampling/two.py", "commands/three.py", "context/layout.py", "__init__.py")
    texts = {
        **{f"qalign/{name}": "" for name in empty},
        "benchmarks/speed.py": "",
        **OTHER_FILES,
        file: line + "\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert wrong_arrows(tmp_path) == [f"{file} imports {imported}"]
