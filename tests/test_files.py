"""The one writer of files: whole or not at all, and never in place of a pipe, a device or a link."""

import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qalign_kernels import _files
from qalign_kernels._files import Files, is_stream, replacing

TEXT = "one line\n" * 20000  # more than a pipe holds


def write(path, text=TEXT):
    with replacing(Path(path)) as unfinished:
        unfinished.write_text(text)


def reader(pipe):
    """A thread that reads a pipe to its end, and what it finds."""
    found = []
    thread = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
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
