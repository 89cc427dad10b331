"""`hosl audit`: every field that can leave the device in a run of a config, with its shape and size. No torch."""

from typing import Any

import numpy as np

from hosl.config import Config
from hosl.core.targets import Batch, ClassTargets, RowPositionTargets, positions_of, states_shape
from hosl.methods.schedule import batch_of_step
from hosl.tasks import Task
from hosl.wire import hosl_pb2 as pb
from hosl.wire.targets import positions_to_message, targets_to_message
from hosl.wire.tensors import packed_bytes

LEARNS = {
    "activations": "much of the input where the cut is shallow: activations are not private (SECURITY.md)",
    "mask": "how many tokens each row has",
    "labels": "the class of every training and evaluation example",
    "options": "the candidate answers' tokens, and so the label of every example",
    "positions": "where the scored tokens stand, and so how long each prompt and each answer is",
    "gradient at the states": "often the labels, and of a public language model the learned tokens (SECURITY.md)",
    "update": "K numbers per step that depend on this device's data, relayed to the other devices",
    "half": "all that this half has learned: who has the base model can build the tuned half",
    "merge": "that this device puts the whole tuned model together; weights come down, none go up",
    "hello": "model, settings, software version; whether a guessed list of class names is this device's",
}


def audit(config: Config, task: Task, *, width: int, steps: int = 20) -> list[dict[str, Any]]:
    """One row per field: when it is sent, its shape, its bytes per step, and what a curious server could learn.

    Args:
        config: the settings of the run.
        task: its data; the first `steps` batches are collated to know their sizes.
        width: the width of the model's hidden state.
        steps: the number of batches to average over.
    """
    batches = [batch_of_step(config, task, step) for step in range(1, steps + 1)]
    method, directions = config.method_row, config.zo.directions
    # at first-plus the server's step is at a probe that is sent anyway
    uploads = method.uploads(directions) - (config.zo.server_gradient_at == "first-plus")
    requests = method.requests(directions)
    compression = config.wire.compression
    activation_bytes = [
        packed_bytes((*batch.input_ids.shape, width), config.model.dtype, compression) for batch in batches
    ]
    rows, seq = batches[0].input_ids.shape
    fields = [
        _row("activations", f"{uploads} a step", f"[{rows}, {seq}, {width}] {config.model.dtype}, wire {compression}",
             uploads * float(np.mean(activation_bytes))),
        _row("mask", f"{requests} a step", f"[{rows}, {seq}] bits", requests * float(np.mean(
            [len(targets_to_message(batch.targets).mask.bits) for batch in batches]))),
    ]  # fmt: skip
    if config.wire.labels == "client":
        fields += _fields_when_labels_stay(config, batches, requests, width)
    else:
        name = "labels" if isinstance(batches[0].targets, ClassTargets) else "options"
        sizes = [_bytes_beside_mask(targets_to_message(batch.targets)) for batch in batches]
        fields.append(
            _row(name, f"{requests} a step", f"[{rows}, ...] integers", requests * float(np.mean(sizes)))
        )
    if config.clients.halves == "shared":
        entry = config.zo.directions * 12
        fields.append(_row("update", "1 a step", f"{config.zo.directions} seeds and scales", float(entry)))
    if method.trains != "nothing":
        given = (
            "the journal, 16 bytes a direction" if method.client_state == "journal" else "the trained tensors"
        )
        shared = config.clients.halves == "shared"  # the server has the journal of its updates
        fields.append(
            _row(
                "half",
                "never, unless joined with --give-half: once, at the end",
                "a digest" if shared else given,
                0.0,
            )
        )
    fields.append(
        _row(
            "merge",
            "never, unless `hosl merge` is called on the device",
            "the run's name, a step, a digest of what the server listed and an offset",
            0.0,
        )
    )
    fields.append(_row("hello", "1 a connection", "settings and digests", 0.0))
    return fields


def _fields_when_labels_stay(
    config: Config, batches: list[Batch], requests: int, width: int
) -> list[dict[str, Any]]:
    positions = [positions_of(batch.targets) for batch in batches]
    first = positions[0]
    sizes = [_bytes_beside_mask(positions_to_message(p)) for p in positions]
    gradients = [packed_bytes(states_shape(p, width), config.model.dtype, "none") for p in positions]
    shape = f"{list(states_shape(first, width))} {config.model.dtype}"
    if isinstance(first, RowPositionTargets):
        asked = f"{list(first.scored.shape)} bits"
    else:
        asked = f"[{len(first.positions)}] integers"
    return [
        _row("positions", f"{requests} a step", asked, requests * float(np.mean(sizes))),
        _row("gradient at the states", "1 a step", shape, float(np.mean(gradients))),
    ]


def _bytes_beside_mask(message: pb.Targets | pb.Positions) -> int:
    return message.ByteSize() - len(message.mask.bits)


def _row(field: str, when: str, shape: str, bytes_per_step: float) -> dict[str, Any]:
    return {
        "field": field, "sent": when, "shape": shape, "bytes_per_step": round(bytes_per_step),
        "a curious server learns": LEARNS[field],
    }  # fmt: skip
