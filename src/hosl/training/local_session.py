"""A run in one process: from a config, or from a run's folder, to two parties that are ready for their next step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hosl.config import Config, load_config
from hosl.core.protocols import ServerSide
from hosl.errors import CheckpointError, FolderError
from hosl.methods.schedule import longest_batch
from hosl.methods.torch_parties import (
    DTYPES,
    check_device,
    make_client,
    make_server,
    party_bytes,
    trained_elements,
)
from hosl.parties.clients.frozen import FrozenClient
from hosl.parties.engine.memory import memory_of
from hosl.parties.metered import metered
from hosl.parties.remote import torch_wire
from hosl.parties.remote.compression import Receiving, WatchedCompressedServer
from hosl.parties.servers.basic import TorchServer
from hosl.planner.budget import check_before_data, check_before_run
from hosl.planner.runtime_base import RUNTIME_BASE_BYTES
from hosl.split import ClientHalf, ServerHalf, load_model, resolve_model_folder, split_model
from hosl.split.tokenizer import transformers_tokenizer
from hosl.system.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint, write_checkpoint
from hosl.tasks import TextTokenizer, load_task, model_labels, task_digest
from hosl.training.checkpointing import put_client, put_server, restore_client_, restore_server_
from hosl.training.session import Session


@dataclass
class LocalSession(Session[FrozenClient, TorchServer]):
    """The session of a run with both halves on PyTorch in this process."""

    tokenizer_folder: Path = Path()
    snapshot_step: int = 0
    """The step of the newest snapshot of a zeroth-order client; 0 is the base weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._wire = None
        if self.config.wire.compression != "none":
            self._wire = WatchedCompressedServer(
                metered(self._receiving, self.meters.server), torch_wire,
                compression=self.config.wire.compression, seed=self.config.seed,
            )  # fmt: skip

    @property
    def _receiving(self) -> Receiving:
        return Receiving(self.server, torch_wire)

    def server_to_call(self, *, under_meter: bool) -> ServerSide:
        """The server that the client calls; behind wire.compression if the config has one."""
        if self._wire is None:
            return super().server_to_call(under_meter=under_meter)
        if not under_meter:
            return self._wire.at_rest(self._receiving)
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
    def server_half(self) -> ServerHalf:
        """The server's half of the model."""
        return self.server.half

    def measure_memory(self, *, on: bool) -> None:
        """Start or stop measuring the memory of the parties' calls."""
        parties = (
            (self.meters.client, self.client, self.server),
            (self.meters.server, self.server, self.client),
        )
        for meter, party, other in parties:
            beside = party_bytes(other) if on and other.device == party.device else 0
            meter.memory = memory_of(party, party_bytes(party), beside=beside) if on else None

    def client_bytes(self) -> float:
        """The bytes of the client in a process of its own: the peak of its tensors, and Python with torch."""
        return RUNTIME_BASE_BYTES + self.meters.client.peak_bytes

    def save(self, run: Path, facts: dict[str, Any]) -> None:
        """Write both halves at the session's step, as one checkpoint."""
        checkpoint = Checkpoint(step=self.step)
        put_server(checkpoint, self.server)
        self.snapshot_step = put_client(
            checkpoint,
            self.client,
            snapshot_step=self.snapshot_step,
            snapshot_steps=self.config.snapshot_steps,
        )
        checkpoint.state |= self.inputs() | facts
        write_checkpoint(run / "checkpoints", checkpoint)


def new_session(config: Config, *, low_precision: bool = True) -> LocalSession:
    """Load the task and the model, cut it, and give each half to its party. Deterministic in the config.

    Args:
        config: the settings of the run.
        low_precision: False leaves the client's base weights as the model has them, whatever client.dtype is.

    Raises:
        RequestError, ModelError: see `check_device`, `load_task`, `load_model`, `split_model`.
    """
    check_device(config.client.device, "client.device")
    check_device(config.server.device, "server.device")
    folder = resolve_model_folder(config.model.name)
    tokenizer_folder = Path(folder)
    check_before_data(config, config.model.name, alone=False)
    tokenizer = TextTokenizer.load(tokenizer_folder, transformers_tokenizer)
    task = load_task(config.task, tokenizer, seed=config.seed, model_labels=model_labels(tokenizer_folder))
    check_before_run(config, config.model.name, task, alone=False)
    loaded = load_model(
        config.model.name,
        head=task.head,
        num_labels=len(task.labels) if task.head == "classification" else None,
        seed=config.seed,
        dtype=DTYPES[config.model.dtype],
    )
    client_half, server_half = split_model(loaded.model, config.model.cut)
    session = LocalSession(
        config=config,
        task=task,
        client=make_client(config, client_half, low_precision=low_precision),
        server=cast(TorchServer, make_server(config, server_half, loaded.initialised)),
        tokenizer_folder=tokenizer_folder,
    )
    rows, tokens = longest_batch(task, config)
    session.facts = {
        "model": {"source": loaded.source, "digest": loaded.digest, "family": client_half.family},
        "task": {"name": task.name, "digest": task_digest(task)},
        "longest_batch": {"rows": rows, "tokens": tokens},
        "cut": config.model.cut,
        "tied_head_trained_apart": task.head == "causal" and bool(loaded.model.config.tie_word_embeddings),
        "new_weights": list(loaded.initialised),
        "notes": list(loaded.notes),
        "trained_parameters": {
            "client": trained_elements(session.client), "server": trained_elements(session.server)
        },
    }  # fmt: skip
    return session


def load_run(run: Path, *, low_precision: bool = True) -> LocalSession:
    """The session of a run's folder at its newest checkpoint, bit for bit as it was.

    Args:
        run: the run's folder.
        low_precision: False puts the adapters on the client's original base weights instead of those of client.dtype.

    Raises:
        FolderError: if `run` is not a run's folder.
        CheckpointError: if its checkpoint belongs to other weights or data, or is damaged.
    """
    if not (run / "config.yaml").is_file():
        raise FolderError(
            f"{run} is not a run's folder: it has no config.yaml; give the folder that `hosl train` made"
        )
    session = new_session(load_config(run / "config.yaml"), low_precision=low_precision)
    path = newest_checkpoint(run / "checkpoints")
    if path is None:
        return session
    checkpoint = read_checkpoint(path)
    _check_same_inputs(session, checkpoint, path)
    restore_server_(session.server, checkpoint)
    session.snapshot_step = restore_client_(session.client, checkpoint)
    session.control = session.control.restored(checkpoint.state)
    session.step = checkpoint.step
    return session


def _check_same_inputs(session: Session, checkpoint: Checkpoint, path: Path) -> None:
    """Refuse a checkpoint of another model or other data."""
    for kind, name in (("model", session.config.model.name), ("task", session.task.name)):
        before, now = checkpoint.state[f"{kind}_digest"], session.facts[kind]["digest"]
        if before != now:
            raise CheckpointError(
                f"{path} was trained with another {kind}: {name} had the digest {before[:12]}, now {now[:12]}; "
                "put the original files back, or start a new run"
            )
