"""A run in one process: from a config, or from a run's folder, to two parties that are ready for their next step."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec

from hosl.config import Config, load_begun_config
from hosl.core.protocols import ServerSide
from hosl.errors import CheckpointError, ConfigError, FolderError
from hosl.methods.schedule import longest_batch, with_steps
from hosl.methods.torch_parties import (
    DTYPES,
    check_device,
    head_elements,
    make_client,
    make_head,
    make_server,
    party_bytes,
    trained_elements,
)
from hosl.parties.clients.frozen import FrozenClient
from hosl.parties.engine.memory import memory_of
from hosl.parties.metered import metered
from hosl.parties.remote import torch_wire
from hosl.parties.remote.compression import Receiving, WatchedCompressedServer
from hosl.parties.remote.local_trunk import LocalTrunk
from hosl.parties.remote.noisy import simulated_key
from hosl.parties.servers.basic import TorchServer
from hosl.parties.servers.headed import HeadedServer
from hosl.parties.servers.trunk import TrunkServer
from hosl.planner.budget import check_before_data, check_before_run
from hosl.planner.runtime_base import RUNTIME_BASE_BYTES
from hosl.split import (
    ClientHalf,
    ServerHalf,
    joined_server_half,
    load_model,
    resolve_model_folder,
    split_model,
    split_u_shape,
)
from hosl.split.families import Head
from hosl.split.reading.loading import LoadedModel
from hosl.split.reading.tokenizer import transformers_tokenizer
from hosl.system.checkpoint import (
    Checkpoint,
    checkpoint_path,
    drop_checkpoints_after,
    keep_newest,
    newest_intact,
    write_checkpoint,
)
from hosl.system.run_folder import is_tested, read_record
from hosl.tasks import TextTokenizer, load_task, model_labels, task_digest
from hosl.training.checkpointing import (
    put_client,
    put_head,
    put_server,
    restore_client_,
    restore_head_,
    restore_server_,
)
from hosl.training.crossing import behind_noise, what_crosses
from hosl.training.session import Session


@dataclass
class LocalSession(Session[FrozenClient, Any]):
    """The session of a run in one process; `server` is a `TorchServer`, or below the client's head a `TrunkServer`."""

    head: HeadedServer | None = None
    """The head on the client, which calls the server, where the labels stay with the client."""
    tokenizer_folder: Path = Path()
    snapshot_step: int = 0
    """The step of the newest snapshot of a zeroth-order client; 0 is the base weights."""
    metrics_bytes: int = 0
    """The bytes of metrics.jsonl that belong to the state that was loaded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._wire = None
        if self.head is not None:
            self.head.meter, self._trunk.meter = self.meters.client, self.meters.server
        elif self.config.wire.compression != "none":
            self._wire = WatchedCompressedServer(
                metered(self._receiving, self.meters.server), torch_wire,
                compression=self.config.wire.compression, seed=self.config.seed,
            )  # fmt: skip

    @property
    def _receiving(self) -> Receiving:
        return Receiving(self.server, torch_wire)

    def server_to_call(self, *, in_round: bool) -> ServerSide:
        """The server that the client calls under its meter; behind the wire's noise and compression, if it has them."""
        server = self._metered_server(in_round=in_round)
        place = f"{self.step}/{'round' if in_round else 'evaluation'}"
        return behind_noise(
            self.config, server, torch_wire, simulated_key(self.config.seed), place, self.meters.client
        )

    def _metered_server(self, *, in_round: bool) -> ServerSide:
        if self.head is not None:
            return self.head
        if self._wire is None:
            return super().server_to_call(in_round=in_round)
        if not in_round:
            return self._wire.at_rest()
        self._wire.at(self.step)
        return self._wire

    def notes(self) -> dict[str, float]:
        """The effect of compression on the signal, in the steps in which it is measured."""
        return {} if self._wire is None else self._wire.notes()

    @property
    def client_half(self) -> ClientHalf:
        """The client's half of the model."""
        return self.client.half

    @property
    def _trunk(self) -> LocalTrunk:
        assert self.head is not None, "labels stay with the client"
        return cast(LocalTrunk, self.head.trunk)

    def done(self, step: int) -> None:
        """Note that the round of `step` is complete."""
        super().done(step)
        if self.head is not None:
            self._trunk.at(step)

    @property
    def server_half(self) -> ServerHalf:
        """What follows the cut: the server's half of the model; where the labels stay, its trunk and the head."""
        return whole_server_half(self.server, self.head)

    @property
    def class_labels(self) -> Sequence[str] | None:
        """The names of the classes of a classification head; None: the head is another."""
        return self.task.labels if self.task.head == "classification" else None

    def measure_memory(self, *, on: bool) -> None:
        """Start or stop measuring the memory of the parties' calls."""
        parties = (
            (self.meters.client, self.client, self.server, self.head),
            (self.meters.server, self.server, self.client, None),
        )
        for meter, party, other, head in parties:
            beside = party_bytes(other) if on and other.device == party.device else 0
            meter.memory = memory_of(party, party_bytes(party, head), beside=beside) if on else None

    def client_bytes(self) -> float:
        """The bytes of the client in a process of its own: the peak of its tensors, and Python with torch."""
        return RUNTIME_BASE_BYTES + self.meters.client.peak_bytes

    def save(self, run: Path, facts: dict[str, Any]) -> None:
        """Write both halves at the session's step, as one checkpoint."""
        checkpoint = Checkpoint(step=self.step)
        optimiser = self.config.save_optimiser or self.step < self.config.max_steps
        if not optimiser:
            checkpoint.state["optimiser"] = False
        put_server(checkpoint, self.server, optimiser=optimiser)
        if self.head is not None:
            put_head(checkpoint, self.head, optimiser=optimiser)
        self.snapshot_step = put_client(
            checkpoint,
            self.client,
            snapshot_step=self.snapshot_step,
            snapshot_steps=self.config.snapshot_steps,
            optimiser=optimiser,
        )
        checkpoint.state |= self.inputs() | facts
        write_checkpoint(run / "checkpoints", checkpoint)

    def save_best(self, run: Path) -> None:
        """Keep the weights of the present state as the only checkpoint of `run`/best."""
        checkpoint = Checkpoint(step=self.step, state=self.inputs() | {"optimiser": False})
        put_server(checkpoint, self.server, optimiser=False)
        if self.head is not None:
            put_head(checkpoint, self.head, optimiser=False)
        put_client(checkpoint, self.client, snapshot_step=0, snapshot_steps=sys.maxsize, optimiser=False)
        drop_checkpoints_after(run / "best", self.step - 1)  # of this step, before the run went back
        write_checkpoint(run / "best", checkpoint)
        keep_newest(run / "best", 1)


