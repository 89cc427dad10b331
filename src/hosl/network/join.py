"""`hosl join`: a device trains its half with a server across a network. Torch comes only with the client's runtime.

The same steps, metrics and checkpoints as `hosl train`. Which state a run goes on from is the server's and the client's
to settle at every Hello: alone, the newest checkpoint that both have.
"""

import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from hosl.config import Config, dump_config
from hosl.errors import ConfigError, HandshakeError
from hosl.network.handshake import model_message, training_message
from hosl.network.joined_session import JoinedSession
from hosl.parties.remote.server import RemoteServer, WatchedServer
from hosl.parties.remote.trunk import RemoteTrunk
from hosl.split.folder_facts import half_facts
from hosl.system.allocator import return_freed_memory
from hosl.system.machine import machine, versions
from hosl.system.run_folder import RunLock, new_folder
from hosl.tasks import Task, TextTokenizer, load_task, task_digest
from hosl.training.loop import carry_on
from hosl.training.trackers import check_trackers, feed_trackers
from hosl.transport.channel import Patience, Proof, connect
from hosl.transport.join_line import JoinLine
from hosl.wire import hosl_pb2 as pb


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
        AccessError, HandshakeError, LinkError: if the server cannot be trusted, does not fit, or does not answer.
    """
    check_trackers(config)
    config = config.with_client_rate(config.client_rate)  # auto is refused here, before anything is made
    _check_served(config)
    return_freed_memory()
    facts = half_facts(options.half, "client")
    runtime: Any = import_module("hosl.network.torch_runtime")
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
        raise HandshakeError(
            f"task {task.name} needs a {task.head} head, the half in {options.half} was split with a {facts['head']} "
            f"one; split again with --head {task.head}"
        )
    if facts.get("labels", "server") != config.wire.labels:
        raise HandshakeError(
            f"wire.labels is {config.wire.labels}, but {options.half} was split for labels at the "
            f"{facts.get('labels', 'server')}; split again with --labels-at {config.wire.labels}, or change the config"
        )


def _check_served(config: Config) -> None:
    """Refuse what a server across a network is never asked for."""
    if config.zo.server_gradient_at == "mean-plus":
        raise ConfigError(
            "zo.server_gradient_at: mean-plus asks the server for a step at several activations, which only "
            "`hosl train` has; use clean or first-plus"
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
    runtime: Any = import_module("hosl.network.torch_runtime")
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
    from hosl.report.build import write_report

    write_report(run)
    feed_trackers(session.config, run)
