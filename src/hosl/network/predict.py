"""Prediction across the split: this device's half and the rows here, the rest of the model with a server. No torch.

The server is asked for scores as the evaluations of a run ask; its session only looks. What leaves the device: the
hidden states at the cut of every row, its mask, and of prompts the tokens of all options (or, labels at the client,
where they stand). Labels that the rows may have do not.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosl.config import Config
from hosl.core.protocols import ServerSide
from hosl.errors import ConfigError, HandshakeError
from hosl.inference.new_rows import check_has_labels
from hosl.inference.predicting import Scorer, known_labels
from hosl.network.generate import joined_place, newest_here
from hosl.network.handshake import model_message
from hosl.network.join import begun_run
from hosl.network.runtime import RuntimeName, open_runtime
from hosl.parties.remote.noisy import KEY_BYTES
from hosl.parties.remote.server import RemoteServer
from hosl.parties.remote.trunk import RemoteTrunk
from hosl.split.reading.half_json import half_facts
from hosl.system.allocator import return_freed_memory
from hosl.system.checkpoint import Checkpoint
from hosl.system.machine import versions
from hosl.system.run_folder import read_record
from hosl.tasks import PromptsConfig, TextTokenizer
from hosl.training.crossing import behind_noise
from hosl.transport.channel import Patience, Proof, connect
from hosl.transport.join_line import JoinLine
from hosl.wire import hosl_pb2 as pb
from hosl.wire.protocol import PROTOCOL


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """The arguments of `hosl predict --to`."""

    path: Path
    """The folder of a run that `hosl join` made, or of a client half."""
    line: JoinLine
    proof: Proof = field(default_factory=Proof)
    runtime: RuntimeName | None = None
    """The runtime of this device's half; None: see `open_runtime`."""


@dataclass(frozen=True)
class _Half:
    """What this device holds of the model."""

    config: Config
    folder: Path
    """The folder of the client half."""
    runtime: Any
    """The module of the runtime that computes it."""
    run: str
    """The run's name on the server; empty: both halves are as they were split."""
    labels: list[str] | None
    checkpoint: Checkpoint | None
    says: str


@contextmanager
def scorer_across(
    options: PredictOptions, config: Config | None, say: Callable[[str], None]
) -> Iterator[Scorer]:
    """The scorer of a client half and a server, connected for as long as the context.

    Args:
        options: the half, and the way to the server.
        config: the settings of a half's run; None: the path is a run, which has its own.
        say: is called with a line of text about failures.

    Raises:
        ConfigError: if the config is missing, or one too many, or of shared halves.
        FolderError: if there is neither a half nor a run.
        HandshakeError: if the two halves do not fit, or are of different steps.
        LinkError, AccessError: if the server cannot be reached or trusted.
    """
    return_freed_memory()
    here = _half_here(options, config)
    facts, runtime = half_facts(here.folder, "client"), here.runtime
    _check(here, facts)
    runtime.check_device(here.config.client.device, "client.device")
    tokenizer = TextTokenizer.load(here.folder)
    labels = here.labels or known_labels(here.config, tokenizer, here.folder)
    if remark := runtime.remark(here.folder):
        say(remark)
    client = runtime.open_client(here.config, here.folder)
    if here.checkpoint is not None:
        runtime.restore_client_(client, here.checkpoint)
    wire = here.config.wire
    patience = Patience(connect_s=wire.connect_s, idle_s=wire.idle_s)
    channel = connect(options.line, patience=patience, proof=options.proof, known=False, say=say)

    def greeting(current: int) -> pb.HelloRequest:
        return pb.HelloRequest(
            protocol=PROTOCOL, run=here.run, model=model_message(facts, here.config), current=current, look=True,
            version=versions()["hosl"],
        )  # fmt: skip

    kind = RemoteTrunk if wire.labels == "client" else RemoteServer
    remote = kind(channel, greeting, runtime, compression=wire.compression, seed=here.config.seed, say=say)
    try:
        start = channel.for_ever(remote.hello, say)
        _check_step(here, start)
        remote.at(start)
        remote.classes = client.half.config.num_labels
        server: ServerSide = remote
        if isinstance(remote, RemoteTrunk):
            server = runtime.open_head(here.config, here.folder, client, remote)
            if here.checkpoint is not None:
                runtime.restore_head_(server, here.checkpoint)
        whose = f"run {here.run} after step {start}" if here.run else "as it was split"
        key = secrets.token_bytes(KEY_BYTES)  # nothing is repeated here: each prediction has its own
        server = behind_noise(here.config, server, runtime, key, "predict")
        yield Scorer(
            here.config, labels, tokenizer, client, server, f"{here.says}; the server's half: {whose}"
        )
    finally:
        remote.close()


def _half_here(options: PredictOptions, config: Config | None) -> _Half:
    """The half of a run, or one as it was split if its config has no run yet."""
    run = path = options.path
    if (path / "half.json").is_file():
        if config is None:
            raise ConfigError(
                f"{path} is a half, whose task is not known; say it by --config, as for `hosl join`"
            )
        begun = begun_run(config)
        if begun is None:
            says = f"this half: as it was split, since {config.output_dir} holds no run of this config"
            return _Half(config, path, open_runtime(options.runtime, path, {}), "", None, None, says)
        run = begun
    elif config is not None:
        raise ConfigError(f"{path} is a run and has its own config; leave --config out")
    of_run, folder, name = joined_place(run)
    assert of_run is not None, "a run has a config"
    record = read_record(run) or {}
    runtime = open_runtime(options.runtime, folder, record)
    checkpoint, labels = newest_here(run, runtime), record.get("task", {}).get("labels")
    says = f"this half: {run} after step {0 if checkpoint is None else checkpoint.step}"
    return _Half(of_run, folder, runtime, name, labels, checkpoint, says)


def _check(here: _Half, facts: dict[str, Any]) -> None:
    """Refuse a half that is not one for the task, and halves whose weights only the server's journal has."""
    check_has_labels(here.config.task)
    head = "causal" if isinstance(here.config.task, PromptsConfig) else "classification"
    if facts["head"] != head:
        raise HandshakeError(
            f"the task of this config needs a {head} head, {here.folder} was split with a {facts['head']} one; split "
            f"again with --head {head}"
        )
    if facts.get("labels", "server") != here.config.wire.labels:
        raise HandshakeError(
            f"wire.labels is {here.config.wire.labels}, but {here.folder} was split for labels at the "
            f"{facts.get('labels', 'server')}; change the config"
        )
    if here.config.clients.halves == "shared" and here.run:
        raise ConfigError(
            "clients.halves: shared: this device's checkpoint lacks what other devices did after it, so `hosl predict` "
            "has no half to use; let `hosl merge` write the model of all devices, or use personal halves"
        )


def _check_step(here: _Half, start: int) -> None:
    """Refuse halves of different steps where one device trains the run: no training ever had such a model."""
    mine = 0 if here.checkpoint is None else here.checkpoint.step
    if here.run and here.config.clients.alone and mine != start:
        raise HandshakeError(
            f"this device's half is after step {mine}, the server's after step {start}: the run is under way, or was "
            "broken off; go on with it by `hosl join` to its end, then predict"
        )