def new_session(config: Config, *, low_precision: bool = True) -> LocalSession:
    """Load the task and the model, cut it, and give each half to its party. Deterministic in the config.

    Args:
        config: the settings of the run.
        low_precision: False leaves the client's base weights as the model has them, whatever client.dtype is.

    Raises:
        RequestError, ModelError: see `check_device`, `load_task`, `load_model`, `split_model`.
    """
    _check_devices(config)
    folder = resolve_model_folder(config.model.name)
    tokenizer_folder = Path(folder)
    check_before_data(config, config.model.name, alone=False)
    tokenizer = TextTokenizer.load(tokenizer_folder, transformers_tokenizer)
    task = load_task(config.task, tokenizer, seed=config.seed, model_labels=model_labels(tokenizer_folder))
    config = with_steps(config, task)
    check_before_run(config, config.model.name, task, alone=False)
    loaded, client, server, head = _parties(config, task.head, len(task.labels), low_precision=low_precision)
    session = LocalSession(
        config=config, task=task, client=client, server=server, head=head, tokenizer_folder=tokenizer_folder
    )
    trained = {"client": trained_elements(client), "server": trained_elements(server)}
    if head is not None:
        trained["head"] = head_elements(head)
    rows, tokens = longest_batch(task, config)
    tied = task.head == "causal" and bool(loaded.model.config.tie_word_embeddings)
    session.facts = {
        "model": {"source": loaded.source, "digest": loaded.digest, "family": session.client_half.family},
        "task": {"name": task.name, "digest": task_digest(task), "head": task.head, "labels": list(task.labels)},
        "longest_batch": {"rows": rows, "tokens": tokens},
        "cut": config.model.cut,
        "tied_head_trained_apart": tied and head is None,
        "new_weights": list(loaded.initialised),
        "notes": list(loaded.notes),
        "trained_parameters": trained,
        "crosses": what_crosses(config, task.head),
    }  # fmt: skip
    return session


