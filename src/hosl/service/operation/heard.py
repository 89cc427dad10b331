"""When each client was last heard: for the room of a run, for seats that became free, and for `hosl runs`."""

import time
from collections.abc import Sequence
from pathlib import Path

from hosl.service.operation.live_files import read_progress
from hosl.service.operation.now import ClientNow, RunNow
from hosl.service.operation.stored import CLIENTS, written
from hosl.system.checkpoint import checkpoint_steps


class Heard:
    """The last call of each client in each run; of runs that are not in memory, as progress.json tells it."""

    def __init__(self, folder: Path, seat_s: float) -> None:
        """`folder`: the runs of the service; `seat_s`: the seconds of silence after which a seat is free."""
        self._folder, self._seat_s = folder, seat_s
        self._runs_s: dict[str, dict[str, float]] = {}
        """Run -> client -> its last call, by a monotonic clock: a clock that is set makes nobody silent."""
        self._clients: dict[str, dict[str, float]] = {}
        """Run in memory -> client -> its last call, in seconds since 1970: for longer than this process lives."""
        self._elsewhere: dict[str, dict[str, ClientNow]] = {}
        """Run in memory -> client -> what it had done when its part of the run left memory."""

    def note(self, run: str, client: str) -> None:
        """Note a call."""
        self._runs_s.setdefault(run, {})[client] = time.monotonic()
        self._clients.setdefault(run, {})[client] = time.time()

    def opened(self, run: str, progress: RunNow | None, apart: Sequence[str] = ()) -> None:
        """Take what was known of a run that comes into memory; `apart`: its clients with adapters of their own.

        These go on from their newest checkpoints, though they may have been further when the server was killed.
        """
        self._clients[run] = _told(progress)
        known = {} if progress is None else progress.clients
        self._elsewhere[run] = {}
        for name in apart:
            saved = checkpoint_steps(self._folder / run / CLIENTS / name / "checkpoints")
            step, then = saved[-1] if saved else 0, known.get(name)
            loss = then.loss if then is not None and then.step == step else None
            self._elsewhere[run][name] = ClientNow(step, then.heard if then else None, False, loss)

    def closed(self, run: str) -> None:
        """Let go of what progress.json keeps."""
        self._clients.pop(run, None)
        self._elsewhere.pop(run, None)

    def left(self, run: str, client: str) -> None:
        """Forget a client whose seat went to another."""
        self._clients.get(run, {}).pop(client, None)
        self._elsewhere.get(run, {}).pop(client, None)

    def parted(self, run: str, client: str, step: int, loss: float | None) -> None:
        """Note what a client had done whose part of a run leaves memory."""
        heard = self._clients.get(run, {}).get(client)
        self._elsewhere.setdefault(run, {})[client] = ClientNow(step, heard, False, loss)

    def elsewhere(self, run: str) -> dict[str, ClientNow]:
        """What the clients of a run had done whose parts of it were in memory before."""
        return dict(self._elsewhere.get(run, {}))

    def clients(self, run: str) -> dict[str, float]:
        """The last call of each client of a run in memory, in seconds since 1970."""
        return dict(self._clients.get(run, {}))

    def silent_s(self, run: str, client: str = "") -> float:
        """The seconds since the last call in a run, or of one client in it; infinite if this process had none."""
        calls = list(self._runs_s.get(run, {}).items())
        return time.monotonic() - max(
            (at for name, at in calls if client in ("", name)), default=float("-inf")
        )

    def vanished(self, run: str, clients: Sequence[str]) -> str | None:
        """The client of a full run whose seat is free: it was silent for longest, and for too long. None: no such.

        Of a run of several clients only: one that trains alone is gone back with, and its work is nobody else's.
        """
        if len(clients) < 2:
            return None
        folder = self._folder / run
        known = _told(read_progress(folder)) | self._clients.get(run, {})
        unknown = written(folder) or time.time()
        silent_s = {client: time.time() - known.get(client, unknown) for client in clients}
        longest = max(clients, key=lambda client: silent_s[client])
        return longest if silent_s[longest] > self._seat_s else None


def _told(progress: RunNow | None) -> dict[str, float]:
    clients = {} if progress is None else progress.clients
    return {name: now.heard for name, now in clients.items() if now.heard is not None}
