"""From a config to two parties ready for their first step, and back again from a run's folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hosl.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    optimiser_tensors,
    read_checkpoint,
    restore_optimiser_,
    restore_weights_,
)
from hosl.config import Config, load_config
from hosl.core.directions import direction_seed
from hosl.core.journal import Journal
from hosl.core.parties import Batch
from hosl.core.rounds import (
    RoundResult,
    authors_head_round,
    fo_round,
    fo_zo_round,
    frozen_round,
    hosl_gradient_round,
    hosl_round,
    zo_round,
)
from hosl.errors import CheckpointError, FolderError
from hosl.parties.authors_head import NoisyFirstOrderServer, NoisyZerothOrderClient
from hosl.parties.torch_client import FirstOrderClient, FrozenClient, ZerothOrderClient
from hosl.parties.torch_server import FirstOrderServer, TorchServer, ZerothOrderServer
from hosl.run.schedule import learning_rate
from hosl.split import (
    ClientHalf,
    ServerHalf,
    add_lora,
    load_model,
    resolve_model_folder,
    set_trainable,
    split_model,
)
from hosl.tasks import Task, TextTokenizer, load_task, task_digest

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Session:
    """A split model, its task and the two parties that train it."""

    config: Config
    task: Task
    client: FrozenClient
    server: TorchServer
    tokenizer_folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    """What the run's record says of the model: source, digest, cut, family, new weights."""
    step: int = 0
    """Steps done."""
    snapshot_step: int = 0
    """The step of the newest snapshot of a zeroth-order client; 0 is the base weights."""

    @property
    def client_half(self) -> ClientHalf:
        """The half on the device."""
        return self.client.half

    @property
    def server_half(self) -> ServerHalf:
        """The half on the server."""
        return self.server.half

    def round(self, client: Any, server: Any, batch: Batch, step: int) -> RoundResult:
        """One step of the config's method between two parties (this session's own, or wrapped ones)."""
        config = self.config
        seeds = [direction_seed(config.seed, step, q) for q in range(config.zo.directions)]
        server_seeds = [direction_seed(config.seed, step, q, "server") for q in range(config.zo.directions)]
        eta = learning_rate(config, config.client.learning_rate)(step)
        probes: dict[str, Any] = {"seeds": seeds, "epsilon": config.zo.epsilon, "learning_rate": eta}
        if config.profile == "authors-head":
            dropout_seed = direction_seed(config.seed, step, 0, "server")
            return authors_head_round(client, server, batch, step=step, dropout_seed=dropout_seed, **probes)
        rounds: dict[str, Callable[..., RoundResult]] = {
            "hosl": partial(hosl_round, **probes),
            "hosl-gradient": partial(hosl_gradient_round, **probes),
            "fo-fo": partial(fo_round, learning_rate=eta),
            "zo-zo": partial(zo_round, server_seeds=server_seeds, **probes),
            "fo-zo": partial(
                fo_zo_round, server_seeds=server_seeds, epsilon=config.zo.epsilon, learning_rate=eta
            ),
            "frozen": frozen_round,
        }
        return rounds[config.method](client, server, batch, step=step)


def new_session(config: Config) -> Session:
    """Load the task and the model, cut it, and give each half to its party. Deterministic in the config.

    Raises:
        RequestError, ModelError: see `load_task`, `load_model`, `split_model`.
    """
    folder = resolve_model_folder(config.model.name)
    tokenizer_folder = Path(folder)
    task = load_task(config.task, TextTokenizer.load(tokenizer_folder), seed=config.seed)
    loaded = load_model(
        config.model.name,
        head=task.head,
        num_labels=len(task.labels) if task.head == "classification" else None,
        seed=config.seed,
        dtype=_DTYPES[config.model.dtype],
    )
    client_half, server_half = split_model(loaded.model, config.model.cut)
    _choose_trained(config, client_half, server_half, loaded.initialised)
    session = Session(
        config=config,
        task=task,
        client=_client(config, client_half),
        server=_server(config, server_half),
        tokenizer_folder=tokenizer_folder,
    )
    session.facts = {
        "model": {"source": loaded.source, "digest": loaded.digest, "family": client_half.family},
        "task": {"name": task.name, "digest": task_digest(task)},
        "cut": config.model.cut,
        "tied_head_trained_apart": task.head == "causal" and bool(loaded.model.config.tie_word_embeddings),
        "new_weights": list(loaded.initialised),
        "trained_parameters": {
            "client": _count(session.client), "server": sum(p.numel() for p in session.server.trained.values())
        },
    }  # fmt: skip
    return session


