"""What one client may take of the server: runs, and bytes on disk. A run counts at the client that began it."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hosl.errors import CheckpointError, LimitError
from hosl.service.operation.stored import (
    RUN_NAME,
    checkpoint_folders,
    handshake_file,
    handshake_in,
    size_bytes,
)
from hosl.system.checkpoint import checkpoint_path, checkpoint_steps
from hosl.system.readable import readable_bytes

_AT_ONCE = 3
"""The checkpoints of a run that lie on disk while one is written: the new one, and the two that its device has."""


@dataclass
class Quota:
    """The quota of each client. Nothing is deleted by it: the owner makes room, or allows more."""

    runs: int = 100
    """The runs with checkpoints that one client may have begun."""
    disk_bytes: int = 64 << 30
    """The bytes of all files of the runs that one client has begun."""
    _begun: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Run -> the modification time of its handshake, and the client that began it."""

    def check_count(self, client: str, begun: int) -> None:
        """Refuse one run more to a client that has begun so many.

        Raises:
            LimitError: if it is one too many.
        """
        if begun >= self.runs:
            raise LimitError(
                f"client {client} has begun {begun} runs here, {self.runs} are allowed (hosl serve --runs-per-client); "
                "the server's owner makes room by `hosl runs drop NAME`"
            )

    def check_disk(self, folder: Path, run: str, client: str) -> None:
        """Refuse another checkpoint of a run that `client` began, below the folder `runs` of a service.

        How much a run needs is told by its newest checkpoint: the first is always taken while there is room for a byte,
        so that a run which cannot go on is refused at its second, not in the middle.

        Raises:
            LimitError: naming the client, what it has, and what is allowed.
        """
        has_bytes = {name: size_bytes(folder / name) for name in self._runs_of(folder, client) | {run}}
        newest = [
            checkpoint_path(checkpoints, step)
            for checkpoints in checkpoint_folders(folder / run)
            for step in checkpoint_steps(checkpoints)[-1:]
        ]
        one_bytes = sum(map(size_bytes, newest)) or 1
        wanted_bytes = sum(has_bytes.values()) - has_bytes[run] + max(has_bytes[run], _AT_ONCE * one_bytes)
        if wanted_bytes > self.disk_bytes:
            largest = sorted(has_bytes, key=lambda name: -has_bytes[name])[:3]
            raise LimitError(
                f"client {client} has {readable_bytes(sum(has_bytes.values()))} on this server's disk and would need "
                f"{readable_bytes(wanted_bytes)} with run {run}; {readable_bytes(self.disk_bytes)} are allowed (hosl "
                f"serve --disk-per-client); the server's owner makes room by `hosl runs drop NAME`: the largest are "
                f"{', '.join(f'{name} ({readable_bytes(has_bytes[name])})' for name in largest)}"
            )

    def _runs_of(self, folder: Path, client: str) -> set[str]:
        """The names of the runs that a client began; a damaged handshake names none."""
        known, self._begun = self._begun, {}
        for path in folder.glob("*"):
            file = handshake_file(path) if RUN_NAME.fullmatch(path.name) else None
            with suppress(FileNotFoundError, PermissionError):  # dropped meanwhile, or somebody else's
                if file is not None:
                    changed = file.stat().st_mtime_ns
                    same = known.get(path.name, (-1, ""))
                    self._begun[path.name] = same if same[0] == changed else (changed, _first_client(path))
        return {name for name, (_, first) in self._begun.items() if first == client}


def _first_client(folder: Path) -> str:
    try:
        return str((handshake_in(folder) or {}).get("first_client", ""))
    except CheckpointError:
        return ""
