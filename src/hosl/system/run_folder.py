"""The files that a run writes while it runs: exact metrics, measured timings, and the lock on its folder.

metrics.jsonl holds the values that depend on the config alone (losses, coefficients, bytes), so that a resumed run
writes the same bytes; timings.jsonl holds the values that a machine measured (seconds, memory). See docs/adr/0003.
"""

import errno
import fcntl
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from hosl.errors import FolderError
from hosl.system.atomic import whole_file
from hosl.system.run_lines import whole_line

TIMINGS = "timings.jsonl"
"""The file of what a machine measured; every other file of lines is one of exact metrics."""
EVALUATION = "evaluation.json"
"""The file with the labels and the confusion matrix of the evaluation on test."""
OWN_METRIC = "own_metric.json"
"""The file with the figures of the user's own metric (`task.metric`) over the answers to held-out rows."""
ANSWERS = "answers.json"
"""The file of what a run's model says to prompts, and what it said before (`hosl generate --keep`)."""
MEMORY_STEPS = 50
"""Memory is measured in the first two steps of a process and in every 50th after; measuring slows those steps."""


class RunLock:
    """A lock on a folder, a run's or a service's; the system releases it when the process ends, however it ends.

    A filesystem without locks (exFAT, some network shares) gives none: that is said, and the work goes on.
    """

    def __init__(self, run: Path, *, file: str = ".lock", wait: bool = False) -> None:
        """Take the lock, of which `file` in the folder is the name; `wait` while another process holds it.

        Raises:
            FolderError: if another process holds it and `wait` is false, or the folder cannot be written.
        """
        try:
            self._file = (run / file).open("w")
        except OSError as cause:
            raise FolderError(f"{run} cannot be written: {cause.strerror}; choose another folder") from cause
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as cause:
            if cause.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self._file.close()
                raise FolderError(
                    f"{run} is in use by another process; wait for it, end it, or choose another output_dir"
                ) from None
            sys.stderr.write(
                f"{run} is on a filesystem without locks ({cause.strerror}): start no second command there\n"
            )

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class Record:
    """The two JSON Lines files of a run: appended to, and truncated to a checkpoint on resume."""

    def __init__(self, run: Path, *, metrics_bytes: int | None = 0, step: int = 0) -> None:
        """Open `run`'s files; drop what was written after the checkpoint of `step` (its first `metrics_bytes`).

        Where there is no such checkpoint (None), lines up to `step` stay, without those of the last test.
        """
        self._run = run
        self.lost = self._open(metrics_bytes, step)
        """Whether lines of metrics.jsonl before that were damaged; they are dropped."""

    def metrics(self, **line: Any) -> None:
        """Append one line to metrics.jsonl; keys carry their units."""
        self._metrics.write(_line(line))

    def timings(self, **line: Any) -> None:
        """Append one line to timings.jsonl; keys carry their units."""
        self._timings.write(_line(line))

    def evaluation(self, **content: Any) -> None:
        """Write evaluation.json: the numbers, the labels and the confusion matrix of the last evaluation."""
        whole_file(self._run / EVALUATION, json.dumps(content).encode())

    def flush(self) -> int:
        """Flush both files to the disk; returns the length of metrics.jsonl in bytes, for the checkpoint."""
        for file in (self._metrics, self._timings):
            file.flush()
            os.fsync(file.fileno())
        return self._metrics.seek(0, os.SEEK_END)

    def cut_back(self, metrics_bytes: int | None, step: int) -> None:
        """Drop what was written after the checkpoint of `step`, when metrics.jsonl had `metrics_bytes` bytes."""
        self.close()
        self._open(metrics_bytes, step)

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        self._timings.close()

    def _open(self, metrics_bytes: int | None, step: int) -> bool:
        """Open both files to append to what belongs to `step`; returns whether lines of metrics.jsonl are missing."""
        kept_bytes = _cut_back(self._run / "metrics.jsonl", step, metrics_bytes)
        _cut_back(self._run / "timings.jsonl", step, None)
        self._metrics = (self._run / "metrics.jsonl").open("ab")
        self._timings = (self._run / "timings.jsonl").open("ab")
        return kept_bytes < (metrics_bytes or 0)