def load_run(run: Path) -> Session:
    """The session of a run's folder at its newest checkpoint, bit for bit as it was.

    Raises:
        FolderError: if `run` is not a run's folder.
        CheckpointError: if its checkpoint belongs to other weights or data, or is damaged.
    """
    if not (run / "config.yaml").is_file():
        raise FolderError(
            f"{run} is not a run's folder: it has no config.yaml; give the folder that `hosl train` made"
        )
    session = new_session(load_config(run / "config.yaml"))
    path = newest_checkpoint(run / "checkpoints")
    if path is None:
        return session
    checkpoint = read_checkpoint(path)
    _check_same_inputs(session, checkpoint, path)
    _restore(session, checkpoint)
    return session


def session_checkpoint(session: Session, facts: dict[str, Any]) -> Checkpoint:
    """Everything that `load_run` needs at this step, as named tensors, bytes and plain facts."""
    checkpoint = Checkpoint(step=session.step)
    client, server = session.client, session.server
    checkpoint.tensors["server/trained"] = dict(server.trained)
    if isinstance(server, FirstOrderServer):
        checkpoint.tensors["server/optimiser"] = optimiser_tensors(server.optimiser, server.trained)
    if isinstance(client, ZerothOrderClient):
        checkpoint.journal = client.journal.to_bytes()
        if session.step - session.snapshot_step >= session.config.snapshot_steps:
            checkpoint.tensors["client/trained"] = dict(client.trained)
            session.snapshot_step = session.step
        elif session.snapshot_step:
            checkpoint.linked = ("client/trained.safetensors",)
    if isinstance(client, FirstOrderClient):
        checkpoint.tensors["client/trained"] = dict(client.trained)
        checkpoint.tensors["client/optimiser"] = optimiser_tensors(client.optimiser, client.trained)
    checkpoint.state = {
        "model_digest": session.facts["model"]["digest"],
        "task_digest": session.facts["task"]["digest"],
        "law": session.config.zo.law,
        "snapshot_step": session.snapshot_step,
        **facts,
    }
    return checkpoint


def _check_same_inputs(session: Session, checkpoint: Checkpoint, path: Path) -> None:
    for what, name in (("model", session.config.model.name), ("task", session.task.name)):
        before, now = checkpoint.state[f"{what}_digest"], session.facts[what]["digest"]
        if before != now:
            raise CheckpointError(
                f"{path} was trained with another {what}: {name} had the digest {before[:12]}, now {now[:12]}; "
                "put the original files back, or start a new run"
            )


def _restore(session: Session, checkpoint: Checkpoint) -> None:
    client, server, tensors = session.client, session.server, checkpoint.tensors
    restore_weights_(server.trained, tensors["server/trained"])
    if isinstance(server, FirstOrderServer):
        restore_optimiser_(server.optimiser, server.trained, tensors["server/optimiser"])
    if isinstance(client, FirstOrderClient):
        restore_weights_(client.trained, tensors["client/trained"])
        restore_optimiser_(client.optimiser, client.trained, tensors["client/optimiser"])
    if isinstance(client, ZerothOrderClient):
        session.snapshot_step = checkpoint.state["snapshot_step"]
        if session.snapshot_step:
            restore_weights_(client.trained, tensors["client/trained"])
        client.replay(Journal.from_bytes(checkpoint.journal or b""), after=session.snapshot_step)
    session.step = checkpoint.step


def _choose_trained(
    config: Config, client_half: ClientHalf, server_half: ServerHalf, new_weights: Sequence[str]
) -> None:
    of_client = "none" if config.method == "frozen" else config.client.trainable
    if of_client == "lora":
        add_lora(client_half, config.client.lora, seed=config.seed)
    else:
        set_trainable(client_half, of_client)
    if config.server.trainable == "lora":
        add_lora(server_half, config.server.lora, seed=config.seed)
        for name, p in server_half.named_parameters():
            if name in new_weights:  # a new head has nothing to adapt: it is trained itself
                p.requires_grad_(True)
    else:
        set_trainable(server_half, "all")


def _client(config: Config, half: ClientHalf) -> FrozenClient:
    device = config.client.device
    match config.method:
        case "frozen":
            return FrozenClient(half, device=device)
        case "fo-fo" | "fo-zo":
            return FirstOrderClient(half, optimiser=config.client.optimiser, device=device)
        case "hosl" | "hosl-gradient" | "zo-zo":
            kind = NoisyZerothOrderClient if config.profile == "authors-head" else ZerothOrderClient
            return kind(half, law=config.zo.law, device=device)


def _server(config: Config, half: ServerHalf) -> TorchServer:
    eta = learning_rate(config, config.server.learning_rate)
    device = config.server.device
    if config.method in ("zo-zo", "fo-zo"):
        return ZerothOrderServer(half, learning_rate=eta, law=config.zo.law, device=device)
    kind = NoisyFirstOrderServer if config.profile == "authors-head" else FirstOrderServer
    return kind(half, learning_rate=eta, optimiser=config.server.optimiser, device=device)


def _count(client: FrozenClient) -> int:
    return sum(p.numel() for p in client.half.parameters() if p.requires_grad)
