"""Both GPU commands from end to end, over a driver whose kernels do nothing: files, limits, sudden ends."""

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks.gpu import command
from benchmarks.gpu.stub_driver import missing

ROOT = Path(__file__).parents[1]
MOST_FILES, MOST_SECONDS = 8, 300
LAG_SECONDS = 5  # of what is shown behind what was written: half a second, and more on a busy machine
COMMANDS = {"first": ("--first",), "minutes": ("--minutes", "4.5")}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stub driver is a library for Linux"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    """Make a folder for the stub driver and the compiled kernels, shared by all tests."""
    if reason := missing():
        pytest.skip(reason)
    return tmp_path_factory.mktemp("driver")


@pytest.fixture
def work():
    """Make a folder with a short path: sockets of multiprocessing take at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="q") as folder:
        yield Path(folder)


def _start(driver: Path, work: Path, folder: Path, *words: str) -> subprocess.Popen:
    """Start the command in a session of its own; its files are in folder/out."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))
    }
    environment = inherited | {
        "STUB_DRIVER": str(driver),
        "PYTHONPATH": f"{ROOT / 'tests' / 'stub_gpu'}{os.pathsep}{ROOT}",
        "TMPDIR": str(work),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "gpu", *words, "--out", str(folder / "out")],
        cwd=ROOT,
        env=environment,
        stdout=(folder / "said").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _run(driver: Path, work: Path, folder: Path, *words: str) -> Path:
    process = _start(driver, work, folder, *words)
    try:
        process.wait(MOST_SECONDS)
    finally:
        process.kill()
    said = (folder / "said").read_text()
    assert "Traceback" not in said, said
    assert not list(work.glob("qalign-gpu-*"))
    return folder / "out"


def _read(file: Path):
    """Read JSON; NaN and infinities, which Python would accept, are an error."""

    def refuse(word):
        raise ValueError(f"{file}: expected JSON, got {word}")

    return json.loads(file.read_text(), parse_constant=refuse)


def _statuses(run: dict) -> dict[str, str]:
    return {outcome["stage"]: outcome["status"] for outcome in run["stages"]["outcomes"]}


def test_first_contact_from_end_to_end(driver, work, tmp_path):
    """It needs only torch, Triton and numpy; the stub blocks other packages."""
    out = _run(driver, work, tmp_path, *COMMANDS["first"])
    assert {file.name for file in out.iterdir()} == set(command.FIRST.files)
    first = _read(out / "first.json")
    statuses = _statuses(first)
    assert list(statuses) == ["environment", "right", "core", "kernels", "tiles", "gluon"], (
        tmp_path / "said"
    ).read_text()
    assert {name: status for name, status in statuses.items() if status != "ok"} == {"gluon": "failed"}, first
    assert {(row["op"], row["dtype"]) for row in first["right"] if not row["tile"]} == {
        (op, dtype) for op in ("match_counts", "rearrange_kv") for dtype in ("bfloat16", "float16")
    }
    assert all(row["right"] and row["same_bits"] for row in first["right"])
    assert {row["provider"] for row in first["core"]} == {"triton", "sdpa"}
    assert all(row["graph_p50_ms"] > 0 and row["ceiling_tflops"] > 0 for row in first["core"])
    assert {tuple(row["tile"]) for row in first["tiles"] if row["what"] == "tile"} >= {(64, 128, 4, 3)}
    assert [row["right"] for row in first["gluon"]] == [None, False] * 3  # kernels ran and wrote nothing


def test_everything_from_end_to_end(driver, work, tmp_path):
    out = _run(driver, work, tmp_path, *COMMANDS["minutes"])
    assert {file.name for file in out.iterdir()} == set(command.WHOLE.files)
    run = _read(out / "run.json")
    statuses = _statuses(run)
    assert len(statuses) == len(command.stages(tmp_path)), (tmp_path / "said").read_text()
    assert {statuses[name] for name in ("environment", "must_show", "speed", "sanitizer")} == {"ok"}, statuses
    assert {row["op"] for row in _read(out / "speed.json")} >= {
        "match_counts",
        "rearrange_kv",
    }
    validated = _read(out / "validate.json")
    assert {row["op"] for row in validated["rows"]} == {"match_counts", "rearrange_kv"} and not validated[
        "unfinished"
    ]
    assert "| it | [1, 2, 64, 64] |" in (out / "report.md").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_files_are_whole_whenever_it_is_killed(driver, work, tmp_path, name):
    process = _start(driver, work, tmp_path, *COMMANDS[name])
    out = tmp_path / "out"
    while not out.exists() and process.poll() is None:
        time.sleep(0.1)
    second = random.uniform(0, 25)
    time.sleep(second)
    process.kill()
    killed = time.time()
    process.wait()
    works = list(work.glob("qalign-gpu-*"))
    assert works, (tmp_path / "said").read_text()
    assert _ended(works[0]), f"killed after {second:.1f} s"
    shown = list(out.rglob("*"))
    assert len(shown) <= MOST_FILES and all(file.parent == out for file in shown)
    contents = {file.name: _read(file) for file in out.glob("[!.]*.json")}
    for archive in out.glob("[!.]*.tar.gz"):
        with tarfile.open(archive) as logs:
            assert logs.getnames()
    layout = command.FIRST if name == "first" else command.WHOLE
    for written in works[0].glob("[!.]*.json"):
        stage = written.name in layout.parts
        if written.stat().st_mtime > killed - LAG_SECONDS:
            continue
        found = contents[layout.whole][written.stem] if stage else contents[written.name]
        assert found == _read(written), f"{written.name}, killed after {second:.1f} s"


def _ended(work: Path) -> bool:
    """Whether no process of the run is left, soon after it was killed."""
    for _ in range(150):
        if not _processes(work):
            return True
        time.sleep(0.2)
    for process in _processes(work):
        os.kill(process, signal.SIGKILL)
    return False


def _processes(work: Path) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if str(work).encode() in words:
            found.append(int(place.name))
    return found
