"""Files that are written completely or not at all, and checks of where they go. Needs no torch."""

import contextlib
import os
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

LONGEST_SUFFIX = 16  # bytes, with the dot


class Files(NamedTuple):
    """What one command reads and writes, as pairs (option, path).

    Attributes:
        reads: files that must not be overwritten.
        writes: files that the command creates or replaces, with the folders above them.
        folders: folders that the command creates and fills with files.
    """

    reads: Sequence[tuple[str, Path]] = ()
    writes: Sequence[tuple[str, Path]] = ()
    folders: Sequence[tuple[str, Path]] = ()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path, whose file becomes that of `path` if the block ends without an error.

    A regular file is replaced in one move: a reader of `path` always finds the old file or the complete new
    one. It keeps its mode and its owner, and missing folders are created. If `path` is a link, the file that
    it points to is replaced. What is not a regular file, such as a pipe or /dev/stdout, is never replaced:
    the content is written into it at the end of the block. The temporary path has the suffix of `path`,
    because writers choose the format by it.

    Raises:
        OSError: the file cannot be written, for example because the disk is full. The old file is unchanged,
            and no temporary file is left.
    """
    try:
        if is_stream(path):
            with tempfile.TemporaryDirectory() as folder:
                unfinished = Path(folder) / f"unfinished{_suffix(path)}"
                yield unfinished
                _pour(unfinished, path)
        else:
            with _replaced(path.resolve()) as unfinished:
                yield unfinished
    except OSError as error:
        expected = "a file that can be written"
        raise OSError(f"{path}: expected {expected}, got {error.strerror or error}") from error


@contextlib.contextmanager
def drafting(path: Path | None) -> Iterator[Callable[[str], None]]:
    """Give a function that writes the text so far, which replaces `path` each time. None writes nothing.

    What is not a regular file gets the last text alone, at the end of the block, also after an error.

    Raises:
        OSError: as `replacing`.
    """
    last: list[str] = []
    stream = path is not None and is_stream(path)

    def write(text: str) -> None:
        last[:] = [text]
        if path is not None and not stream:
            _write(path, text)

    try:
        yield write
    finally:
        if path is not None and stream and last:
            _write(path, *last)


def _write(path: Path, text: str) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    before = path.stat() if path.exists() else None
    if before is not None and not os.access(path, os.W_OK):
        raise PermissionError("a read-only file")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f".{uuid.uuid4().hex[:8]}{_suffix(path)}"
    try:
        yield unfinished
        _sync(unfinished, os.O_RDWR)
        if before is not None:
            with contextlib.suppress(OSError, AttributeError):  # another owner's, or Windows
                os.chown(unfinished, before.st_uid, before.st_gid)
            os.chmod(unfinished, stat.S_IMODE(before.st_mode))
        unfinished.replace(path)
        with contextlib.suppress(OSError):  # where a folder cannot be opened
            _sync(path.parent, os.O_RDONLY)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def is_stream(path: Path) -> bool:
    """Return whether `path` is a pipe, a terminal, another such device, or an open descriptor.

    Raises:
        OSError: `path` is a folder, a socket, a disk or a closed descriptor.
    """
    descriptor = _descriptor(path)
    if descriptor is not None:
        os.fstat(descriptor)
        return True
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if stat.S_ISREG(mode):
        return False
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        return True
    raise OSError("a folder" if stat.S_ISDIR(mode) else "a socket or a disk")


def _descriptor(path: Path) -> int | None:
    """The number of an open file of this process that `path` names, such as 1 for /dev/stdout."""
    for _ in range(40):  # links to links
        if path.name.isdecimal() and path.parent.resolve() in (
            Path("/proc/self/fd").resolve(),
            Path("/dev/fd"),
        ):
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / os.readlink(path)
    return None


def _pour(file: Path, stream: Path) -> None:
    descriptor = _descriptor(stream)
    for text in (sys.stdout, sys.stderr):  # what was printed comes first
        with contextlib.suppress(AttributeError, ValueError):
            text.flush()
    target = (
        os.open(stream, os.O_WRONLY | getattr(os, "O_NOCTTY", 0))
        if descriptor is None
        else os.dup(descriptor)
    )
    with file.open("rb") as content, os.fdopen(target, "wb") as output:
        shutil.copyfileobj(content, output)


def _suffix(path: Path) -> str:
    """The suffix of `path`, or none if it is too long to name a format."""
    return path.suffix if len(os.fsencode(path.suffix)) <= LONGEST_SUFFIX else ""


def _sync(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check(files: Files) -> None:
    """Check that every output can be written, and that none overwrites an input or another output.

    Raises:
        ValueError: an option names a path that fails the check.
    """
    for option, path in files.folders:
        if path.exists() and not path.is_dir():
            raise ValueError(f"{option}: expected a folder, got the file {path}")
        _check_room(option, path)
    writes = [(option, path) for option, path in files.writes if not _check_file(option, path)]
    for option, path in writes:
        _check_room(option, path.resolve().parent)
    inputs = {path.resolve(): option for option, path in files.reads}
    outputs: dict[Path, str] = {}
    for option, path in writes:
        resolved = path.resolve()
        if resolved in inputs:
            raise ValueError(
                f"{option}: expected another file than that of {inputs[resolved]}, which is read, got {path}"
            )
        if resolved in outputs:
            raise ValueError(
                f"{option}: expected another file than that of {outputs[resolved]}, got {path} for both"
            )
        outputs[resolved] = option
    for resolved, option in outputs.items():
        if above := outputs.keys() & set(resolved.parents):
            raise ValueError(
                f"{option}: expected a folder to write to, got {min(above)}, "
                f"the file of {outputs[min(above)]}"
            )


def _check_file(option: str, path: Path) -> bool:
    """Check one output, and return whether it is a stream, which needs no room and may be named twice."""
    if path.is_dir():
        raise ValueError(f"{option}: expected a file to write, got the folder {path}")
    try:
        stream = is_stream(path)
    except OSError as error:
        raise ValueError(
            f"{option}: expected a file to write, got {path}, which is {error.strerror or error}"
        ) from error
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{option}: expected a file to write, got {path}, which is read-only")
    return stream


def _check_room(option: str, folder: Path) -> None:
    """Check that the nearest existing folder can be written to. Permission bits alone do not show it."""
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        Path(tempfile.mkdtemp(prefix=".", dir=nearest)).rmdir()
    except OSError as error:
        raise ValueError(
            f"{option}: expected a folder to write to, got {nearest}: {error.strerror}"
        ) from error
