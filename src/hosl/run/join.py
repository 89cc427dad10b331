"""`hosl join`: a device trains its half with a server across a network. Torch comes only with the client's runtime.

The same steps, metrics and checkpoints as `hosl train`. Which state a run goes on from is the server's and the client's
to settle at every Hello: alone, the newest checkpoint that both have.
"""

import json
import secrets
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from hosl.checkpoint import Checkpoint, drop_checkpoints_after, read_checkpoint, write_checkpoint
from hosl.config import Config, dump_config
from hosl.core.parties import Batch
from hosl.core.rounds import RoundResult
from hosl.errors import AgreementError, CheckpointError, ConfigError, StepMoved
from hosl.methods.step import method_round
from hosl.parties.metered import Metered
from hosl.parties.remote_server import RemoteServer, WatchedServer
from hosl.parties.remote_trunk import RemoteTrunk
from hosl.parties.shared_client import SharedClient
from hosl.run.agreement import model_message, training_message
from hosl.run.allocator import return_freed_memory
from hosl.run.loop import carry_on
from hosl.run.record import RunLock, machine, new_folder, process_peak_bytes, versions
from hosl.run.session import Session
from hosl.run.trackers import check_trackers, feed_trackers
from hosl.split.folder_facts import half_facts
from hosl.tasks import Task, TextTokenizer, load_task, task_digest
from hosl.transport.channel import Patience, Proof, connect
from hosl.transport.join_line import JoinLine
from hosl.wire import hosl_pb2 as pb


