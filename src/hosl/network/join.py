"""`hosl join`: a device trains its half with a server across a network. An engine comes only with the client's runtime.

The same steps, metrics and checkpoints as `hosl train`. Server and client settle at every Hello from which state the
run goes on: with one client, from the newest checkpoint that both sides have.
"""

import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from os.path import expanduser, expandvars
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from hosl.config import (
    Config,
    ModelConfig,
    dump_config,
    load_begun_config,
    load_config,
    parse_config,
    with_absolute_paths,
)
from hosl.core.methods import USUAL_ON_ENGINE
from hosl.errors import ConfigError, FolderError, HandshakeError
from hosl.methods.schedule import with_steps
from hosl.network.half_transfer import give_finished
from hosl.network.handshake import model_message, protocol_of, training_message
from hosl.network.joined_session import NO_CLIENT_YET, JoinedSession
from hosl.network.runtime import RuntimeName, open_runtime, what_differs
from hosl.network.tensor_limit import check_tensor_limit
from hosl.parties.remote.noisy import KEY_FILE, kept_key
from hosl.parties.remote.server import RemoteServer, WatchedServer
from hosl.parties.remote.trunk import RemoteTrunk
from hosl.split.reading.half_json import half_facts
from hosl.split.reading.weight_files import checkpoint_digest
from hosl.system.allocator import return_freed_memory
from hosl.system.machine import machine, versions
from hosl.system.model_limits import model_limits
from hosl.system.run_folder import (
    RunLock,
    is_tested,
    new_folder,
    read_record,
    same_name_folders,
    write_record,
)
from hosl.tasks import Task, TextTokenizer, labels_digest, load_task, model_labels, task_digest
from hosl.training.crossing import what_crosses
from hosl.training.loop import carry_on
from hosl.training.summary import files_summary
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
    give_half: bool = False
    """Whether the server gets this device's half at the end."""
    may_go_back: bool = False
    """Whether the first Hello may undo work of one side that the other has lost."""
    runtime: RuntimeName | None = None
    """The runtime of this device's half; None: see `open_runtime`."""
    method_named: bool = True
    """Whether the config's method was named by a person; else it is the usual one, which the runtime may not have."""


def join(config: Config, options: JoinOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Train this device's half with the server of the join line; returns the run's summary.

    An unfinished run of the same settings is resumed; of a finished one the summary is returned, without a server.

    Args:
        config: the settings of the run.
        options: the half, and the way to the server.
        say: is called with one line of text for a person at a time.

    Raises:
        ConfigError: if a setting exists for `hosl train` only.
        AccessError, HandshakeError, LinkError: if the server cannot be trusted, does not fit, or does not reply.
    """
    check_trackers(config)
    if not options.method_named:
        config = _with_usual_method(config, options, say)
    config = with_absolute_paths(
        config.with_client_rate(config.client_rate)
    )  # auto is refused here, before anything is made
    _check_served(config)
    return_freed_memory()
    facts = half_facts(options.half, "client")
    runtime = open_runtime(options.runtime, options.half, _begun_record(config))
    _check_model(config, options, facts, say)
    runtime.check_device(config.client.device, "client.device")
    as_split = _cut_as_split(config, facts)
    runtime.check_before_data(as_split, str(options.half), head=facts["head"], alone=True)
    if remark := runtime.remark(options.half):
        say(remark)
    tokenizer, names = TextTokenizer.load(options.half), model_labels(options.half)
    task = load_task(config.task, tokenizer, seed=config.seed, model_labels=names)
    config = with_steps(config, task)
    _check_fit(config, options, facts, task)
    runtime.check_before_run(as_split, str(options.half), task, alone=True)
    run = _joined_run(config, say)
    if run.finished:
        say(f"{run.folder} is finished; choose another output_dir for a new run")
        summary = files_summary(config, run.folder, finished=True)
        if summary["train_loss_nats"] is None:
            say(f"{run.folder}/metrics.jsonl has lost its lines: losses and bytes of the steps are not known")
        if options.give_half:
            _give(config, options, run.folder, say)
        return summary
    with RunLock(run.folder):
        try:
            session, metrics_bytes = _joined(config, options, facts, task, run, runtime, say)
        except BaseException:
            _clear(run.folder)
            raise
        try:
            summary = carry_on(session, run.folder, "the same command", _finish, metrics_bytes=metrics_bytes)
        finally:
            session.remote.close()
        if options.give_half and summary["finished"]:
            _give(config, options, run.folder, say)
        return summary


def _with_usual_method(config: Config, options: JoinOptions, say: Callable[[str], None]) -> Config:
    """The config with the method that is usual on this device's runtime."""
    there = parse_config(msgspec.to_builtins(config) | {"method": USUAL_ON_ENGINE}, where="with its method")
    if open_runtime(options.runtime, options.half, _begun_record(there)).NAME != "onnx":
        return config
    say(
        f"no method is named: {USUAL_ON_ENGINE}, exact gradients block by block, is the usual one on ONNX Runtime"
    )
    return there


def _give(config: Config, options: JoinOptions, run: Path, say: Callable[[str], None]) -> None:
    """Give the half of a finished run to the server."""
    patience = Patience(connect_s=config.wire.connect_s, idle_s=config.wire.idle_s)
    channel = connect(options.line, patience=patience, proof=options.proof, known=False, say=say)
    try:
        give_finished(config, run, read_record(run) or {}, channel, say)
    finally:
        channel.close()


def _cut_as_split(config: Config, facts: dict[str, Any]) -> Config:
    """The config with the cut of the half; a device ignores model.cut."""
    return msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, cut=facts["cut"]))


