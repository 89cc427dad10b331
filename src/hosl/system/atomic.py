"""A folder or a file that appears whole or not at all: written under another name, flushed, renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hosl.errors import FailureError, FolderError


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields a folder to fill; it becomes `out` at the end, or vanishes when the block fails.

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
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed here
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


def whole_file(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Write `content` to `path`, in place of what was there, with the rights of `mode` less the process's umask.

    Two processes may write the same file at once: one of them is the last.

    Raises:
        OSError: if it cannot be written; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
