"""Files that are written completely or not at all, and checks of where they go. Needs no torch."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple


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
    """Give a temporary path beside `path`, which replaces `path` if the block ends without an error.

    A reader of `path` always finds the old file or the complete new one. Missing folders are created. The
    temporary path has the suffix of `path`, because writers choose the format by it. If `path` is a link, the
    file that it points to is replaced.

    Raises:
        OSError: the file cannot be written, for example because the disk is full. The old file is unchanged,
            and no temporary file is left.
    """
    path = path.resolve()
    unfinished = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        raise OSError(
            f"{path}: expected a file that can be written, got {error.strerror or error}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def check(files: Files) -> None:
    """Check that every output can be written, and that none overwrites an input or another output.

    Raises:
        ValueError: an option names a path that fails the check.
    """
    for option, path in files.folders:
        if path.exists() and not path.is_dir():
            raise ValueError(f"{option}: expected a folder, got the file {path}")
        _check_room(option, path)
    for option, path in files.writes:
        _check_file(option, path)
        _check_room(option, path.resolve().parent)
    inputs = {path.resolve(): option for option, path in files.reads}
    outputs: dict[Path, str] = {}
    for option, path in files.writes:
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


def _check_file(option: str, path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{option}: expected a file to write, got the folder {path}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{option}: expected a file to write, got {path}, which is a device or a pipe")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{option}: expected a file to write, got {path}, which is read-only")


def _check_room(option: str, folder: Path) -> None:
    """Check that the nearest existing folder can be written to. Permission bits alone do not show it."""
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        Path(tempfile.mkdtemp(prefix=".", dir=nearest)).rmdir()
    except OSError as error:
        raise ValueError(
            f"{option}: expected a folder to write to, got {nearest}: {error.strerror}"
        ) from error
