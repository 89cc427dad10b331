"""A folder or a file that appears whole or not at all: written under another name, flushed, renamed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from hosl.errors import FailureError, FolderError

_NO_SUCH_CALL = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EPERM,
    errno.EACCES,
    errno.EBADF,
    errno.EISDIR,
)
"""The errors of a filesystem that has no such call, as opposed to a disk that fails or is full."""


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to fill; it is renamed to `out` at the end of the context, or deleted if the context fails.

    Raises:
        FolderError: if `out` exists and is not an empty folder.
        FailureError: if the disk is full or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FolderError(
            f"{out} exists and is not empty; nothing is overwritten: choose another folder, or empty it"
        )
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        partial.replace(out)
        _flush(out.parent)
    except OSError as cause:
        shutil.rmtree(partial, ignore_errors=True)
        raise FailureError(
            f"{out} could not be written: {cause.strerror or cause}; nothing was left behind"
        ) from cause
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def whole_lines(out: Path) -> Iterator[TextIO]:
    """Yield a text file to write; it is renamed to `out` at the end of the context, or deleted if the context fails.

    Raises:
        FolderError: if `out` exists, or its folder does not.
        FailureError: if the disk is full or cannot be written.
    """
    if os.path.lexists(out):
        raise FolderError(f"{out} exists; nothing is overwritten: choose another name, or remove it")
    if not out.parent.is_dir():
        raise FolderError(f"{out}: there is no folder {out.parent}; make it, or choose another name")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if os.path.lexists(out):
            raise FolderError(f"{out} was made meanwhile; nothing is overwritten: choose another name")
        partial.replace(out)
        _flush(out.parent)
    except OSError as cause:
        partial.unlink(missing_ok=True)
        raise FailureError(
            f"{out} could not be written: {cause.strerror or cause}; nothing was left behind"
        ) from cause
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def whole_file(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Write `content` to `path`, replacing what was there; permissions are `mode` less the process's umask.

    Two processes may write the same file at once: the last one wins.

    Raises:
        OSError: if the file cannot be written; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _flush(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    """Flush a file or a folder to the disk; not every filesystem can flush a folder, and then it need not be."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as cause:
        if not path.is_dir() or cause.errno not in _NO_SUCH_CALL:
            raise