@dataclass
class JoinedSession(Session):
    """A client half here, its server elsewhere."""

    remote: RemoteServer = field(kw_only=True)
    """The connection; `server` is what rounds talk to: this, or the head that we hold over it."""
    folder: Path = Path()
    """The client half's folder."""
    runtime: Any = None
    """The module that knows the client's runtime, such as `hosl.run.torch_device`."""
    snapshot_step: int = 0
    _incarnation: str = ""
    _wire_bytes: tuple[int, int] = (0, 0)

    def round(self, batch: Batch, step: int) -> RoundResult:
        """One step of the config's method; the server's costs are those that it reports."""
        self.meters.server = self.remote.meter
        client = Metered(self.client, self.meters.client)
        clients = self.config.clients
        own = clients.count > 1 and clients.directions == "own"
        name = f"client/{self.remote.client}" if own else "client"
        result = method_round(self.config, client, self.server, batch, step, half=name, control=self.control)
        self.control = self.control.after(result.coefficients)
        if clients.schedule == "synchronous" and clients.halves == "personal":
            for reply in self.remote.journal(step, 0, (), (), len(batch.input_ids)):
                if reply.late:
                    raise StepMoved(reply.step)
        return result

    def done(self, step: int) -> None:
        """The round of `step` is complete on both sides."""
        self.step = step
        self.remote.at(step)

    def measure_memory(self, *, on: bool) -> None:
        """Start or stop measuring the memory of the client's verbs; the server measures its own."""
        self.meters.client.memory = self.runtime.memory_meter(self._own_client) if on else None

    def client_bytes(self) -> float:
        """What this process has had resident at most."""
        return float(process_peak_bytes())

    def costs(self) -> dict[str, Any]:
        """Message bytes as the connection counted them, and what calls took beyond the server's compute."""
        now = self.remote.channel.bytes_up, self.remote.channel.bytes_down
        before, self._wire_bytes = self._wire_bytes, now
        wire_s, self.remote.wire_s = self.remote.wire_s, 0.0
        return {
            "wire_s": round(wire_s, 6),
            "wire_bytes_up": now[0] - before[0],
            "wire_bytes_down": now[1] - before[1],
        }

    def notes(self) -> dict[str, float]:
        """What compression does to the signal, in the steps in which it is measured."""
        return self.remote.notes() if isinstance(self.remote, WatchedServer) else {}

    def restorable(self, run: Path) -> list[int]:
        """The steps whose state this client can go to: its base weights and its checkpoints."""
        return [0, *sorted(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*"))]

    def save(self, run: Path, facts: dict[str, Any]) -> None:
        """The server writes its half, then this client its own; the checkpoint before stays until the next."""
        self.remote.save(self.step)
        if (run / "checkpoints" / f"step-{self.step:08d}").is_dir():
            return  # written before a kill that the server did not survive with us
        checkpoint = Checkpoint(step=self.step)
        # shared halves are rebuilt from the server's journal, whose steps are not this client's: no snapshots
        snapshots = sys.maxsize if isinstance(self.client, SharedClient) else self.config.snapshot_steps
        self.snapshot_step = self.runtime.put_client(
            checkpoint, self._own_client, snapshot_step=self.snapshot_step, snapshot_steps=snapshots
        )
        if self._labels_stay:
            self.runtime.put_head(checkpoint, self.server)
        checkpoint.state |= {
            "model_digest": self.facts["model"]["digest"],
            "task_digest": self.facts["task"]["digest"],
            "law": self.config.zo.law,
            **facts,
        }
        write_checkpoint(run / "checkpoints", checkpoint, keep=2)

    def go_to(self, run: Path, step: int) -> dict[str, Any] | None:
        """Take the state after `step`, because the server goes on from there."""
        if self.config.clients.halves == "shared":
            return self._catch_up(step)
        if (
            self.client is not None and step > self.step
        ):  # a round was closed without us: our half stays as it is
            self.done(step)
            return None
        self.client = None  # lets go of the old half before it is loaded again
        self.client, self.snapshot_step = self.runtime.open_client(self.config, self.folder), 0
        if self._labels_stay:
            self.server = self.runtime.open_head(self.config, self.folder, self.client, self.remote)
        facts: dict[str, Any] = {}
        if step:
            path = run / "checkpoints" / f"step-{step:08d}"
            checkpoint = read_checkpoint(path)
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
        """Shared halves: take what the others did since our last step. The digest is what they can be compared by."""
        if self.config.clients.halves == "shared":
            self.client.catch_up()
        self.facts["final_client_digest"] = self.runtime.trained_digest(self._own_client)

    @property
    def _labels_stay(self) -> bool:
        return self.config.wire.labels == "client"

    @property
    def _own_client(self) -> Any:
        return self.client.client if isinstance(self.client, SharedClient) else self.client

    def _catch_up(self, step: int) -> None:
        if self._incarnation != self.remote.incarnation:
            # a server that was restarted may have gone back: its journal is the truth, from the base weights on
            self.client = None
            base = self.runtime.open_client(self.config, self.folder)
            synchronous = self.config.clients.schedule == "synchronous"
            self.client = SharedClient(base, self.remote, synchronous=synchronous)
            self._incarnation = self.remote.incarnation
        self.done(step)
        self.client.catch_up()

    def _check_task(self, checkpoint: Checkpoint, path: Path) -> None:
        before, now = checkpoint.state["task_digest"], self.facts["task"]["digest"]
        if before != now:
            raise CheckpointError(
                f"{path} was trained with other data: {self.task.name} had the digest {before[:12]}, now {now[:12]}; "
                "put the original files back, or choose another output_dir"
            )


@dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """What `hosl join` is told beside the config."""

    half: Path
    """OUT/client of `hosl split`."""
    line: JoinLine
    proof: Proof = field(default_factory=Proof)


def join(config: Config, options: JoinOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Train this device's half with the server of the join line; returns the run's summary.

    The same command goes on with its own run when it was interrupted; a finished run is left alone and the next one is
    called -2, -3, ...

    Raises:
        ConfigError: if the config asks for what only `hosl train` has.
        AccessError, AgreementError, LinkError: if the server cannot be trusted, does not fit, or does not answer.
    """
    check_trackers(config)
    config = config.with_client_rate(config.client_rate)  # auto is refused here, before anything is made
    _check_served(config)
    return_freed_memory()
    facts = half_facts(options.half, "client")
    runtime: Any = import_module("hosl.run.torch_device")
    as_split = _cut_as_split(config, facts)
    runtime.check_before_data(as_split, str(options.half), head=facts["head"], alone=True)
    task = load_task(config.task, TextTokenizer.load(options.half), seed=config.seed)
    _check_fit(config, options, facts, task)
    runtime.check_before_run(as_split, str(options.half), task, alone=True)
    place = _run_folder(config)
    with RunLock(place.run):
        try:
            session, metrics_bytes = _joined(config, options, facts, task, place, say)
        except BaseException:
            if not (place.run / "metrics.jsonl").is_file():
                shutil.rmtree(place.run)  # refused before the first step: nothing half-made stays
            raise
        try:
            return carry_on(session, place.run, "the same command", _finish, metrics_bytes=metrics_bytes)
        finally:
            session.remote.close()


def _cut_as_split(config: Config, facts: dict[str, Any]) -> Config:
    """The config with the cut that the half has; the config's own is not asked on a device."""
    return msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, cut=facts["cut"]))


def _check_fit(config: Config, options: JoinOptions, facts: dict[str, Any], task: Task) -> None:
    if task.head != facts["head"]:
        raise AgreementError(
            f"task {task.name} needs a {task.head} head, the half in {options.half} was split with a {facts['head']} "
            f"one; split again with --head {task.head}"
        )
    if facts.get("labels", "server") != config.wire.labels:
        raise AgreementError(
            f"wire.labels is {config.wire.labels}, but {options.half} was split for labels at the "
            f"{facts.get('labels', 'server')}; split again with --labels-at {config.wire.labels}, or change the config"
        )


def _check_served(config: Config) -> None:
    """Refuse what a server across a network is never asked for."""
    if config.zo.fo_point == "mean-plus":
        raise ConfigError(
            "zo.fo_point: mean-plus asks the server for a step at several activations, which only `hosl train` has; "
            "use clean or first-plus"
        )
    if config.profile != "paper":
        raise ConfigError(
            f"profile {config.profile} asks the server for losses with dropout, which only `hosl train` has; use "
            "profile paper"
        )


def _joined(
    config: Config,
    options: JoinOptions,
    facts: dict[str, Any],
    task: Task,
    place: "_Place",
    say: Callable[[str], None],
) -> tuple[JoinedSession, int]:
    """Connect, greet, and bring the client to the state from which both go on; and where its metrics end then."""
    runtime: Any = import_module("hosl.run.torch_device")
    patience = Patience(connect_s=config.wire.connect_s, idle_s=config.wire.idle_s)
    channel = connect(options.line, patience=patience, proof=options.proof, known=place.known, say=say)

    def greeting(current: int) -> pb.HelloRequest:
        return pb.HelloRequest(
            protocol=1, run=place.identity, model=model_message(facts, config), training=training_message(config),
            restorable=session.restorable(place.run), current=current, version=versions()["hosl"],
        )  # fmt: skip

    kind = RemoteServer if config.wire.compression == "none" else WatchedServer
    if config.wire.labels == "client":
        kind = RemoteTrunk
    remote = kind(channel, greeting, runtime, compression=config.wire.compression, seed=config.seed, say=say)
    session = JoinedSession(
        config=config,
        task=task,
        client=None,
        server=remote,
        remote=remote,
        folder=options.half,
        runtime=runtime,
    )
    session.facts = {
        "model": {"source": str(options.half), "digest": facts["base_digest"], "family": facts["family"]},
        "task": {"name": task.name, "digest": task_digest(task)},
        "cut": facts["cut"],
    }
    try:
        known = session.go_to(place.run, channel.for_ever(remote.hello, say)) or {}
    except BaseException:
        remote.close()
        raise
    session.facts["trained_parameters"] = {"client": runtime.trained_elements(session.client)}
    record = {
        "run_id": place.identity, "versions": versions(), "machine": machine(), **session.facts,
    }  # fmt: skip
    (place.run / "record.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    return session, known.get("metrics_bytes", 0)


class _Place(NamedTuple):
    run: Path
    identity: str
    """The run's name on the server."""
    known: bool
    """Whether the run is under way."""


def _run_folder(config: Config) -> _Place:
    """This config's unfinished run, or a new one."""
    wanted, text = Path(config.output_dir), dump_config(config)
    for folder in sorted(wanted.parent.glob(f"{wanted.name}*")):
        if _unfinished(folder, text):
            identity = json.loads((folder / "record.json").read_text(encoding="utf-8"))["run_id"]
            return _Place(folder, identity, known=True)
    run = new_folder(wanted)
    name = (
        "".join(c if c.isalnum() or c in "._-" else "-" for c in run.name.lower()).strip("._-")[:40] or "run"
    )
    # alone, a run is its own on the server, whatever it is called; several clients find each other by the name
    identity = name if config.clients.count > 1 else f"{name}-{secrets.token_hex(4)}"
    (run / "record.json").write_text(json.dumps({"run_id": identity}), encoding="utf-8")
    (run / "config.yaml").write_text(text, encoding="utf-8")
    return _Place(run, identity, known=False)


def _unfinished(folder: Path, config_text: str) -> bool:
    files = folder / "config.yaml", folder / "record.json"
    if not all(file.is_file() for file in files) or files[0].read_text(encoding="utf-8") != config_text:
        return False
    return not (folder / "report.html").is_file()  # the last thing that a finished run writes


def _finish(session: JoinedSession, run: Path) -> None:
    from hosl.run.report import write_report

    write_report(run)
    feed_trackers(session.config, run)
