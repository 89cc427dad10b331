"""The halves of a run on PyTorch: which weights are trained, which party holds them, and their part of a checkpoint.

Used by a run in one process (`local`), by a device (`join`, which loads this module only when its runtime is torch) and
by a server (`serve`).
"""

from collections.abc import Sequence
from typing import Any

import torch

from hosl.checkpoint import Checkpoint
from hosl.config import Config
from hosl.core.journal import Journal
from hosl.errors import CheckpointError
from hosl.parties.activation_guided_client import ActivationGuidedClient, MixedClient
from hosl.parties.authors_head import NoisyFirstOrderServer, NoisyZerothOrderClient
from hosl.parties.guided_client import GuidedClient
from hosl.parties.headed_server import HeadedServer, Trunk
from hosl.parties.node_client import NodeClient
from hosl.parties.recomputing_client import RecomputingClient
from hosl.parties.torch_client import FirstOrderClient, FrozenClient, ZerothOrderClient
from hosl.parties.torch_memory import resident_bytes
from hosl.parties.torch_server import FirstOrderServer, SynchronousServer, TorchServer, ZerothOrderServer
from hosl.parties.torch_trunk import TrunkServer
from hosl.run.schedule import learning_rate
from hosl.split import ClientHalf, HeadHalf, TrunkHalf, add_lora, quantise_, set_trainable

_SAVED_WHOLE = (FirstOrderClient, RecomputingClient, GuidedClient, ActivationGuidedClient)
"""Clients whose updates no journal gives again: their checkpoints hold the trained weights."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_client(config: Config, half: ClientHalf, *, low_precision: bool = True) -> FrozenClient:
    """The client party of a method, its trained weights chosen.

    Args:
        config: the run's.
        half: is given to the party.
        low_precision: whether client.dtype is applied; False leaves the base weights as they are, for export.
    """
    of_client = "none" if config.method in ("frozen", "hosl-guided", "hosl-node") else config.client.trainable
    dtype = config.client.dtype
    if dtype != "model" and low_precision:
        quantise_(half, dtype)
    if of_client == "lora":
        adapters = None if dtype == "model" else torch.float32
        add_lora(half, config.client.lora, seed=config.seed, dtype=adapters)
    else:
        set_trainable(half, of_client)
    device, rows = config.client.device, config.client.micro_batch_rows
    match config.method:
        case "frozen":
            return FrozenClient(half, micro_batch_rows=rows, device=device)
        case "fo-fo" | "fo-zo":
            return FirstOrderClient(half, optimiser=config.client.optimiser, device=device)
        case "fo-recompute":
            return RecomputingClient(half, micro_batch_rows=rows, device=device)
        case "hosl-guided" | "hosl-node":
            kind = GuidedClient if config.method == "hosl-guided" else NodeClient
            return kind(half, blocks=config.zo.guided_blocks, micro_batch_rows=rows, device=device)
        case "hosl" | "hosl-gradient" | "zo-zo":
            guided = {"activation": ActivationGuidedClient, "mixed": MixedClient}
            kind = guided.get(config.zo.guidance, ZerothOrderClient)
            if config.profile == "authors-head":
                kind = NoisyZerothOrderClient
            return kind(half, law=config.zo.law, micro_batch_rows=rows, device=device)


def make_server(
    config: Config, half: Any, new_weights: Sequence[str], *, synchronous: bool = False
) -> TorchServer | TrunkServer:
    """The server party of a method, its trained weights chosen.

    Args:
        config: the run's.
        half: a `ServerHalf`, or a `TrunkHalf` where the labels stay with the client; is given to the party.
        new_weights: names that the checkpoint did not hold: a new head has nothing to adapt, LoRA trains it itself.
        synchronous: whether several clients' gradients make one update.
    """
    if config.server.trainable == "lora":
        add_lora(half, config.server.lora, seed=config.seed)
        for name, p in half.named_parameters():
            if name in new_weights:
                p.requires_grad_(True)
    else:
        set_trainable(half, "all")
    eta = learning_rate(config, config.server.learning_rate)
    device = config.server.device
    if isinstance(half, TrunkHalf):
        return TrunkServer(half, learning_rate=eta, optimiser=config.server.optimiser, device=device)
    if config.method in ("zo-zo", "fo-zo"):
        return ZerothOrderServer(half, learning_rate=eta, law=config.zo.law, device=device)
    kind = SynchronousServer if synchronous else FirstOrderServer
    if config.profile == "authors-head":
        kind = NoisyFirstOrderServer
    return kind(half, learning_rate=eta, optimiser=config.server.optimiser, device=device)


def put_client(
    checkpoint: Checkpoint, client: FrozenClient, *, snapshot_step: int, snapshot_steps: int
) -> int:
    """Add the client's part to a checkpoint; returns the step of the snapshot that it rests on.

    A zeroth-order client's part is its journal, and its weights once `snapshot_steps` have gone by since the last; a
    first-order one's is its weights, and the state of its optimiser where it has one.
    """
    if isinstance(client, _SAVED_WHOLE):
        checkpoint.tensors["client/trained"] = dict(client.trained)
    elif isinstance(client, ZerothOrderClient):
        checkpoint.journal = client.journal.to_bytes()
        if checkpoint.step - snapshot_step >= snapshot_steps:
            checkpoint.tensors["client/trained"] = dict(client.trained)
            snapshot_step = checkpoint.step
        elif snapshot_step:
            checkpoint.linked = ("client/trained.safetensors",)
    if isinstance(client, FirstOrderClient):
        checkpoint.tensors["client/optimiser"] = _optimiser_tensors(client.optimiser, client.trained)
    checkpoint.state["snapshot_step"] = snapshot_step
    return snapshot_step


def restore_client_(client: FrozenClient, checkpoint: Checkpoint) -> int:
    """Bring a client at its base weights to a checkpoint; returns the step of the snapshot that it rests on."""
    tensors, snapshot_step = checkpoint.tensors, int(checkpoint.state["snapshot_step"])
    if isinstance(client, _SAVED_WHOLE):
        _restore_weights_(client.trained, tensors["client/trained"])
    if isinstance(client, FirstOrderClient):
        _restore_optimiser_(client.optimiser, client.trained, tensors["client/optimiser"])
    elif isinstance(client, ZerothOrderClient):
        if snapshot_step:
            _restore_weights_(client.trained, tensors["client/trained"])
        client.replay(Journal.from_bytes(checkpoint.journal or b""), after=snapshot_step)
    return snapshot_step


def make_head(config: Config, half: HeadHalf, client_half: ClientHalf, trunk: Trunk) -> HeadedServer:
    """The head that a client holds beside its half, over the trunk; a tied weight stays the client's to train."""
    tied = {id(p) for p in client_half.parameters()}
    for p in half.parameters():
        if id(p) not in tied:
            p.requires_grad_(True)
    return HeadedServer(
        trunk, half, learning_rate=learning_rate(config, config.server.learning_rate),
        optimiser=config.server.optimiser, device=config.client.device, without=tied,
    )  # fmt: skip


