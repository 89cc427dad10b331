"""A check of residual feedback before a run: how far the returned gradient is that of the blocks below the cut.

The cosine of each layer's update with its true gradient on one batch, with both halves in this process. Needs autograd
and a graph of the trained blocks, so it is for a machine with memory to spare: `hosl plan --probe` and tests. Nothing
is kept or written. Source: methods.md (o).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from hosl.config import Config
from hosl.core.targets import Batch
from hosl.methods.schedule import batch_of_step
from hosl.parties.clients.residual import ResidualClient
from hosl.split.adapters import ADAPTER
from hosl.training.local_session import new_session

ENOUGH = 0.3
"""The cosine below which a block learns hardly anything by residual feedback (docs/concepts/residual-feedback.md)."""


@dataclass(frozen=True, slots=True)
class Alignment:
    """One layer's update by residual feedback beside its true gradient."""

    layer: str
    """The layer's name in the half."""
    cosine: float
    """1: the same direction; 0: none of it."""
    ratio: float
    """|true gradient| / |update at rate 1|."""


def alignment(client: ResidualClient, batch: Batch, gradient: torch.Tensor) -> list[Alignment]:
    """The alignment of every layer that a `ResidualClient` trains, from the cut down. No weight changes.

    Args:
        client: the client; decay and optimiser do not count. Of adapters, whose first matrix has no gradient where
            the second is 0, as at the start, the second one's alignment stands for the layer.
        batch: a batch of the task.
        gradient: dL/dh [rows, seq, width] of this batch.
    """
    updates = client.feedback_gradients(batch, gradient)
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets.mask).to(torch.int64)
    with torch.enable_grad():
        h = client.half(ids.to(client.device), mask.to(client.device))
        layers = list(reversed(client.layers))
        of_layer = "weight" if f"{layers[0]}.weight" in client.trained else f"lora_B.{ADAPTER}.weight"
        names = [f"{layer}.{of_layer}" for layer in layers]
        true = torch.autograd.grad(h, [client.trained[name] for name in names], gradient.to(h))
    rows = []
    for layer, name, exact in zip(layers, names, true, strict=True):
        a, b = exact.double().flatten(), updates[name].double().flatten()
        lengths = float(a.norm()), float(b.norm())
        cosine = float(a @ b) / (lengths[0] * lengths[1]) if all(lengths) else 0.0
        rows.append(Alignment(layer, cosine, lengths[0] / lengths[1] if lengths[1] else 0.0))
    return rows


def first_batch_alignment(config: Config) -> list[Alignment]:
    """The alignment of every layer that the config's residual feedback trains, from the cut down, on its first batch.

    Measured slopes scale the updates; the alignment is of these before.

    Raises:
        RequestError, ModelError: see `new_session`.
    """
    residual = msgspec.structs.replace(config.residual, slopes="none")
    session = new_session(msgspec.structs.replace(config, residual=residual))
    client = session.client
    assert isinstance(client, ResidualClient), "only residual feedback has an alignment"
    batch = batch_of_step(session.config, session.task, 1)
    server: Any = session.server_to_call(in_round=False)
    reply = server.step(client.forward(batch), batch.targets, step=1, want_gradient=True)
    return alignment(client, batch, reply.gradient)


def alignment_lines(rows: Sequence[Alignment], config: Config) -> list[str]:
    """The table for people of `first_batch_alignment(config)`, with a verdict."""
    width = max(len(row.layer) for row in rows)
    lines = [
        "residual feedback on the first batch: cosine of each layer's update with its true gradient, and the ratio of "
        "their lengths"
    ]
    lines += [f"  {row.layer:<{width}}  {row.cosine:5.2f}  {row.ratio:6.2f}" for row in rows]
    if config.client.trainable == "lora":
        lines.append(
            "of adapters: their second matrix (B); the first one (A) has no gradient before B has moved"
        )
    if config.residual.slopes != "none":
        lines.append(
            f"residual.slopes: {config.residual.slopes} scales these updates by what it measures: the cosines stay"
        )
    blocks = [row for row in rows if row.cosine >= ENOUGH]
    if len(blocks) == len(rows):
        lines.append(f"every layer is at {ENOUGH} or above: residual feedback teaches all of them")
    else:
        lines.append(
            f"{len(rows) - len(blocks)} of {len(rows)} layers are below {ENOUGH} and learn hardly anything: set "
            "residual.blocks to fewer, cut lower so that more of the server's blocks stand above the cut, or take "
            "method: fo-recompute"
        )
    return lines
