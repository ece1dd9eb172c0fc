"""Files that are written whole or not at all, and checks of their destinations. Needs no torch."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple


class Files(NamedTuple):
    """What one call reads and writes: (option, path) each.

    Attributes:
        reads: files that must not be written over.
        writes: files that the call makes or replaces; missing folders above them are made.
        folders: folders that the call fills with files of its own names; made where they are missing.
    """

    reads: Sequence[tuple[str, Path]] = ()
    writes: Sequence[tuple[str, Path]] = ()
    folders: Sequence[tuple[str, Path]] = ()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which replaces `path` when the block ends without an error.

    Readers of `path` find the old file or the whole new one. Missing folders are made. The temporary path has the suffix of
    `path`, because writers choose the format by it. Where `path` is a link, the file that it points to is replaced.

    Raises:
        OSError: the file could not be written, as on a full disk. The old file is unchanged and no temporary file is left.
    """
    path = path.resolve()
    unfinished = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        raise OSError(f"{path}: expected to be written, got {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def check(files: Files) -> None:
    """Refuse destinations that could not be written, or that would lose an input or another output.

    Raises:
        ValueError: the option, what was expected, and what it is.
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
                f"{option}: expected a folder above it, got {min(above)}, the file of {outputs[min(above)]}"
            )


def _check_file(option: str, path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{option}: expected a file to write, got the folder {path}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{option}: expected a file to write, got {path}, which is a device or a pipe")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{option}: expected a file to write, got {path}, which is read-only")


def _check_room(option: str, folder: Path) -> None:
    """A folder can be made in the nearest folder there is, which permission bits alone do not tell."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        Path(tempfile.mkdtemp(prefix=".", dir=there)).rmdir()
    except OSError as error:
        raise ValueError(f"{option}: expected a folder to write to, got {there}: {error.strerror}") from error