def put_head(checkpoint: Checkpoint, server: HeadedServer) -> None:
    """Add the head's part to a client's checkpoint."""
    checkpoint.tensors["client/head"] = dict(server.trained)
    if server.optimiser is not None:
        checkpoint.tensors["client/head-optimiser"] = _optimiser_tensors(server.optimiser, server.trained)


def restore_head_(server: HeadedServer, checkpoint: Checkpoint) -> None:
    """Bring a head at its base weights to a checkpoint."""
    _restore_weights_(server.trained, checkpoint.tensors["client/head"])
    if server.optimiser is not None:
        _restore_optimiser_(server.optimiser, server.trained, checkpoint.tensors["client/head-optimiser"])


def put_server(checkpoint: Checkpoint, server: TorchServer | TrunkServer) -> None:
    """Add the server's part to a checkpoint."""
    checkpoint.tensors["server/trained"] = dict(server.trained)
    if isinstance(server, FirstOrderServer | TrunkServer) and server.optimiser is not None:
        checkpoint.tensors["server/optimiser"] = _optimiser_tensors(server.optimiser, server.trained)


def restore_server_(server: TorchServer | TrunkServer, checkpoint: Checkpoint) -> None:
    """Bring a server to a checkpoint."""
    _restore_weights_(server.trained, checkpoint.tensors["server/trained"])
    if isinstance(server, FirstOrderServer | TrunkServer) and server.optimiser is not None:
        _restore_optimiser_(server.optimiser, server.trained, checkpoint.tensors["server/optimiser"])


def party_bytes(party: Any) -> int:
    """Bytes of the weights, buffers and optimiser state that a party holds between its verbs."""
    tensors = [*party.half.model.parameters(), *party.half.model.buffers()]
    if isinstance(party, FirstOrderClient | FirstOrderServer):
        for state in party.optimiser.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return resident_bytes(tensors)


def trained_elements(party: Any) -> int:
    """How many numbers a party trains."""
    return sum(p.numel() for p in party.half.parameters() if p.requires_grad)


def _optimiser_tensors(
    optimiser: torch.optim.Optimizer, trained: dict[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """An optimiser's state as named tensors, `parameter/entry`; for safetensors."""
    return {
        f"{name}/{entry}": torch.as_tensor(value)
        for name, p in trained.items()
        for entry, value in optimiser.state.get(p, {}).items()
        if value is not None
    }


def _restore_optimiser_(
    optimiser: torch.optim.Optimizer,
    trained: dict[str, torch.nn.Parameter],
    tensors: dict[str, torch.Tensor],
) -> None:
    for key, value in tensors.items():
        name, entry = key.rsplit("/", 1)
        keep_on_cpu = entry == "step"
        optimiser.state[trained[name]][entry] = value if keep_on_cpu else value.to(trained[name].device)


def _restore_weights_(trained: dict[str, torch.nn.Parameter], tensors: dict[str, torch.Tensor]) -> None:
    if trained.keys() != tensors.keys():
        wrong = sorted(trained.keys() ^ tensors.keys())
        raise CheckpointError(
            f"the checkpoint trains {len(tensors)} tensors, this run {len(trained)}; {wrong[0]} is on one side only"
        )
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(tensors[name])