def _check_model(
    config: Config, options: JoinOptions, facts: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Refuse a config for another model or cut than the half's. Defaults are nobody's choice, so they are not compared.

    A name is compared by the digest of its weights, where it is a folder of this device.
    """
    name, cut, default = config.model.name, config.model.cut, ModelConfig()
    if cut not in (facts["cut"], default.cut):
        raise HandshakeError(
            f"model.cut is {cut}, but {options.half} was cut at {facts['cut']}; split again with --cut {cut}, or set "
            f"model.cut: {facts['cut']}"
        )
    if cut != facts["cut"]:
        say(f"{options.half} was cut at {facts['cut']}; model.cut is not read")
    folder = Path(expanduser(expandvars(name)))
    if name == default.name or not folder.is_dir() or (folder / "half.json").is_file():
        return
    digest = checkpoint_digest(folder, name)
    if digest != facts["base_digest"]:
        raise HandshakeError(
            f"model.name is {name}, whose weights have the digest {digest[:12]}, but {options.half} is of a "
            f"{facts['family']} with {facts['base_digest'][:12]}; split the model again, or change model.name"
        )


def _check_fit(config: Config, options: JoinOptions, facts: dict[str, Any], task: Task) -> None:
    if task.head != facts["head"]:
        raise HandshakeError(
            f"task {task.name} needs a {task.head} head, the half in {options.half} was split with a {facts['head']} "
            f"one; split again with --head {task.head}"
        )
    classes = facts.get("classes", len(task.labels))
    if task.head == "classification" and classes != len(task.labels):
        raise HandshakeError(
            f"task {task.name} has {len(task.labels)} classes, the half in {options.half} was split for {classes}; "
            f"split again with --labels {len(task.labels)}"
        )
    if facts.get("labels", "server") != config.wire.labels:
        raise HandshakeError(
            f"wire.labels is {config.wire.labels}, but {options.half} was split for labels at the "
            f"{facts.get('labels', 'server')}; split again with --labels-at {config.wire.labels}, or change the config"
        )
    if config.wire.labels == "client" and config.clients.halves == "shared" and facts.get("new_weights"):
        raise HandshakeError(
            "clients.halves: shared leaves the head as the model has it where the labels stay with the client, but "
            f"{facts['new_weights'][0]} of {options.half} is new and was drawn at random; use wire.labels: server, "
            "clients.halves: personal, or a model whose head was trained"
        )


def _check_served(config: Config) -> None:
    """Refuse settings that need a server in the same process."""
    if config.save_best:
        raise ConfigError("save_best keeps both halves, which only `hosl train` has; leave it out")
    if getattr(config.task, "metric", None) is not None:
        raise ConfigError(
            f"task.metric: {config.task.metric} judges answers, which `hosl train` has at its end; leave it out, and "  # pyright: ignore[reportAttributeAccessIssue]
            "after the run let `hosl predict RUN ROWS -o OUT.jsonl --to LINE` write answers and references to judge"
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
    run: "_JoinedRun",
    runtime: Any,
    say: Callable[[str], None],
) -> tuple[JoinedSession, int | None]:
    """Connect, greet, and bring the client to the state from which both sides go on.

    Returns the session, and the bytes of metrics.jsonl that belong to this state; None: every line up to its step.
    """
    record = read_record(run.folder) or {}
    if differs := what_differs(record, runtime):
        say(differs)
    patience = Patience(connect_s=config.wire.connect_s, idle_s=config.wire.idle_s)
    channel = connect(options.line, patience=patience, proof=options.proof, known=run.under_way, say=say)

    @cache  # a Hello is sent again while the link fails
    def say_once(text: str) -> None:
        say(text)

    def greeting(current: int) -> pb.HelloRequest:
        return pb.HelloRequest(
            protocol=protocol_of(config), run=run.identity, model=model_message(facts, config),
            training=training_message(config, labels_digest(task.labels)),
            restorable=session.restorable(run.folder, say_once), current=current, version=versions()["hosl"],
            may_go_back=options.may_go_back and session.client is NO_CLIENT_YET,
        )  # fmt: skip

    kind = RemoteServer if config.wire.compression == "none" else WatchedServer
    if config.wire.labels == "client":
        kind = RemoteTrunk
    remote = kind(channel, greeting, runtime, compression=config.wire.compression, seed=config.seed, say=say)
    session = JoinedSession(
        config=config, task=task, client=NO_CLIENT_YET, server=remote, remote=remote, folder=options.half,
        runtime=runtime, noise_key=kept_key(run.folder) if config.wire.clip_norm is not None else b"",
    )  # fmt: skip
    session.facts = _facts(config, options, facts, task)
    try:
        start = channel.for_ever(remote.hello, say)
        width = model_limits(options.half).width
        if width is not None:
            check_tensor_limit(config, task, width=width, limit_bytes=remote.tensor_bytes)
        checkpoint_facts = session.go_to(run.folder, start) or {}
    except BaseException:
        remote.close()
        raise
    session.facts["trained_parameters"] = {"client": runtime.trained_elements(session.client)}
    if config.wire.labels == "client":
        session.facts["trained_parameters"]["head"] = runtime.head_elements(session.server)
    of_runtime = {"runtime": {"name": runtime.NAME, "engine": runtime.engine()}}
    facts_now = {"versions": versions(), "machine": machine(), **of_runtime, **session.facts}
    write_record(run.folder, record | facts_now)
    return session, None if checkpoint_facts is None else checkpoint_facts.get("metrics_bytes", 0)


def _facts(config: Config, options: JoinOptions, half: dict[str, Any], task: Task) -> dict[str, Any]:
    """The facts of the run for its record."""
    labels = list(task.labels)
    return {
        "model": {
            "source": str(options.half.absolute()), "digest": half["base_digest"], "family": half["family"],
        },
        "task": {"name": task.name, "digest": task_digest(task), "head": task.head, "labels": labels},
        "cut": half["cut"],
        "crosses": what_crosses(config, task.head),
    }  # fmt: skip


class _JoinedRun(NamedTuple):
    folder: Path
    identity: str
    """The run's name on the server."""
    under_way: bool
    """Whether the run was started by an earlier command."""
    finished: bool


def _joined_run(config: Config, say: Callable[[str], None]) -> _JoinedRun:
    """This config's run, finished or not, or a new one.

    Raises:
        FolderError: if its record.json is damaged.
        ConfigError: if its config.yaml is, or is not the one that it was begun with.
    """
    wanted, found = Path(config.output_dir), []
    for folder in same_name_folders(wanted):
        if not (folder / "record.json").is_file():
            continue
        if _settings(folder) != _identity(config):
            _check_not_damaged(folder, config)
            continue
        record = read_record(folder)
        if record is None:
            raise FolderError(
                f"{folder}/record.json is damaged, and the run's name on the server was in it; put it back, or choose "
                "another output_dir for a new run"
            )
        if "run_id" in record:  # one of `hosl train` has none
            finished = _finished(folder, record)
            found.append(_JoinedRun(folder, record["run_id"], under_way=True, finished=finished))
    if found:
        return min(found, key=lambda run: run.finished)  # the first that is not finished, else the first
    folder = new_folder(wanted, dump_config(config), say)
    allowed = "".join(c if c.isalnum() or c in "._-" else "-" for c in folder.name.lower())
    name = allowed.strip("._-")[:40] or "run"
    # several clients find each other by the name; the run of a single client must not meet another run of its name
    identity = name if config.clients.count > 1 else f"{name}-{secrets.token_hex(4)}"
    write_record(folder, {"run_id": identity, "config": msgspec.to_builtins(config)})
    return _JoinedRun(folder, identity, under_way=False, finished=False)


def begun_run(config: Config) -> Path | None:
    """The folder of this config's run, one that is not finished before others; None: there is none."""
    config = with_absolute_paths(config.with_client_rate(config.client_rate))
    found = []
    for folder in same_name_folders(Path(config.output_dir)):
        kept, record = _settings(folder), read_record(folder) or {}
        if kept is None or "run_id" not in record:
            continue
        steps = config.max_steps if config.num_train_epochs is None else kept.max_steps
        if kept == _identity(msgspec.structs.replace(config, max_steps=steps)):
            found.append((_finished(folder, record), len(found), folder))
    return min(found)[-1] if found else None


def _begun_record(config: Config) -> dict[str, Any]:
    """The record of `begun_run`; empty: there is none."""
    begun = begun_run(config)
    return {} if begun is None else read_record(begun) or {}


def _settings(folder: Path) -> Config | None:
    """The settings by which the run in a folder is known; None: there is no run, or one of another version."""
    try:
        return _identity(load_config(folder / "config.yaml", warn=False))
    except ConfigError:
        return None


def _check_not_damaged(folder: Path, config: Config) -> None:
    """Refuse a damaged config.yaml of a run that was begun with `config`: another run would begin beside it."""
    record = read_record(folder) or {}
    try:
        kept = parse_config(record.get("config"), where=f"{folder}/record.json", warn=False)
    except ConfigError:  # none is kept, or one of another version
        return
    if "run_id" in record and _identity(kept) == _identity(config):
        load_begun_config(folder / "config.yaml", record, warn=False)


def _identity(config: Config) -> Config:
    """A config without what may change between two commands of one run: the way to its folder, and patience."""
    wire = msgspec.structs.replace(config.wire, connect_s=1.0, idle_s=1.0)
    name = Path(config.output_dir).name  # a run that was given the name NAME-2 is no second run of NAME
    return msgspec.structs.replace(with_absolute_paths(config), output_dir=name, report_to=(), wire=wire)


def _finished(folder: Path, record: dict[str, Any]) -> bool:
    """Whether a run is; in version 0.1 its page was the mark of that."""
    return record.get("finished", False) or ((folder / "report.html").is_file() and is_tested(folder))


def _clear(folder: Path) -> None:
    """Remove what a run that was refused before its first step has made, and nothing else."""
    if not any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        for name in ("record.json", "config.yaml", ".lock", KEY_FILE):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # a person's own hidden files
            folder.rmdir()


def _finish(session: JoinedSession, run: Path) -> None:
    from hosl.report.build import write_report

    write_report(run)
    feed_trackers(session.config, run)
    write_record(
        run,
        (read_record(run) or {})
        | {"finished": True, "client_digest": session.facts["final_client_digest"]}
        | {name: session.facts[name] for name in ("journal_updates",) if name in session.facts},
    )