def run_config(run: Path) -> Config:
    """The config of a run that `hosl train` made.

    Raises:
        FolderError: if `run` is not such a run's folder.
        ConfigError: if its config.yaml was cut, or is another one than the run was begun with.
    """
    if not (run / "config.yaml").is_file():
        raise FolderError(
            f"{run} is not a run's folder: it has no config.yaml; give the folder that `hosl train` made"
        )
    record = read_record(run) or {}
    if "run_id" in record:
        raise FolderError(
            f"{run} was made by `hosl join`: its server half is elsewhere, so it cannot be scored, exported or resumed "
            f"here; the same `hosl join` command goes on with it, and `hosl report {run}` shows its scores"
        )
    return load_begun_config(run / "config.yaml", record)


def load_run(
    run: Path,
    *,
    low_precision: bool = True,
    max_steps: int | None = None,
    best: bool = False,
    weights_only: bool = False,
) -> LocalSession:
    """The session of a run's folder at its newest intact checkpoint, bit for bit as it was; a damaged one is said.

    Args:
        run: the run's folder.
        low_precision: False puts the adapters on the client's original base weights instead of those of client.dtype.
        max_steps: the steps of the run; None: as its config says.
        best: whether to take the weights of its best evaluation on dev instead (`save_best`).
        weights_only: whether the state of the optimisers is left out, which scoring does not need.

    Raises:
        ConfigError: if the run has made more steps than that.
        FolderError: if `run` is not a run's folder.
        CheckpointError: if its checkpoint belongs to other weights or data, or all are damaged.
    """
    config = run_config(run)
    if max_steps is not None:
        config = msgspec.structs.replace(config, max_steps=max_steps)
    session = new_session(_as_trained(config, run), low_precision=low_precision)
    weights_only |= best
    inputs = {"model": session.facts["model"], "task": session.facts["task"]}
    checkpoint = _newest(run, inputs, best=best, weights_only=weights_only)
    if checkpoint is None:
        return session
    if (
        not weights_only
        and checkpoint.step < config.max_steps
        and not checkpoint.state.get("optimiser", True)
    ):
        raise CheckpointError(
            f"{run} was saved without its optimisers' state (save_optimiser: false): it can be scored and exported, "
            "but not trained further"
        )
    if checkpoint.step > config.max_steps:
        raise ConfigError(
            f"max_steps: {config.max_steps}, but {run} has done {checkpoint.step} steps; give more"
        )
    restore_server_(session.server, checkpoint)
    if session.head is not None:
        restore_head_(session.head, checkpoint)
    session.snapshot_step = restore_client_(session.client, checkpoint)
    session.control = session.control.restored(checkpoint.state)
    session.best = tuple(checkpoint.state["best"]) if "best" in checkpoint.state else None
    session.done(checkpoint.step)
    session.metrics_bytes = checkpoint.state.get("metrics_bytes", 0)
    return session


def load_halves(
    run: Path, *, best: bool = False
) -> tuple[Config, ClientHalf, ServerHalf, Sequence[str] | None]:
    """The config, the halves with a run's newest weights on the original base, and a classifier's labels; no data.

    Raises:
        FolderError: if `run` is not a run's folder.
        CheckpointError: if its checkpoint belongs to other weights, or all are damaged.
    """
    config, task = run_config(run), (read_record(run) or {}).get("task", {})
    if "head" not in task:  # the record is damaged, or of version 0.2: the data tell
        session = load_run(run, low_precision=False, best=best, weights_only=True)
        return config, session.client_half, session.server_half, session.class_labels
    client, server, head, _ = _restored(config, run, task, low_precision=False, best=best)
    half = whole_server_half(server, head)
    return config, client.half, half, task["labels"] if task["head"] == "classification" else None


@dataclass(frozen=True)
class Scoring:
    """A run's parties with its newest weights, as they score; its data are not read."""

    config: Config
    labels: Sequence[str]
    """The classes, or the candidate answers."""
    client: FrozenClient
    server: ServerSide
    step: int
    """The step of the weights; 0: those of the model."""


def load_scoring(run: Path, *, best: bool = False) -> Scoring:
    """The parties of a run as `hosl eval` calls them: with client.dtype, and behind wire.compression.

    Raises:
        FolderError: if `run` is not a run's folder.
        CheckpointError: if its checkpoint belongs to other weights, or all are damaged.
    """
    config, task = run_config(run), (read_record(run) or {}).get("task", {})
    if "head" not in task:
        session = load_run(run, best=best, weights_only=True)
        server = session.server_to_call(in_round=False)
        return Scoring(config, session.task.labels, session.client, server, session.step)
    client, server, head, step = _restored(config, run, task, low_precision=True, best=best)
    called: Any = server if head is None else head
    if head is None and config.wire.compression != "none":
        called = WatchedCompressedServer(
            Receiving(server, torch_wire), torch_wire, compression=config.wire.compression, seed=config.seed
        ).at_rest()
    called = behind_noise(config, called, torch_wire, simulated_key(config.seed), f"{step}/scores")
    return Scoring(config, task["labels"], client, called, step)


