"""What a run writes down while it runs: exact metrics, measured timings, and the lock on its folder.

metrics.jsonl holds what is a function of the config alone (losses, coefficients, bytes), so that a resumed run writes
the same bytes; timings.jsonl holds what a machine measured (seconds, memory). See docs/adr/0003.
"""

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from hosl.errors import FolderError

MEMORY_STEPS = 50
"""Memory is measured in the first two steps of a process and every so many after; it slows those steps."""


class RunLock:
    """Holds a run's folder for this process; the system lets go of it when the process ends, however it ends."""

    def __init__(self, run: Path) -> None:
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
    """The two line files of a run, appended to, and cut back to a checkpoint on resume."""

    def __init__(self, run: Path, *, metrics_bytes: int = 0, step: int = 0) -> None:
        """Open `run`'s files; drop what was written after the checkpoint of `step` (its first `metrics_bytes`)."""
        self._metrics = (run / "metrics.jsonl").open("ab")
        self._metrics.truncate(metrics_bytes)
        self._timings = (run / "timings.jsonl").open("ab+")
        self._drop_timings_after(step)

    def metrics(self, **line: Any) -> None:
        """Append one exact line; keys carry their units."""
        self._metrics.write(_line(line))

    def timings(self, **line: Any) -> None:
        """Append one measured line; keys carry their units."""
        self._timings.write(_line(line))

    def flush(self) -> int:
        """Bring both files to the disk; returns how long metrics.jsonl is, in bytes, for the checkpoint."""
        for file in (self._metrics, self._timings):
            file.flush()
            os.fsync(file.fileno())
        return self._metrics.seek(0, os.SEEK_END)

    def cut_back(self, metrics_bytes: int, step: int) -> None:
        """Drop what was written after the checkpoint of `step`, which knows where its metrics ended."""
        self.flush()
        self._metrics.truncate(metrics_bytes)
        self._drop_timings_after(step)

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        self._timings.close()

    def _drop_timings_after(self, step: int) -> None:
        self._timings.seek(0)
        length = 0
        for line in self._timings:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            length += len(line)
        self._timings.truncate(length)


def new_folder(wanted: Path) -> Path:
    """Make `wanted`, or, where that is taken, the same name with -2, -3, ...; returns the folder made."""
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
