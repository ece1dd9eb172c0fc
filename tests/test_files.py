"""The one writer of files: whole or not at all, and never in place of a pipe, a device or a link."""

import ast
import importlib
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from qalign.commands import leakage
from qalign.evaluation.resuming import KeptResults
from qalign_kernels import _files
from qalign_kernels._files import Files, drafting, is_stream, replacing

TEXT = "one line\n" * 20000  # more than a pipe holds


def write(path, text=TEXT):
    with replacing(Path(path)) as unfinished:
        unfinished.write_text(text)


def reader(pipe):
    """A thread that reads a pipe to its end, and what it finds."""
    found = []
    thread = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    thread.start()
    return thread, found


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_is_written_into(tmp_path, linked):
    pipe = path = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    if linked:
        path = tmp_path / "link.json"
        path.symlink_to(pipe)
    _files.check(Files(writes=[("--json", path), ("--again", path)]))
    thread, found = reader(pipe)
    write(path)
    thread.join()
    assert found == [TEXT.encode()] and stat.S_ISFIFO(pipe.stat().st_mode)
    assert path.is_symlink() == linked and len(list(tmp_path.iterdir())) == 1 + linked


def test_a_terminal_is_written_into():
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    path = Path(os.ttyname(theirs))
    before = path.stat()
    write(path, "hello\n")
    assert os.read(ours, 100) == b"hello\r\n"
    after = path.stat()
    assert stat.S_ISCHR(after.st_mode) and after.st_rdev == before.st_rdev and after.st_ino == before.st_ino
    os.close(ours), os.close(theirs)


def test_failed_work_writes_nothing_into_a_stream(tmp_path):
    reads, writes = os.pipe()
    with pytest.raises(RuntimeError), replacing(Path(f"/dev/fd/{writes}")) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    os.close(writes)
    assert os.read(reads, 100) == b""
    os.close(reads)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors have no paths")
@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_standard_output_stays_what_it_is(tmp_path, kind):
    """A link stands for /dev/stdout; what is printed before and after keeps its order."""
    link, out = tmp_path / "stdout.json", tmp_path / "out.txt"
    link.symlink_to("/proc/self/fd/1")
    code = (
        "import sys; from pathlib import Path; from qalign_kernels._files import replacing\n"
        "print('before')\n"
        "with replacing(Path(sys.argv[1])) as file: file.write_text('content\\n')\n"
        "print('after')"
    )
    command = [sys.executable, "-c", code, str(link)]
    if kind == "file":
        with out.open("w") as file:
            subprocess.run(command, stdout=file, check=True)
        text = out.read_text()
    else:
        text = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    assert text == "before\ncontent\nafter\n" and link.is_symlink()


def test_links_modes_and_owners_stay(tmp_path):
    file, link = tmp_path / "file.json", tmp_path / "link.json"
    file.write_text("old")
    file.chmod(0o640)
    before = file.stat()
    link.symlink_to(file.name)
    write(link)
    after = file.stat()
    assert link.is_symlink() and file.read_text() == TEXT
    kept = ("st_mode", "st_uid", "st_gid")
    assert [getattr(after, name) for name in kept] == [getattr(before, name) for name in kept]
    write(tmp_path / "new.json")
    (tmp_path / "plain.json").write_text("")
    assert (tmp_path / "new.json").stat().st_mode == (tmp_path / "plain.json").stat().st_mode


@pytest.mark.parametrize(
    "name", ["n" * 250 + ".json", "." + "s" * 254, "ä" * 120 + ".json", "a." + "x" * 200]
)
def test_long_names_are_written(tmp_path, name):
    for text in ("old", "new"):
        write(tmp_path / name, text)
    assert (tmp_path / name).read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_file_and_its_folder_are_synced(tmp_path, monkeypatch):
    """In this order: the file before it is renamed, the folder afterwards."""
    order = []
    monkeypatch.setattr(_files.os, "fsync", lambda descriptor: order.append(os.fstat(descriptor).st_mode))
    real = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, path: order.append("replaced") or real(self, path))
    write(tmp_path / "file.json")
    assert stat.S_ISREG(order[0]) and order[1] == "replaced" and stat.S_ISDIR(order[2]) and len(order) == 3


def test_what_cannot_be_written_is_refused_before_work(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "closed").symlink_to("/proc/self/fd/999")
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name, got in {
            ".": "a folder",
            "socket": "a socket or a disk",
            "loop": "Too many levels of symbolic links",
            "closed": "Bad file descriptor",
        }.items():
            with (
                pytest.raises(OSError, match=f": expected a file that can be written, got {got}$"),
                replacing(Path(name)),
            ):
                raise AssertionError("work was begun")
            with pytest.raises(ValueError, match="^--json: expected a file to write, got "):
                _files.check(Files(writes=[("--json", Path(name))]))
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(_files.os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match="got a read-only file$"), replacing(tmp_path / "file"):
        raise AssertionError("work was begun")
    assert (tmp_path / "file").read_text() == "old"


