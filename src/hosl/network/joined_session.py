"""The client's session of a run whose server is elsewhere, and the state from which both sides go on. No torch.

A single client and its server go on from the newest checkpoint that both have. With shared halves the server's journal
decides.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hosl.core.protocols import ClientSide, ServerSide
from hosl.core.rounds import RoundResult
from hosl.core.targets import Batch, weight_of
from hosl.errors import CheckpointError, StepMoved
from hosl.methods.step import method_round
from hosl.parties.metered import metered
from hosl.parties.remote.server import RemoteServer, WatchedServer
from hosl.parties.remote.shared_client import SharedClient
from hosl.system.checkpoint import (
    Checkpoint,
    checkpoint_path,
    drop_checkpoints_after,
    intact_steps,
    read_checkpoint,
    write_checkpoint,
)
from hosl.system.machine import process_peak_bytes
from hosl.training.crossing import behind_noise
from hosl.training.session import Session

NO_CLIENT_YET = cast(ClientSide, None)
"""The value of `client` until `go_to` has loaded the client."""


@dataclass
class JoinedSession(Session[ClientSide, ServerSide]):
    """The session of a client half in this process and a server in another."""

    remote: RemoteServer = field(kw_only=True)
    """The connection. The rounds call `server`, which is this connection or the client's own head above it."""
    folder: Path = Path()
    """The client half's folder."""
    runtime: Any = None
    """The module of the client's runtime, such as `hosl.network.torch_runtime`."""
    noise_key: bytes = b""
    """The secret of the noise on activations; unused where wire.clip_norm is null."""
    snapshot_step: int = 0
    """The step of the newest snapshot of a zeroth-order client; 0 is the base weights."""
    _wire_bytes: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.meters.server = self.remote.meter

    def server_to_call(self, *, in_round: bool) -> ServerSide:
        """The server, which counts by itself what is sent to it; behind the wire's noise, if it has any."""
        place = f"{self.step}/{'round' if in_round else 'evaluation'}"
        return behind_noise(self.config, self.server, self.runtime, self.noise_key, place, self.meters.client)

    def round(self, batch: Batch, step: int) -> RoundResult:
        """One step of the config's method; the server's costs are those that it reports."""
        if self.remote.restarted:  # noticed between two rounds: its journal may be another one
            raise StepMoved(self.step)
        client = metered(self.client, self.meters.client)
        clients = self.config.clients
        own = not clients.alone and clients.directions == "own"
        name = f"client/{self.remote.client}" if own else "client"
        server = self.server_to_call(in_round=True)
        result = method_round(self.config, client, server, batch, step, half=name, control=self.control)
        self.control = self.control.after(result.coefficients)
        if self._in_rounds and clients.halves == "personal":
            self.done(step)  # by this half, whether or not its round is still open
            last = self.remote.journal(step, 0, (), (), weight_of(batch.targets))[-1]
            if last.late:
                raise StepMoved(last.step)
        return result

    def done(self, step: int) -> None:
        """Note that the round of `step` is complete on both sides."""
        self.step = step
        self.remote.at(step)

    def stop_when(self, stopping: Callable[[], bool]) -> None:
        """Wait no longer for a server that is away once `stopping` is true."""
        self.remote.channel.stopping = stopping

    def measure_memory(self, *, on: bool) -> None:
        """Start or stop measuring the memory of the client's calls; the server measures its own."""
        self.meters.client.memory = self.runtime.memory_meter(self._own_client, self._head) if on else None

    def client_bytes(self) -> float:
        """The largest resident size of this process so far, bytes."""
        return float(process_peak_bytes())

    def costs(self) -> dict[str, Any]:
        """Message bytes as the connection counted them, and the seconds of calls beyond the server's compute."""
        up, down = self.remote.channel.bytes_up, self.remote.channel.bytes_down
        (up_before, down_before), self._wire_bytes = self._wire_bytes, (up, down)
        wire_s, self.remote.wire_s = self.remote.wire_s, 0.0
        return {
            "wire_s": round(wire_s, 6), "wire_bytes_up": up - up_before, "wire_bytes_down": down - down_before
        }  # fmt: skip

    def notes(self) -> dict[str, float]:
        """The effect of compression on the signal, in the steps in which it is measured."""
        return self.remote.notes() if isinstance(self.remote, WatchedServer) else {}

    def restorable(self, run: Path, say: Callable[[str], None]) -> list[int]:
        """The steps whose state this client can go to: its base weights and its intact checkpoints.

        Raises:
            CheckpointError: if it has checkpoints, and all are damaged.
        """
        if self.config.clients.halves == "shared":
            return [0]  # the server's journal rebuilds the half
        return [0, *sorted(intact_steps(run / "checkpoints", say))]

    def save(self, run: Path, facts: dict[str, Any]) -> None:
        """Let the server write its half, then write the client's; the previous checkpoint stays until the next."""
        self.remote.save(self.step)
        if checkpoint_path(run / "checkpoints", self.step).is_dir():
            return  # written already, before the server was killed
        checkpoint = Checkpoint(step=self.step)
        # shared halves are rebuilt from the server's journal, whose steps are not this client's: no snapshots
        snapshots = sys.maxsize if isinstance(self.client, SharedClient) else self.config.snapshot_steps
        self.snapshot_step = self.runtime.put_client(
            checkpoint, self._own_client, snapshot_step=self.snapshot_step, snapshot_steps=snapshots
        )
        if self._labels_stay:
            self.runtime.put_head(checkpoint, self.server)
        checkpoint.state |= self.inputs() | facts
        write_checkpoint(run / "checkpoints", checkpoint)

    def go_to(self, run: Path, step: int) -> dict[str, Any] | None:
        """Take the state after `step`, because the server goes on from there.

        Returns the facts of the checkpoint of that state; None where the client's half keeps what it has learned. In
        rounds, a half that was away goes on from its newest checkpoint before `step`.

        Raises:
            CheckpointError: if the checkpoint is damaged, or belongs to other data.
        """
        if self.config.clients.halves == "shared":
            drop_checkpoints_after(run / "checkpoints", step)
            return self._catch_up(step)
        if self.client is not NO_CLIENT_YET and (step == self.step or (self._in_rounds and step > self.step)):
            self.done(step)  # the half stays as it is, whatever rounds were closed without this client
            return None
        mine = (
            max(s for s in self.restorable(run, lambda text: None) if s <= step) if self._in_rounds else step
        )
        self.client = NO_CLIENT_YET  # lets go of the old half before it is loaded again
        self.client, self.snapshot_step = self._opened(), 0
        facts: dict[str, Any] = {}
        if mine:
            path = checkpoint_path(run / "checkpoints", mine)
            checkpoint = read_checkpoint(path, arrays=self.runtime.ARRAYS)
            self._check_task(checkpoint, path)
            self.snapshot_step = self.runtime.restore_client_(self.client, checkpoint)
            if self._labels_stay:
                self.runtime.restore_head_(self.server, checkpoint)
            facts = checkpoint.state
        self.control = self.control.restored(facts)
        drop_checkpoints_after(run / "checkpoints", step)
        self.done(step)
        return facts

    def finish(self) -> None:
        """Note the digest of the trained half, by which clients can be compared.

        With shared halves, first take the updates of the other clients since this client's last step.
        """
        if self.config.clients.halves == "shared":
            self._catch_up(self.step)
            self.facts["journal_updates"] = self._own_client.journal.last_step
        self.facts["final_client_digest"] = self.runtime.trained_digest(self._own_client)

    @property
    def _labels_stay(self) -> bool:
        return self.config.wire.labels == "client"

    @property
    def _head(self) -> Any:
        return self.server if self._labels_stay else None

    @property
    def _in_rounds(self) -> bool:
        return self.config.clients.schedule == "synchronous"

    @property
    def _own_client(self) -> Any:
        return self.client.client if isinstance(self.client, SharedClient) else self.client

    def _opened(self) -> Any:
        """The client at its base weights, its head too if it has one; the connection is told the model's classes."""
        client = self.runtime.open_client(self.config, self.folder)
        self.remote.classes = client.half.config.num_labels
        if self._labels_stay:
            head = self.runtime.open_head(self.config, self.folder, client, self.remote)
            head.meter = self.meters.client
            self.server = head
        return client

    def _catch_up(self, step: int) -> dict[str, Any]:
        """Follow the server's journal to its end; a restarted server's from the base weights on."""
        while True:
            client = self.client
            if not isinstance(client, SharedClient) or self.remote.restarted:
                self.client = NO_CLIENT_YET
                base = self._opened()
                self.client = client = SharedClient(base, self.remote, synchronous=self._in_rounds)
            self.done(step)
            try:
                client.catch_up()
            except StepMoved as restarted:
                step = restarted.step
            else:
                return {"metrics_bytes": None}

    def _check_task(self, checkpoint: Checkpoint, path: Path) -> None:
        before, now = checkpoint.state["task_digest"], self.facts["task"]["digest"]
        if before != now:
            raise CheckpointError(
                f"{path} was trained with other data: {self.task.name} had the digest {before[:12]}, now {now[:12]}; "
                "put the original files back, or choose another output_dir"
            )
