"""Promised versions, tried: an environment for each end of what setup.py allows, and a short suite in each.

`python -m tests.versions` builds the environments with uv from the public registry, one after the other,
each in a folder that is removed afterwards. It runs `qalign_kernels.validate --quick` in each, then the tests
of SUITE.
A torch with CUDA takes some 7 GB while it is tried. Exit code: 0 all passed, 1 not.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.project import ROOT, packaging_arguments

KERNELS = ("tests/kernels/test_backends.py", "tests/kernels/test_library.py", "tests/kernels/test_errors.py")
LAYER = (
    "tests/processors/test_unet_contract.py",
    "tests/processors/test_control.py",
    "tests/pipelines/test_appearance_transfer.py",
    "tests/embedded/test_model.py",
)
PACKAGES = ("torch", "triton", "numpy", "diffusers", "transformers")
RUNNERS = ("pytest>=8", "packaging>=23")


class Environment(NamedTuple):
    """What is installed: some extras, further requirements, and which of the allowed versions uv takes."""

    name: str
    python: str
    extras: tuple[str, ...]
    resolution: str = "highest"
    further: tuple[str, ...] = ()
    suite: tuple[str, ...] = (*KERNELS, *LAYER)


ENVIRONMENTS = (
    Environment("oldest", "3.11", ("diffusers", "triton"), "lowest-direct"),
    Environment(
        "kernels alone, torch 2.11",
        "3.12",
        ("triton",),
        further=("torch==2.11.*", "numpy>=2.4"),
        suite=KERNELS,
    ),
    Environment("pinned", "3.13", ("diffusers", "triton"), further=("-c", "constraints.txt")),
    Environment("newest", "3.13", ("diffusers", "triton")),
)


class Row(NamedTuple):
    """One environment as it was built, and what ran in it."""

    name: str
    versions: dict[str, str]
    validated: str
    tested: str
    minutes: float
    passed: bool


def requirements(extras: tuple[str, ...]) -> list[str]:
    """What setup.py requires with these extras."""
    given = packaging_arguments()
    return sorted(
        {*given["install_requires"], *(text for extra in extras for text in given["extras_require"][extra])}
    )


def _uv(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "uv", *arguments], cwd=ROOT, check=True, stdout=sys.stderr)


def build(environment: Environment, folder: Path) -> Path:
    """The Python of a new environment in `folder`."""
    _uv("venv", "--quiet", "--python", environment.python, str(folder))
    python = folder / "bin" / "python"
    wanted = [*requirements(environment.extras), *RUNNERS, *environment.further]
    _uv("pip", "install", "--quiet", "--python", str(python), "--resolution", environment.resolution, *wanted)
    _uv("pip", "install", "--quiet", "--python", str(python), "--no-deps", "--editable", ".")
    return python


def versions(python: Path) -> dict[str, str]:
    """The installed version of each of PACKAGES and of Python."""
    code = "import importlib.metadata as m, platform; print('python', platform.python_version())\n"
    code += "for d in m.distributions(): print(d.name.lower(), d.version)"
    lines = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    installed = dict(line.split(" ", 1) for line in lines)
    return {name: installed.get(name, "-") for name in ("python", *PACKAGES)}


def _run(log: Path, python: Path, *arguments: str) -> tuple[int, str]:
    """The exit code, and what was printed, which also goes to the log."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")
    }
    done = subprocess.run(
        [python, *arguments], cwd=ROOT, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ python {' '.join(arguments)}\n{done.stdout}\n")
    return done.returncode, done.stdout


def try_out(environment: Environment, log: Path) -> Row:
    """Build the environment and run the short suite in it."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="versions-") as folder:
        python = build(environment, Path(folder) / "venv")
        found = versions(python)
        validate, report = _run(log, python, "-m", "qalign_kernels.validate", "--quick")
        pytest, summary = _run(
            log, python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *environment.suite
        )
    cases = re.findall(r"^(\d+ cases) in \d+ rows, (\d+ failed)", report, re.MULTILINE)
    refusal = re.findall(r"^Triton not run: (.*)$", report, re.MULTILINE)
    validated = "; ".join(
        [*(", ".join(case) for case in cases), *(f"Triton not run: {reason}" for reason in refusal)]
    )
    tested = (
        re.sub(r" in [\d.]+s.*", "", summary.strip().splitlines()[-1]).strip("= ")
        if summary.strip()
        else "nothing ran"
    )
    minutes = round((time.monotonic() - start) / 60, 1)
    return Row(environment.name, found, validated or "nothing ran", tested, minutes, validate == pytest == 0)


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    head = ("environment", "python", *PACKAGES, "validate --quick", "tests", "minutes", "verdict")
    lines = [head, ("---",) * len(head)]
    for row in rows:
        verdict = "passed" if row.passed else "FAILED"
        lines.append((row.name, *row.versions.values(), row.validated, row.tested, str(row.minutes), verdict))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.versions", description=__doc__.splitlines()[0])
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument(
        "--log", type=Path, default=Path("versions.log"), help="what ran, whole (default: %(default)s)"
    )
    options = parser.parse_args()
    options.log.write_text("", encoding="utf-8")
    rows = []
    for environment in ENVIRONMENTS:
        if environment.name in options.only:
            try:
                rows.append(try_out(environment, options.log))
            except subprocess.CalledProcessError as error:
                missing = dict.fromkeys(("python", *PACKAGES), "-")
                rows.append(Row(environment.name, missing, f"not built: {error}", "-", 0.0, False))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows), end="")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
