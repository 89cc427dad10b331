"""The ranks of one machine as processes: started together, ended together, started again when one dies. No torch.

A rank that dies takes the others with it: they would wait for it. Clients find the service again at the same address
and go on from the last checkpoint that both sides have, as after any end of a server.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hosl.errors import ConfigError
from hosl.ranks.place import BROKEN, STORE

_PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""The pauses before the ranks are started again, one after the other; the last one is kept."""
_CALM_S = 120.0
"""After so many seconds without a death the pauses begin anew."""
_LOOK_S = 0.05
_END_S = 10.0
"""Seconds that the other ranks have to end after rank 0."""


class Launcher:
    """Runs the same command as so many ranks, until rank 0 ends in order."""

    def __init__(
        self,
        command: Sequence[str],
        ranks: int,
        *,
        say: Callable[[str], None],
        start: Callable[..., Any] = subprocess.Popen,
    ) -> None:
        """`start`: makes a process, as `subprocess.Popen` does."""
        self._command, self._ranks, self._say, self._start = list(command), ranks, say, start
        self._processes: list[Any] = []
        self._ending: int | None = None
        """The signal by which this process was told to end."""

    def run(self) -> int:
        """Run the ranks until SIGTERM or SIGINT, or until one refuses to start; returns the exit status.

        It is that of the rank whose end ended all: of rank 0 in order, or of one that refuses.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        died = 0
        while True:
            begin = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="hosl-ranks-") as folder:
                self._start_all(Path(folder) / "store")
                rank, status = self._first_end()
                self._end_all(patiently=rank == 0 and status == 0)
            if self._ending is not None and (rank, status) == (0, -signal.SIGTERM):
                return 0  # by our signal: it served nobody yet, or has saved
            if self._ending is not None or (status >= 0 and status != BROKEN):
                return status if status >= 0 else 128 - status
            died = 1 if time.monotonic() - begin > _CALM_S else died + 1
            pause_s = _PAUSES_S[min(died, len(_PAUSES_S)) - 1]
            how = f"by signal {-status}" if status < 0 else f"with status {status}"
            self._say(
                f"rank {rank} ended {how}; all ranks are started again" + f" in {pause_s:g} s" * (pause_s > 0)
            )
            self._wait(pause_s)
            if self._ending is not None:
                return 0  # the last checkpoints are on disk, and nothing else is left

    def _start_all(self, store: Path) -> None:
        threads = str(max(1, (os.cpu_count() or 1) // self._ranks))
        for rank in range(self._ranks):
            environment = {"OMP_NUM_THREADS": threads} | os.environ | {
                STORE: str(store), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self._ranks),
                "LOCAL_WORLD_SIZE": str(self._ranks),
            }  # fmt: skip
            # a session of its own: Ctrl-C reaches this process alone, which passes it on to rank 0
            self._processes.append(
                self._start(self._command, env=environment, stdin=subprocess.PIPE, start_new_session=True)
            )
        if self._ending is not None:  # told meanwhile
            self._processes[0].send_signal(self._ending)

    def _first_end(self) -> tuple[int, int]:
        """The rank whose end ends all, and its exit status: rank 0, or one that fails; of several the cause."""
        while True:
            statuses = {rank: process.poll() for rank, process in enumerate(self._processes)}
            ended = {rank: status for rank, status in statuses.items() if status is not None}
            failed = {rank: status for rank, status in ended.items() if status}
            if failed or 0 in ended:
                causes = {rank: status for rank, status in failed.items() if status != BROKEN}
                return next(iter((causes or failed or ended).items()))
            time.sleep(_LOOK_S)

    def _end_all(self, *, patiently: bool) -> None:
        end = time.monotonic() + (_END_S if patiently else 0.0)
        while time.monotonic() < end and any(process.poll() is None for process in self._processes):
            time.sleep(_LOOK_S)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            process.stdin.close()
        self._processes.clear()

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._ending is None:
            time.sleep(_LOOK_S)

    def _end(self, number: int, _: object) -> None:
        """Tell rank 0, which finishes and saves, and then tells the others."""
        self._ending = number
        if self._processes:
            self._processes[0].send_signal(signal.SIGTERM)


def own_command(listen: str) -> list[str]:
    """The command of this process, to be started once more for each rank, listening at an address with a port."""
    return [sys.executable, *sys.orig_argv[1:], "--listen", listen]


def with_port(host: str, port: int) -> int:
    """The port to listen on: where 0 is given, a free one, the same for all starts of the service.

    Raises:
        ConfigError: if the host is no address of this machine.
    """
    if port:
        return port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as free:
        try:
            free.bind((host, 0))
        except OSError as cause:
            raise ConfigError(f"--listen {host}: it cannot be listened on: {cause.strerror}") from cause
        return free.getsockname()[1]


def end_with_launcher() -> None:
    """Have this rank end when its launcher does, however that ends: its standard input is a pipe from there."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(BROKEN)

    threading.Thread(target=watch, name="hosl-launcher", daemon=True).start()
