"""`hosl join`: a device trains its half with a server across a network. Torch comes only with the client's runtime.

The same steps, metrics and checkpoints as `hosl train`. Server and client settle at every Hello from which state the
run goes on: with one client, from the newest checkpoint that both sides have.
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
from hosl.network.joined_session import NO_CLIENT_YET, JoinedSession
from hosl.parties.remote.server import RemoteServer, WatchedServer
from hosl.parties.remote.trunk import RemoteTrunk
from hosl.split.folder_facts import half_facts
from hosl.system.allocator import return_freed_memory
from hosl.system.atomic import whole_file
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
    """The arguments of `hosl join` beside the config."""

    half: Path
    """The folder of the client half: OUT/client of `hosl split`."""
    line: JoinLine
    proof: Proof = field(default_factory=Proof)
    """The certificates that each side shows the other."""
    may_go_back: bool = False
    """Whether the first Hello may undo work of one side that the other has lost."""


def join(config: Config, options: JoinOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Train this device's half with the server of the join line; returns the run's summary.

    An unfinished run of the same config is resumed. A finished run stays as it is: the folder of the next one ends in
    -2, -3, ...

    Args:
        config: the settings of the run.
        options: the half, and the way to the server.
        say: is called with one line of text for a person at a time.

    Raises:
        ConfigError: if a setting exists for `hosl train` only.
        AccessError, HandshakeError, LinkError: if the server cannot be trusted, does not fit, or does not reply.
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
    run = _joined_run(config)
    with RunLock(run.folder):
        try:
            session, metrics_bytes = _joined(config, options, facts, task, run, say)
        except BaseException:
            if not (run.folder / "metrics.jsonl").is_file():
                shutil.rmtree(run.folder)  # refused before the first step: nothing half-made stays
            raise
        try:
            return carry_on(session, run.folder, "the same command", _finish, metrics_bytes=metrics_bytes)
        finally:
            session.remote.close()


def _cut_as_split(config: Config, facts: dict[str, Any]) -> Config:
    """The config with the cut of the half; a device ignores model.cut."""
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
    """Refuse settings that need a server in the same process."""
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
    run: "_JoinedRun",
    say: Callable[[str], None],
) -> tuple[JoinedSession, int | None]:
    """Connect, greet, and bring the client to the state from which both sides go on.

    Returns the session, and the bytes of metrics.jsonl that belong to this state; None: its lines up to this step.
    """
    runtime: Any = import_module("hosl.network.torch_runtime")
    patience = Patience(connect_s=config.wire.connect_s, idle_s=config.wire.idle_s)
    channel = connect(options.line, patience=patience, proof=options.proof, known=run.under_way, say=say)

    def greeting(current: int) -> pb.HelloRequest:
        return pb.HelloRequest(
            protocol=1, run=run.identity, model=model_message(facts, config), training=training_message(config),
            restorable=session.restorable(run.folder), current=current, version=versions()["hosl"],
            may_go_back=options.may_go_back and session.client is NO_CLIENT_YET,
        )  # fmt: skip

    kind = RemoteServer if config.wire.compression == "none" else WatchedServer
    if config.wire.labels == "client":
        kind = RemoteTrunk
    remote = kind(channel, greeting, runtime, compression=config.wire.compression, seed=config.seed, say=say)
    session = JoinedSession(
        config=config, task=task, client=NO_CLIENT_YET, server=remote, remote=remote, folder=options.half,
        runtime=runtime,
    )  # fmt: skip
    session.facts = {
        "model": {"source": str(options.half), "digest": facts["base_digest"], "family": facts["family"]},
        "task": {"name": task.name, "digest": task_digest(task)},
        "cut": facts["cut"],
    }
    try:
        checkpoint_facts = session.go_to(run.folder, channel.for_ever(remote.hello, say)) or {}
    except BaseException:
        remote.close()
        raise
    session.facts["trained_parameters"] = {"client": runtime.trained_elements(session.client)}
    record = {"run_id": run.identity, "versions": versions(), "machine": machine(), **session.facts}
    (run.folder / "record.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    return session, checkpoint_facts.get("metrics_bytes", 0)


class _JoinedRun(NamedTuple):
    folder: Path
    identity: str
    """The run's name on the server."""
    under_way: bool
    """Whether the run was started by an earlier command."""


def _joined_run(config: Config) -> _JoinedRun:
    """This config's unfinished run, or a new one."""
    wanted, text = Path(config.output_dir), dump_config(config)
    for folder in sorted(wanted.parent.glob(f"{wanted.name}*")):
        if _unfinished(folder, text):
            identity = json.loads((folder / "record.json").read_text(encoding="utf-8"))["run_id"]
            return _JoinedRun(folder, identity, under_way=True)
    folder = new_folder(wanted)
    allowed = "".join(c if c.isalnum() or c in "._-" else "-" for c in folder.name.lower())
    name = allowed.strip("._-")[:40] or "run"
    # several clients find each other by the name; the run of a single client must not meet another run of its name
    identity = name if config.clients.count > 1 else f"{name}-{secrets.token_hex(4)}"
    (folder / "record.json").write_text(json.dumps({"run_id": identity}), encoding="utf-8")
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    return _JoinedRun(folder, identity, under_way=False)


def _unfinished(folder: Path, config_text: str) -> bool:
    files = folder / "config.yaml", folder / "record.json"
    if not all(file.is_file() for file in files) or files[0].read_text(encoding="utf-8") != config_text:
        return False
    finished = json.loads(files[1].read_text(encoding="utf-8")).get("finished", False)
    return not finished and not (folder / "report.html").is_file()  # the page is the mark of version 0.1


def _finish(session: JoinedSession, run: Path) -> None:
    from hosl.report.build import write_report

    write_report(run)
    feed_trackers(session.config, run)
    record = json.loads((run / "record.json").read_text(encoding="utf-8"))
    whole_file(run / "record.json", json.dumps(record | {"finished": True}, indent=2).encode())
