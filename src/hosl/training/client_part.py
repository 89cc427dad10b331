"""A client's part of a checkpoint in any runtime: a journal with snapshots, or the trained weights. No torch.

The state of an optimiser is added by the runtime that has one.
"""

from collections.abc import Callable, Mapping
from typing import Any

from hosl.core.journal import Journal
from hosl.errors import CheckpointError
from hosl.parties.journaled import Journaled
from hosl.system.checkpoint import Checkpoint

TRAINED = "client/trained"
"""The name of the trained weights among a checkpoint's tensors."""


def put_trained(
    checkpoint: Checkpoint,
    client: Any,
    *,
    snapshot_step: int,
    snapshot_steps: int,
) -> int:
    """Add what a client has learned to a checkpoint; returns the step of the snapshot that the part depends on.

    With a journal that is the journal, and a snapshot of the weights every `snapshot_steps` steps; else the weights.

    Args:
        checkpoint: is extended in place.
        client: the client after the checkpoint's step, with `trained`, tensors or arrays by name.
        snapshot_step: the step of the newest snapshot; 0 is the base weights.
        snapshot_steps: the steps between two snapshots.
    """
    if isinstance(client, Journaled):
        checkpoint.journal = client.journal.to_bytes()
        if checkpoint.step - snapshot_step >= snapshot_steps:
            checkpoint.tensors[TRAINED] = dict(client.trained)
            snapshot_step = checkpoint.step
        elif snapshot_step:
            checkpoint.linked = (f"{TRAINED}.safetensors",)
    elif client.trained:
        checkpoint.tensors[TRAINED] = dict(client.trained)
    checkpoint.state["snapshot_step"] = snapshot_step
    return snapshot_step


def restore_trained_(
    checkpoint: Checkpoint,
    client: Any,
    set_: Callable[[Mapping[str, Any], Mapping[str, Any]], None],
) -> int:
    """Bring a client's weights from the base to a checkpoint; returns the step of the snapshot that it depends on.

    Args:
        checkpoint: of a run of this client.
        client: the client at its base weights.
        set_: (trained, tensors) gives trained weights the values of tensors, after `check_same_names`.

    Raises:
        CheckpointError: if the checkpoint trains other tensors.
        JournalError: if its journal is damaged.
    """
    tensors, snapshot_step = checkpoint.tensors, int(checkpoint.state["snapshot_step"])
    journaled = isinstance(client, Journaled)
    if journaled and TRAINED not in tensors:
        snapshot_step = 0  # it is damaged, or there is none: the journal begins at the base weights
    if snapshot_step or (client.trained and not journaled):
        set_(client.trained, tensors.get(TRAINED, {}))
    if journaled:
        client.replay(Journal.from_bytes(checkpoint.journal or b""), after=snapshot_step)
    return snapshot_step


def check_same_names(trained: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Refuse tensors of a checkpoint that are not those that are trained.

    Raises:
        CheckpointError: naming one that only one side has.
    """
    if trained.keys() != tensors.keys():
        wrong = sorted(trained.keys() ^ tensors.keys())
        raise CheckpointError(
            f"the checkpoint trains {len(tensors)} tensors, this run {len(trained)}; {wrong[0]} is on one side only"
        )
