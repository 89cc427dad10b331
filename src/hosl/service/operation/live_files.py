"""The files that a running server leaves for the commands on its machine, which then need not ask it.

    SERVICE/running.json         since when it runs and which runs are in memory; gone once it has ended in order
    RUNS/NAME/progress.json      a run as it was when it was last in memory: steps, loss, when each client was heard

Both are hints: nothing is trained from them, and a run without them goes on as well.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from hosl.service.operation.now import RunNow
from hosl.service.operation.stored import handshake_file
from hosl.system.atomic import whole_file

PERIOD_S = 5.0
"""The seconds between two writings."""
_SILENT_S = 6 * PERIOD_S
"""The seconds without a writing after which a server is taken for dead."""
_RUNNING, _PROGRESS = "running.json", "progress.json"


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """The content of running.json."""

    pid: int
    started: float
    """In seconds since 1970."""
    written: float
    """In seconds since 1970."""
    runs: list[str]
    """The runs in memory."""

    @property
    def alive(self) -> bool:
        """Whether it was written by a server that runs."""
        return time.time() - self.written < _SILENT_S


class LiveFiles:
    """The files of one service, as its server writes them."""

    def __init__(
        self,
        service: Path,
        now: Callable[[], Iterable[RunNow]],
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`say` is called with a line when the files cannot be written; the service goes on."""
        self._service, self._now, self._say = service, now, say
        self._started = time.time()
        self._written: dict[str, RunNow] = {}
        self._failed = self._closed = False
        self._lock = threading.Lock()
        """Is held while files are written: a write that outlives its task must not come after the last one."""

    async def write(self) -> None:
        """Write what has changed; beside the event loop, since a disk may be slow."""
        runs = tuple(self._now())
        await asyncio.to_thread(self._write, runs)

    def close(self) -> None:
        """Write for the last time: the server ends in order."""
        self._write(tuple(self._now()), last=True)

    def _write(self, runs: tuple[RunNow, ...], *, last: bool = False) -> None:
        with self._lock:
            if not self._closed:
                self._write_all(runs)
            if last:
                self._closed = True
                (self._service / _RUNNING).unlink(missing_ok=True)

    def _write_all(self, runs: tuple[RunNow, ...]) -> None:
        running = Running(
            pid=os.getpid(), started=self._started, written=time.time(), runs=[run.name for run in runs]
        )
        try:
            whole_file(self._service / _RUNNING, msgspec.json.encode(running))
            for run in runs:
                if self._written.get(run.name) != run:
                    write_progress(self._service / "runs" / run.name, run)
        except OSError as cause:
            if not self._failed:
                self._say(
                    f"{_RUNNING} and {_PROGRESS} cannot be written: {cause.strerror}; `hosl runs` shows less"
                )
            self._failed = True
        else:
            self._failed = False
            self._written = {run.name: run for run in runs}


def write_progress(folder: Path, run: RunNow) -> None:
    """Write progress.json into a run's folder; nothing if the run was dropped meanwhile.

    Raises:
        OSError: if it cannot be written.
    """
    if handshake_file(folder) is not None:
        try:
            whole_file(folder / _PROGRESS, msgspec.json.encode(run))
        except FileNotFoundError:
            if folder.is_dir():
                raise


def read_progress(folder: Path) -> RunNow | None:
    """The content of a run's progress.json; None: there is none, or it is damaged."""
    try:
        return msgspec.json.decode((folder / _PROGRESS).read_bytes(), type=RunNow)
    except (OSError, msgspec.MsgspecError):
        return None


def read_running(service: Path) -> Running | None:
    """The content of running.json; None: no server runs, or the file is damaged."""
    try:
        return msgspec.json.decode((service / _RUNNING).read_bytes(), type=Running)
    except (OSError, msgspec.MsgspecError):
        return None
