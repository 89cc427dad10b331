"""What lies in a service's folder, run by run, for the owner; read beside a running server, which notices nothing."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.json_format import ParseDict

from hosl.errors import CheckpointError, WireError
from hosl.service.operation.live_files import read_progress, read_running
from hosl.service.operation.now import RunNow
from hosl.service.operation.stored import (
    CLIENTS,
    checkpoint_folders,
    handshake_in,
    saved_steps,
    size_bytes,
    stored_runs,
    written,
)
from hosl.system.checkpoint import checkpoint_path, checkpoint_steps, damage_of, facts_of
from hosl.wire import hosl_pb2 as pb
from hosl.wire.enums import from_enum


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One client of a run."""

    name: str
    step: int
    """The last step that it did; where no server has the run in memory, that of the newest checkpoint."""
    heard: float | None
    """The time of its last call, in seconds since 1970; None: not known."""
    present: bool = False
    """Whether it takes part at this moment."""
    saved_steps: list[int] = field(default_factory=list)
    """The checkpoints of its own server adapters; empty where the server's half is shared."""


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """One run of a service, of which a server may be running."""

    name: str
    damage: str | None = None
    """What is damaged in its handshake; then nothing else is known but its size and its checkpoints."""
    method: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    """Family, cut, dtype, labels and digests, as its first client said them."""
    training: dict[str, Any] = field(default_factory=dict)
    """The settings of its first client."""
    expected: int = 0
    """The clients that it is for."""
    seats: list[Seat] = field(default_factory=list)
    heirs: dict[str, str] = field(default_factory=dict)
    """Client that lost its seat -> the client that has it."""
    step: int = 0
    """The steps that are done: of rounds, or of the client that has done fewest."""
    max_steps: int = 0
    loss_nats: float | None = None
    heard: float | None = None
    """The time of the last call of any client, in seconds since 1970; of older runs, of the last writing."""
    in_memory: bool = False
    disk_bytes: int = 0
    saved_steps: list[int] = field(default_factory=list)

    @property
    def present(self) -> int:
        """The number of clients that take part at this moment."""
        return sum(seat.present for seat in self.seats)


def stored_run(service: Path, name: str) -> StoredRun | None:
    """The run of this name; None: it was dropped meanwhile."""
    folder = service / "runs" / name
    saved = saved_steps(folder)
    sizes: dict[str, Any] = {"name": name, "disk_bytes": size_bytes(folder), "saved_steps": saved}
    try:
        stored = handshake_in(folder)
        training = ParseDict({} if stored is None else stored["training"], pb.Training())
        method = "" if stored is None else from_enum(pb.Method, training.method)
    except (CheckpointError, WireError) as damage:
        return StoredRun(**sizes, damage=str(damage), heard=written(folder))
    if stored is None:
        return None
    running, progress = read_running(service), read_progress(folder)
    live = progress if running is not None and running.alive and name in running.runs else None
    seats = _seats(stored["clients"], folder, progress, live)
    alone = training.clients <= 1
    steps = [seat.step for seat in seats] or [0]
    done = saved[-1] if saved else 0
    if live is not None:
        done = live.step
    heard = [seat.heard for seat in seats if seat.heard is not None]
    return StoredRun(
        **sizes,
        method=method,
        model=stored["model"],
        training=stored["training"],
        expected=max(training.clients, 1),
        seats=seats,
        heirs=stored.get("heirs", {}),
        step=done if alone or training.order == pb.SYNCHRONOUS else min(steps),
        max_steps=training.max_steps,
        loss_nats=None if progress is None else progress.loss,
        heard=max(heard, default=written(folder)),
        in_memory=live is not None,
    )


def all_stored(service: Path) -> list[StoredRun]:
    """Every run, by name."""
    runs = (stored_run(service, name) for name, _ in stored_runs(service / "runs"))
    return [run for run in runs if run is not None]


def checkpoints_of(service: Path, name: str) -> list[dict[str, Any]]:
    """The checkpoints of a run: step, bytes, time of writing, damage (None: none; each file is hashed), client.

    The client is the one whose adapters they are; None: all train one half. One deleted meanwhile is left out.
    """
    run, found = service / "runs" / name, []
    paths = [
        (checkpoint_path(folder, step), step, folder.parent.name if folder.parent != run else None)
        for folder in checkpoint_folders(run)
        for step in checkpoint_steps(folder)
    ]
    for path, step, client in paths:
        try:
            written_at = path.stat().st_mtime
        except FileNotFoundError:
            continue
        damage = damage_of(path)
        if path.is_dir():
            facts = {"step": step, "bytes": size_bytes(path), "written": written_at, "damage": damage}
            found.append(facts | {"client": client})
    return found


def _seats(clients: list[str], folder: Path, progress: RunNow | None, live: RunNow | None) -> list[Seat]:
    known = {} if progress is None else progress.clients
    now = None if live is None else {name: client.step for name, client in live.clients.items()}
    steps = _saved_steps(folder) if now is None else now
    return [
        Seat(
            name=name,
            step=steps.get(name, 0),
            heard=known[name].heard if name in known else None,
            present=live is not None and name in live.clients and live.clients[name].present,
            saved_steps=checkpoint_steps(folder / CLIENTS / name / "checkpoints"),
        )
        for name in clients
    ]


def _saved_steps(folder: Path) -> dict[str, int]:
    """The step of each client at the newest checkpoint whose state can be read."""
    steps = dict[str, int]()
    for checkpoints in checkpoint_folders(folder):
        for step in reversed(checkpoint_steps(checkpoints)):
            try:
                steps |= facts_of(checkpoint_path(checkpoints, step)).get("steps", {})
            except CheckpointError:
                continue
            break
    return steps