def same_name_folders(wanted: Path) -> list[Path]:
    """The folders of runs whose output_dir is `wanted`: that one, and the same name with -2, -3, ..., in order."""
    name = re.compile(re.escape(wanted.name) + r"(?:-(\d+))?")
    found = [(match, path) for path in _children(wanted.parent) if (match := name.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda pair: int(pair[0][1] or 1))]


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def new_folder(wanted: Path, config_text: str, say: Callable[[str], None]) -> Path:
    """Make the folder `wanted` with a config.yaml, or, where it is taken, the same name with -2, -3, ...; returns it.

    `say` is called with one line where the name is another.

    An empty folder is taken over, and so is one with nothing but that config.yaml: a kill left it, or a person made it.

    Raises:
        FolderError: if the system does not let it be made.
    """
    number = 1
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        config = folder / "config.yaml"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shown = _shown(folder)
            if not shown:
                whole_file(config, config_text.encode())
            elif shown != {config.name} or config.read_text(encoding="utf-8") != config_text:
                raise FileExistsError
        except (FileExistsError, UnicodeDecodeError):
            number += 1
        except OSError as cause:
            raise _cannot_be_made(folder, cause) from cause
        else:
            if number > 1:
                say(f"output_dir {wanted} is taken; this run is {folder}")
            return folder


def writable_place(wanted: Path) -> Path:
    """The folder in which a file beside a run can stand before `new_folder` makes the run's; it need not exist yet.

    It is `wanted` itself where that is an empty folder, and else the folder around it.

    Raises:
        FolderError: if the system does not let a file be made there; nothing is left behind.
    """
    try:
        place = wanted if wanted.is_dir() and not _shown(wanted) else wanted.parent
        with tempfile.TemporaryFile(dir=next(path for path in (place, *place.parents) if path.exists())):
            return place
    except OSError as cause:
        raise _cannot_be_made(wanted, cause) from cause


def _shown(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def _cannot_be_made(folder: Path, cause: OSError) -> FolderError:
    return FolderError(
        f"output_dir {folder} cannot be made: {cause.strerror}; choose a folder that can be written"
    )


def write_record(run: Path, record: dict[str, Any]) -> None:
    """Write record.json, whole or not at all."""
    whole_file(run / "record.json", json.dumps(record, indent=2).encode())


def read_record(run: Path) -> dict[str, Any] | None:
    """The content of record.json; None: there is none, or it is damaged."""
    return _read_object(run / "record.json")


def read_evaluation(run: Path) -> dict[str, Any] | None:
    """The content of evaluation.json; None: there is none, or it is damaged."""
    return _read_object(run / EVALUATION)


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics or timings file; an unfinished last line is left out, and so are those that are no JSON.

    Raises:
        FolderError: if a line lacks a key, or has an impossible value.
    """
    lines = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                content = whole_line(line, timing=path.name == TIMINGS)
            except ValueError as cause:
                raise FolderError(
                    f"{path}, line {number}, is damaged: {cause}; put the file back, or remove that line"
                ) from cause
            lines += [] if content is None else [content]
    return lines


def is_tested(run: Path) -> bool:
    """Whether the last evaluation of a run, on test, was made."""
    metrics = run / "metrics.jsonl"
    return metrics.is_file() and any(line.get("split") == "test" for line in read_lines(metrics))


def _cut_back(path: Path, step: int, limit_bytes: int | None) -> int:
    """Keep the whole lines up to `step` in the first `limit_bytes` of a file; returns how many bytes that is."""
    before = path.read_bytes() if path.is_file() else b""
    lines = before[:limit_bytes].splitlines(keepends=True)
    kept = b"".join(line for line in lines if _step_of(line, path) <= step)
    if kept != before:
        whole_file(path, kept)
    return len(kept)


def _step_of(line: bytes, path: Path) -> float | int:
    """The step of a line; that of a damaged one is never reached."""
    try:
        content = whole_line(line, timing=path.name == TIMINGS)
    except ValueError:
        return math.inf
    return content["step"] if content else math.inf


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False).encode() + b"\n"
