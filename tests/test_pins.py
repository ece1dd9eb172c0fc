"""constraints.txt on a fresh machine: resolved against the public registry, not against this machine."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.project import ROOT, packaging_arguments

pytestmark = pytest.mark.slow
PINS = ROOT / "constraints.txt"
LINUX = "x86_64-manylinux_2_28"
MACHINES = [(python, LINUX) for python in ("3.11", "3.12", "3.13", "3.14")]
MACHINES += [
    ("3.13", "aarch64-manylinux_2_28"),
    ("3.13", "aarch64-apple-darwin"),
    ("3.13", "x86_64-pc-windows-msvc"),
]
UNREACHABLE = re.compile(
    r"error sending request|Failed to fetch|network (was|is) disabled|dns error", re.IGNORECASE
)


def _promised():
    """Every requirement of this library and of all its extras."""
    given = packaging_arguments()
    return sorted(
        {*given["install_requires"], *(text for extra in given["extras_require"].values() for text in extra)}
    )


def _resolve(folder, requirements, pins, python, platform):
    """uv's reason why no set of published wheels fits, or None. Markers are those of `platform`.

    On Linux, where all of them are published, every pin is itself required; elsewhere a pin only constrains.
    """
    (folder / "requirements.in").write_text("\n".join(requirements))
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--only-binary=:all:",
        "--no-python-downloads",
    ]
    command += ["--no-config", "--no-header", "--no-annotate", "--python-version", python]
    command += ["--python-platform", platform, "requirements.in"]
    command += [str(pins)] if "linux" in platform else ["--constraint", str(pins)]
    environment = os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        assert f"torch=={_pinned(pins, 'torch')}" in done.stdout.splitlines()
        return None
    return done.stderr


def _held(conflict):
    """Skip where the registry was not reached: a reason of the network is none of the pins."""
    if conflict is not None and UNREACHABLE.search(conflict):
        pytest.skip(f"no package registry answers: {' '.join(conflict.split())[-200:]}")
    return conflict


def _pinned(pins, name):
    return re.search(rf"^{name}==(\S+)$", pins.read_text(), re.MULTILINE)[1]


@pytest.fixture(scope="module")
def conflicts(tmp_path_factory):
    """(Python, platform) to the reason why the pins do not resolve there, or None. All run at once."""
    requirements = _promised()
    folders = [tmp_path_factory.mktemp("resolve") for _ in MACHINES]
    with ThreadPoolExecutor(len(MACHINES)) as pool:
        reasons = pool.map(
            lambda folder, machine: _resolve(folder, requirements, PINS, *machine), folders, MACHINES
        )
        return dict(zip(MACHINES, reasons))


@pytest.mark.parametrize(("python", "platform"), MACHINES, ids=lambda value: value)
def test_pins_resolve_against_public_metadata(python, platform, conflicts):
    conflict = _held(conflicts[python, platform])
    assert conflict is None, f"constraints.txt on Python {python}, {platform}:\n{conflict}"


def test_pin_that_conflicts_is_named(tmp_path):
    """A Triton that the pinned torch does not ask for, as constraints.txt once had."""
    pins = tmp_path / "constraints.txt"
    pins.write_text(re.sub(r"^triton==.*$", "triton==3.5.0", PINS.read_text(), flags=re.MULTILINE))
    conflict = _held(_resolve(tmp_path, ["torch"], pins, "3.12", LINUX))
    assert "No solution found" in conflict
    assert "triton==3.5.0" in conflict and f"torch=={_pinned(pins, 'torch')}" in conflict