def test_a_link_to_nothing_makes_its_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    assert not is_stream(tmp_path / "link")
    write(tmp_path / "link")
    assert (tmp_path / "far" / "file").read_text() == TEXT and (tmp_path / "link").is_symlink()


def test_drafts_replace_files_and_end_streams(tmp_path):
    """A stream gets the last draft alone, also after an error."""
    pytest.importorskip("resource")  # not on Windows
    pipe, file, seen = tmp_path / "pipe", tmp_path / "file", []
    os.mkfifo(pipe)
    thread, found = reader(pipe)
    for path in (file, pipe):
        with pytest.raises(KeyboardInterrupt), drafting(path) as draft:
            for text in ("one", "two"):
                draft(text)
                seen.append(file.read_text())
            raise KeyboardInterrupt
    thread.join()
    assert seen[:2] == ["one", "two"] and file.read_text() == "two" and found == [b"two"]
    with drafting(None) as draft:
        draft("nothing")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("program", ["qalign_kernels.validate", "qalign_kernels.bench.__main__"])
def test_commands_write_one_report_into_a_pipe(tmp_path, program, capsys):
    pytest.importorskip("resource")
    pipe = tmp_path / "report.json"
    os.mkfifo(pipe)
    thread, found = reader(pipe)
    options = {
        "qalign_kernels.validate": "--op match_counts --quick",
        "qalign_kernels.bench.__main__": "--op attention --seconds 0.001 --shape 1,2,64,16",
    }[program]
    command = f"{options} --backend tiled --device cpu --json {pipe}"
    status = importlib.import_module(program).main(command.split())
    thread.join()
    assert status == 0 and json.loads(found[0]) and stat.S_ISFIFO(pipe.stat().st_mode)


def test_results_are_not_kept_beside_a_pipe(tmp_path):
    """`leakage --json /dev/stdout` made a folder in /dev."""
    pytest.importorskip("resource")
    pipe = tmp_path / "report.json"
    os.mkfifo(pipe)
    for path, folders in ((pipe, 0), (tmp_path / "file.json", 1)):
        assert len(leakage.files(SimpleNamespace(json=path)).folders) == folders


Item, Result = make_dataclass("Item", ["seed"]), make_dataclass("Result", ["value"])


def test_damaged_results_are_made_again(tmp_path, caplog):
    def work():
        kept = KeptResults(tmp_path / "kept", {"steps": 20})
        return kept.keeping("square", lambda item: Result(item.seed**2), Result)(Item(3)).value

    assert work() == 9
    (tmp_path / "kept" / "square-3.pt").write_bytes(b"half")
    assert work() == 9 and work() == 9 and len(caplog.messages) == 1
    (tmp_path / "kept" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json: expected settings of results, got "):
        work()


# what writes files in another way, and why
OTHER_WRITERS = {
    "benchmarks/gpu/running/journal.py": "appends",
    "benchmarks/gpu/running/processes.py": "the log of a running process",
    "benchmarks/gpu/stages/measure.py": "the log of a running process",
    "benchmarks/report.py": "the temporary file of its caller",
    "benchmarks/static/machine_code.py": "into a temporary folder",
    "qalign/embedded/train.py": "into a temporary folder",
    "qalign/evaluation/resuming.py": "into memory",
    "qalign_kernels/bench/measure.py": "to /proc",
}
WRITING = {"write_text", "write_bytes", "savefig", "save_file", "save_pretrained", "copyfile", "copyfileobj"}


def writers(tree):
    """The lines of calls that write files outside of `with replacing(...)`."""
    inside = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.With) and any("replacing" in ast.dump(item) for item in block.items)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or id(node) in inside or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        modes = [each.value for each in node.args if isinstance(each, ast.Constant)]
        if (
            name in WRITING
            or (owner, name) == ("torch", "save")
            or (name == "open" and {"w", "wb", "a"} & {*modes})
        ):
            yield f"{owner}.{name} in line {node.lineno}"


def test_all_files_are_written_by_one_function():
    root = Path(_files.__file__).parents[1]
    found = {}
    for folder in ("qalign", "qalign_kernels", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if lines := list(writers(ast.parse(path.read_text()))):
                found[name] = lines
    found.pop("qalign_kernels/_files.py")
    assert {name: lines for name, lines in found.items() if name not in OTHER_WRITERS} == {}
    assert set(OTHER_WRITERS) <= set(found)  # none is listed in vain
