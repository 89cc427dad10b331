"""The runs that lie in a service's folder, whether a server runs or not: their handshakes, sizes, and their end.

RUNS/NAME/handshake.json   the model and the settings of the first Hello, and the clients that have a seat
RUNS/NAME/progress.json    what the server last knew of the run, every few seconds (`live_files`)
RUNS/NAME/checkpoints/     see `hosl.system.checkpoint`
RUNS/NAME/clients/CLIENT/checkpoints/   those of each client with server adapters of its own
RUNS/NAME/given/           see `hosl.service.giving`
"""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from google.protobuf.json_format import ParseDict, ParseError

from hosl.errors import CheckpointError, ConfigError, FolderError
from hosl.system.checkpoint import checkpoint_steps, newest_checkpoint
from hosl.wire import hosl_pb2 as pb

CLIENTS = "clients"
"""The folder below a run's that has a folder for each client with server adapters of its own."""
RUN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def stored_runs(folder: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """Name and handshake of every run below the folder `runs` of a service, by name; None: the file is damaged."""
    names = sorted(path.name for path in folder.glob("*") if RUN_NAME.fullmatch(path.name))
    runs: list[tuple[str, dict[str, Any] | None]] = []
    for name in names:
        try:
            stored = handshake_in(folder / name)
        except CheckpointError:
            runs.append((name, None))
        else:
            runs += [] if stored is None else [(name, stored)]
    return runs


def stored_handshake(folder: Path, name: str) -> dict[str, Any] | None:
    """The handshake of the run of this name below the folder `runs` of a service; None: there is no such run.

    Raises:
        CheckpointError: if the file is damaged.
    """
    return handshake_in(folder / name) if RUN_NAME.fullmatch(name) else None


def handshake_file(folder: Path) -> Path | None:
    """The file of a run's handshake; None: there is no such run, or it was dropped."""
    names = ("handshake.json", "agreement.json")  # the second before version 0.2
    try:
        return next((folder / name for name in names if (folder / name).is_file()), None)
    except PermissionError:  # a run that somebody else's files are in; who reads it is told so
        return folder / names[0]


def handshake_in(folder: Path) -> dict[str, Any] | None:
    """The model and training of a run's first Hello, from the run's folder; None: there is no such run yet.

    Raises:
        CheckpointError: if the file is damaged.
    """
    file = handshake_file(folder)
    if file is None:
        return None
    try:
        stored: dict[str, Any] = msgspec.json.decode(file.read_bytes())
        training = stored["training"]
        if "law" in training:  # the name of `distribution` before version 0.2
            training["distribution"] = training.pop("law")
        ParseDict(stored["model"], pb.Model())
        ParseDict(training, pb.Training())
        stored.setdefault("clients", [stored["first_client"]])
    except (OSError, msgspec.MsgspecError, ParseError, LookupError, TypeError, AttributeError) as cause:
        raise CheckpointError(
            f"run {folder.name}: {file.name} on the server is damaged: {cause}; put it back, or choose another "
            "output_dir for a new run"
        ) from cause
    return stored


def size_bytes(folder: Path) -> int:
    """The bytes of the files below a folder, each counted once though it has several names (hard links).

    Files that a server deletes meanwhile are left out, and those that this user may not see.
    """
    sizes: dict[tuple[int, int], int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                stat = os.lstat(os.path.join(parent, name))
            except (FileNotFoundError, PermissionError):
                continue
            sizes[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(sizes.values())


def written(folder: Path) -> float | None:
    """The time, in seconds since 1970, of a run's newest checkpoint or its handshake; None: none can be seen."""
    times = []
    for path in (handshake_file(folder), *map(newest_checkpoint, checkpoint_folders(folder))):
        with suppress(FileNotFoundError, PermissionError):
            times += [] if path is None else [path.stat().st_mtime]
    return max(times, default=None)


def checkpoints_below(folder: Path, training: pb.Training, client: str) -> Path:
    """The folder of the checkpoints of the half that a client trains, below its run's folder."""
    return (folder / CLIENTS / client if training.personal_server else folder) / "checkpoints"


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders of checkpoints of a run: its own, and those of its clients; none, if this user may not look."""
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        return []
    return [folder / "checkpoints", *sorted(folder.glob(f"{CLIENTS}/*/checkpoints"))]


def saved_steps(folder: Path) -> list[int]:
    """The steps of which a run has checkpoints, of any client, ascending."""
    return sorted(
        {step for checkpoints in checkpoint_folders(folder) for step in checkpoint_steps(checkpoints)}
    )


def check_run(folder: Path, name: str) -> None:
    """Refuse the name of no run below the folder `runs` of a service.

    Raises:
        ConfigError: naming those that there are.
    """
    names = [known for known, _ in stored_runs(folder)]
    if name not in names:
        raise ConfigError(f"no run is called {name}; there are {', '.join(names) or 'none'}")


def drop_run(folder: Path, name: str) -> None:
    """Delete a run of a service; a running server hears of it at the next call, or within seconds.

    Raises:
        ConfigError: if there is no such run.
        FolderError: if it is gone for the server, but not all of it could be deleted.
    """
    check_run(folder, name)
    gone = folder / f".{name}.dropped"
    if gone.is_dir():
        shutil.rmtree(gone, ignore_errors=True)  # left by a process that was killed
    (folder / name).rename(gone)  # whole: a server never sees a half of it
    try:
        shutil.rmtree(gone)
    except OSError as cause:
        raise FolderError(
            f"run {name} is dropped, but not all of it could be deleted: {cause.filename}: {cause.strerror}; what is "
            f"left is {gone}, which is in nobody's way: delete it as the user whose files these are"
        ) from cause