def _restored(
    config: Config, run: Path, task: dict[str, Any], *, low_precision: bool, best: bool
) -> tuple[FrozenClient, Any, HeadedServer | None, int]:
    """The parties with a run's newest weights, and their step; a head where the labels stay."""
    _check_devices(config)
    config = _as_trained(config, run)
    loaded, client, server, head = _parties(
        config, task["head"], len(task["labels"]), low_precision=low_precision
    )
    inputs = {"model": {"name": config.model.name, "digest": loaded.digest}}
    checkpoint = _newest(run, inputs, best=best, weights_only=True)
    if checkpoint is not None:
        restore_server_(server, checkpoint)
        if head is not None:
            restore_head_(head, checkpoint)
        restore_client_(client, checkpoint)
    return client, server, head, checkpoint.step if checkpoint is not None else 0


def _check_devices(config: Config) -> None:
    """Refuse devices that this machine does not have, before anything is loaded."""
    check_device(config.client.device, "client.device")
    check_device(config.server.device, "server.device")


def whole_server_half(server: Any, head: HeadedServer | None) -> ServerHalf:
    """What follows the cut, as one half: the server's own, or its trunk with the client's head."""
    return server.half if head is None else joined_server_half(server.half, head.head)


def _as_trained(config: Config, run: Path) -> Config:
    """The config with the labels where the run had them: in one process, version 0.2 took no note of the setting."""
    newest = max((run / "checkpoints").glob("step-*"), default=None)
    if config.wire.labels != "client" or newest is None or (newest / "client/head.safetensors").is_file():
        return config
    return msgspec.structs.replace(config, wire=msgspec.structs.replace(config.wire, labels="server"))


def _parties(
    config: Config, head: Head, labels: int, *, low_precision: bool
) -> tuple[LoadedModel, FrozenClient, TorchServer | TrunkServer, HeadedServer | None]:
    """The model, and the parties with its halves at their base weights; a head where the labels stay."""
    loaded = load_model(
        config.model.name, head=head, num_labels=labels if head == "classification" else None, seed=config.seed,
        dtype=DTYPES[config.model.dtype],
    )  # fmt: skip
    if config.wire.labels == "server":
        client_half, server_half = split_model(loaded.model, config.model.cut)
        client = make_client(config, client_half, low_precision=low_precision)
        return loaded, client, make_server(config, server_half, loaded.initialised), None
    client_half, trunk_half, head_half = split_u_shape(loaded.model, config.model.cut)
    client = make_client(config, client_half, low_precision=low_precision)
    server = make_server(config, trunk_half, loaded.initialised)
    trunk = LocalTrunk(server, torch_wire, compression=config.wire.compression, seed=config.seed)
    return loaded, client, server, make_head(config, head_half, client.half, trunk, loaded.initialised)


def _newest(
    run: Path, inputs: dict[str, dict[str, Any]], *, best: bool, weights_only: bool
) -> Checkpoint | None:
    """The newest intact checkpoint of a run, refused if it was trained with another model or other data."""
    folder = run / ("best" if best else "checkpoints")
    checkpoint = newest_intact(folder, say, weights_only=weights_only)
    if checkpoint is None and best:
        raise FolderError(
            f"{run} has no best weights: it kept none (save_best: false), or was not evaluated yet"
        )
    if checkpoint is None:
        if is_tested(run):
            raise CheckpointError(
                f"{run} is finished, but its checkpoints are gone; put {folder} back (the weights may also be in "
                f"{run}/model)"
            )
        say(f"{run} has no checkpoint: its weights are those of the model")
        return None
    path = checkpoint_path(folder, checkpoint.step)
    for kind, facts in inputs.items():
        before, now = checkpoint.state[f"{kind}_digest"], facts["digest"]
        if before != now:
            raise CheckpointError(
                f"{path} was trained with another {kind}: {facts.get('name', facts.get('source'))} had the digest "
                f"{before[:12]}, now {now[:12]}; put the original files back, or start a new run"
            )
    return checkpoint


def say(text: str) -> None:
    """Write one line for the person who started the command, on standard error."""
    sys.stderr.write(f"hosl: {text}\n")
