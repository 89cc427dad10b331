"""The parts of a checkpoint that belong to a client on the engine; the twin of `checkpointing`.

Names and files are the same, so that either runtime, `hosl export` and `hosl merge` read them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hosl.parties.edge.clients.frozen import FrozenEdgeClient
from hosl.parties.edge.head import EdgeHalfHead, EdgeHeadedServer
from hosl.parties.edge.optimisers import EdgeOptimiser
from hosl.system.checkpoint import Checkpoint
from hosl.system.safetensors_file import arrays_digest
from hosl.training.client_part import check_same_names, put_trained, restore_trained_


def put_client(
    checkpoint: Checkpoint,
    client: FrozenEdgeClient,
    *,
    snapshot_step: int,
    snapshot_steps: int,
    optimiser: bool = True,
) -> int:
    """Add the client's part to a checkpoint; returns the step of the snapshot that the part depends on.

    Args:
        checkpoint: is extended in place; write it before the client moves, whose weights are not copied.
        client: the client after the checkpoint's step.
        snapshot_step: the step of the newest snapshot; 0 is the base weights.
        snapshot_steps: the steps between two snapshots.
        optimiser: whether the state of its optimiser is part of it.
    """
    snapshot_step = put_trained(
        checkpoint, client, snapshot_step=snapshot_step, snapshot_steps=snapshot_steps
    )
    if optimiser and (own := _optimiser_of(client)) is not None:
        checkpoint.tensors["client/optimiser"] = _optimiser_tensors(own)
    return snapshot_step


def restore_client_(client: FrozenEdgeClient, checkpoint: Checkpoint) -> int:
    """Bring a client at its base weights to a checkpoint; returns the step of the snapshot that it depends on.

    Raises:
        CheckpointError: if the checkpoint trains other tensors.
        JournalError: if its journal is damaged.
    """
    snapshot_step = restore_trained_(checkpoint, client, _restore_weights_)
    if (own := _optimiser_of(client)) is not None:
        _restore_optimiser_(own, checkpoint.tensors.get("client/optimiser", {}))
    return snapshot_step


def put_head(checkpoint: Checkpoint, server: EdgeHeadedServer) -> None:
    """Add the head's part to a client's checkpoint, with the state of its optimiser."""
    checkpoint.tensors["client/head"] = dict(server.trained)
    if server.trained:
        checkpoint.tensors["client/head-optimiser"] = _optimiser_tensors(server.optimiser)


def restore_head_(server: EdgeHeadedServer, checkpoint: Checkpoint) -> None:
    """Bring a head at its base weights to a checkpoint.

    Raises:
        CheckpointError: if the checkpoint trains other tensors.
    """
    _restore_weights_(server.trained, checkpoint.tensors["client/head"])
    _restore_optimiser_(server.optimiser, checkpoint.tensors.get("client/head-optimiser", {}))


def restore_head_weights_(head: EdgeHalfHead, checkpoint: Checkpoint) -> None:
    """Bring a head that is only used to a checkpoint; what it shares with the client half is the client's part.

    Raises:
        CheckpointError: if the checkpoint trains tensors that the head does not have.
    """
    trained = checkpoint.tensors["client/head"]
    own = [name for name in trained if name in head.weights.stored]
    _restore_weights_({name: head.weights.trained_(name) for name in own}, trained)


def trained_digest(client: FrozenEdgeClient) -> str:
    """The SHA-256 digest of a client's trained weights, by name: that of a torch client with equal weights."""
    return arrays_digest(client.trained)


def _optimiser_of(client: FrozenEdgeClient) -> EdgeOptimiser | None:
    return getattr(client, "optimiser", None)


def _optimiser_tensors(optimiser: EdgeOptimiser) -> dict[str, np.ndarray]:
    """An optimiser's state as tensors named `parameter/entry`, as torch's is written."""
    return {
        f"{name}/{entry}": value for name, state in optimiser.state.items() for entry, value in state.items()
    }


def _restore_optimiser_(optimiser: EdgeOptimiser, tensors: Mapping[str, Any]) -> None:
    for key, value in tensors.items():
        name, entry = key.rsplit("/", 1)
        optimiser.state.setdefault(name, {})[entry] = np.array(value, np.float32)


def _restore_weights_(trained: Mapping[str, np.ndarray], tensors: Mapping[str, Any]) -> None:
    check_same_names(trained, tensors)
    for name, weight in trained.items():
        weight[:] = np.asarray(tensors[name])
