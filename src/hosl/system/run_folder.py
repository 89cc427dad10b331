"""The files that a run writes while it runs: exact metrics, measured timings, and the lock on its folder.

metrics.jsonl holds the values that depend on the config alone (losses, coefficients, bytes), so that a resumed run
writes the same bytes; timings.jsonl holds the values that a machine measured (seconds, memory). See docs/adr/0003.
"""

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from hosl.errors import FolderError

MEMORY_STEPS = 50
"""Memory is measured in the first two steps of a process and in every 50th after; measuring slows those steps."""


class RunLock:
    """A lock on a run's folder; the system releases it when the process ends, however it ends."""

    def __init__(self, run: Path) -> None:
        """Take the lock.

        Raises:
            FolderError: if another process holds it.
        """
        self._file = (run / ".lock").open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise FolderError(
                f"{run} is in use by another process; wait for it, end it, or choose another output_dir"
            ) from None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class Record:
    """The two JSON Lines files of a run: appended to, and truncated to a checkpoint on resume."""

    def __init__(self, run: Path, *, metrics_bytes: int | None = 0, step: int = 0) -> None:
        """Open `run`'s files and drop what was written after the checkpoint of `step`.

        The first `metrics_bytes` of metrics.jsonl stay. None: the lines up to `step`, without those of the last test.
        """
        self._metrics = (run / "metrics.jsonl").open("ab+")
        self._timings = (run / "timings.jsonl").open("ab+")
        self.cut_back(metrics_bytes, step)

    def metrics(self, **line: Any) -> None:
        """Append one line to metrics.jsonl; keys carry their units."""
        self._metrics.write(_line(line))

    def timings(self, **line: Any) -> None:
        """Append one line to timings.jsonl; keys carry their units."""
        self._timings.write(_line(line))

    def flush(self) -> int:
        """Flush both files to the disk; returns the length of metrics.jsonl in bytes, for the checkpoint."""
        for file in (self._metrics, self._timings):
            file.flush()
            os.fsync(file.fileno())
        return self._metrics.seek(0, os.SEEK_END)

    def cut_back(self, metrics_bytes: int | None, step: int) -> None:
        """Drop what was written after the checkpoint of `step`, when metrics.jsonl had `metrics_bytes` bytes."""
        self.flush()
        self._metrics.truncate(_bytes_until(self._metrics, step) if metrics_bytes is None else metrics_bytes)
        self._timings.truncate(_bytes_until(self._timings, step))

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        self._timings.close()


def _bytes_until(file: BinaryIO, step: int) -> int:
    """The length of the lines up to `step`; a torn line, the first of a later step or of the last test ends them."""
    file.seek(0)
    length = 0
    for text in file:
        line = json.loads(text) if text.endswith(b"\n") else {}
        if line.get("step", step + 1) > step or line.get("split") == "test":
            break
        length += len(text)
    return length


def new_folder(wanted: Path) -> Path:
    """Make the folder `wanted`, or, where it exists, the same name with -2, -3, ...; returns the folder made.

    Raises:
        FolderError: if the system does not let it be made.
    """
    number = 1
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as cause:
            raise FolderError(
                f"output_dir {folder} cannot be made: {cause.strerror}; choose a folder that can be written"
            ) from cause
        else:
            return folder


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics or timings file; an unfinished last line is left out."""
    with path.open("rb") as file:
        return [json.loads(line) for line in file if line.endswith(b"\n")]


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False).encode() + b"\n"
