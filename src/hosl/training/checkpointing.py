"""The parts of a checkpoint that belong to parties on PyTorch: weights, optimiser state, journal."""

from collections.abc import Mapping

import torch

from hosl.parties.clients.frozen import FrozenClient
from hosl.parties.servers.basic import FirstOrderServer, TorchServer
from hosl.parties.servers.headed import HeadedServer
from hosl.parties.servers.trunk import TrunkServer
from hosl.split import HeadHalf
from hosl.system.checkpoint import Checkpoint
from hosl.training.client_part import check_same_names, put_trained, restore_trained_


def put_client(
    checkpoint: Checkpoint,
    client: FrozenClient,
    *,
    snapshot_step: int,
    snapshot_steps: int,
    optimiser: bool = True,
) -> int:
    """Add the client's part to a checkpoint; returns the step of the snapshot that the part depends on.

    A zeroth-order client's part is its journal, and a snapshot of its weights every `snapshot_steps` steps. Any other
    client's part is its trained weights, and the state of its optimiser if it has one.

    Args:
        checkpoint: is extended in place.
        client: the client after the checkpoint's step.
        snapshot_step: the step of the newest snapshot; 0 is the base weights.
        snapshot_steps: the steps between two snapshots.
        optimiser: whether the state of its optimiser is part of it.
    """
    snapshot_step = put_trained(
        checkpoint, client, snapshot_step=snapshot_step, snapshot_steps=snapshot_steps
    )
    if optimiser and (own := _optimiser_of(client)) is not None:
        checkpoint.tensors["client/optimiser"] = _optimiser_tensors(own, client.trained)
    return snapshot_step


def restore_client_(client: FrozenClient, checkpoint: Checkpoint) -> int:
    """Bring a client at its base weights to a checkpoint; returns the step of the snapshot that it depends on.

    Raises:
        CheckpointError: if the checkpoint trains other tensors.
        JournalError: if its journal is damaged.
    """
    snapshot_step = restore_trained_(checkpoint, client, restore_weights_)
    if (own := _optimiser_of(client)) is not None:
        _restore_optimiser_(own, client.trained, checkpoint.tensors.get("client/optimiser", {}))
    return snapshot_step


def _optimiser_of(client: FrozenClient) -> torch.optim.Optimizer | None:
    """The optimiser of a client that descends gradients; None: it has plain updates, without a state."""
    return getattr(client, "optimiser", None)


def put_head(checkpoint: Checkpoint, server: HeadedServer, *, optimiser: bool = True) -> None:
    """Add the head's part to a client's checkpoint, the state of its optimiser if `optimiser`."""
    checkpoint.tensors["client/head"] = dict(server.trained)
    if optimiser and server.optimiser is not None:
        checkpoint.tensors["client/head-optimiser"] = _optimiser_tensors(server.optimiser, server.trained)


def restore_head_(server: HeadedServer, checkpoint: Checkpoint) -> None:
    """Bring a head at its base weights to a checkpoint.

    Raises:
        CheckpointError: if the checkpoint trains other tensors.
    """
    restore_weights_(server.trained, checkpoint.tensors["client/head"])
    if server.optimiser is not None:
        tensors = checkpoint.tensors.get("client/head-optimiser", {})
        _restore_optimiser_(server.optimiser, server.trained, tensors)


def restore_head_weights_(head: HeadHalf, checkpoint: Checkpoint) -> None:
    """Bring a head that is only used to a checkpoint; what it shares with the client half is the client's part.

    Raises:
        CheckpointError: if the checkpoint trains other tensors.
    """
    trained = checkpoint.tensors["client/head"]
    restore_weights_({name: p for name, p in head.named_parameters() if name in trained}, trained)


def put_server(checkpoint: Checkpoint, server: TorchServer | TrunkServer, *, optimiser: bool = True) -> None:
    """Add the server's part to a checkpoint, the state of its optimiser if `optimiser`."""
    checkpoint.tensors["server/trained"] = dict(server.trained)
    if optimiser and isinstance(server, FirstOrderServer | TrunkServer) and server.optimiser is not None:
        checkpoint.tensors["server/optimiser"] = _optimiser_tensors(server.optimiser, server.trained)


def restore_server_(server: TorchServer | TrunkServer, checkpoint: Checkpoint) -> None:
    """Bring a server to a checkpoint.

    Raises:
        CheckpointError: if the checkpoint trains other tensors.
    """
    restore_weights_(server.trained, checkpoint.tensors["server/trained"])
    if isinstance(server, FirstOrderServer | TrunkServer) and server.optimiser is not None:
        _restore_optimiser_(server.optimiser, server.trained, checkpoint.tensors.get("server/optimiser", {}))


def _optimiser_tensors(
    optimiser: torch.optim.Optimizer, trained: dict[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """An optimiser's state as tensors named `parameter/entry`, for safetensors."""
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
        parameter = trained[name]  # torch keeps the count of steps on the CPU
        optimiser.state[parameter][entry] = value if entry == "step" else value.to(parameter.device)


def restore_weights_(trained: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    """Set the trained weights, in place.

    Raises:
        CheckpointError: if the checkpoint trains other tensors.
    """
    check_same_names(trained, tensors)
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(tensors[name])
