"""A client's part of a checkpoint in any runtime: a journal with snapshots, or the trained weights. No torch.

The state of an optimiser is added by the runtime that has one.
"""

from collections.abc import Callable, Mapping
from typing import Any

from hosl.core.journal import Journal
from hosl.errors import CheckpointError
from hosl.system.checkpoint import Checkpoint

TRAINED = "client/trained"
"""The name of the trained weights among a checkpoint's tensors."""


def put_trained(
    checkpoint: Checkpoint,
    trained: Mapping[str, Any],
    journal: Journal | None,
    *,
    snapshot_step: int,
    snapshot_steps: int,
) -> int:
    """Add what a client has learned to a checkpoint; returns the step of the snapshot that the part depends on.

    With a journal that is the journal, and a snapshot of the weights every `snapshot_steps` steps; else the weights.

    Args:
        checkpoint: is extended in place.
        trained: the trained weights after the checkpoint's step, tensors or arrays by name.
        journal: of a zeroth-order client; None: the client has none.
        snapshot_step: the step of the newest snapshot; 0 is the base weights.
        snapshot_steps: the steps between two snapshots.
    """
    if journal is not None:
        checkpoint.journal = journal.to_bytes()
        if checkpoint.step - snapshot_step >= snapshot_steps:
            checkpoint.tensors[TRAINED] = dict(trained)
            snapshot_step = checkpoint.step
        elif snapshot_step:
            checkpoint.linked = (f"{TRAINED}.safetensors",)
    elif trained:
        checkpoint.tensors[TRAINED] = dict(trained)
    checkpoint.state["snapshot_step"] = snapshot_step
    return snapshot_step


def restore_trained_(
    checkpoint: Checkpoint,
    trained: Mapping[str, Any],
    replay: Callable[[Journal, int], None] | None,
    set_: Callable[[Mapping[str, Any], Mapping[str, Any]], None],
) -> int:
    """Bring a client's weights from the base to a checkpoint; returns the step of the snapshot that it depends on.

    Args:
        checkpoint: of a run of this client.
        trained: the trained weights at the base, by name.
        replay: (journal, step) applies what the journal has after the step; None: the client has no journal.
        set_: (trained, tensors) gives the trained weights the values of the checkpoint's tensors.

    Raises:
        CheckpointError: if the checkpoint trains other tensors.
        JournalError: if its journal is damaged.
    """
    tensors, snapshot_step = checkpoint.tensors, int(checkpoint.state["snapshot_step"])
    if replay is not None and TRAINED not in tensors:
        snapshot_step = 0  # it is damaged, or there is none: the journal begins at the base weights
    if snapshot_step or (trained and replay is None):
        check_same_names(trained, tensors.get(TRAINED, {}))
        set_(trained, tensors[TRAINED])
    if replay is not None:
        replay(Journal.from_bytes(checkpoint.journal or b""), snapshot_step)
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
