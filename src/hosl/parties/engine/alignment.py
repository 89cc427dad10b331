"""How far residual feedback is right: the cosine of each layer's update with its true gradient, on one batch.

Needs autograd and a graph of the trained blocks, so it is for a machine with memory to spare, not for a run: `hosl plan
--probe` and tests. Source: methods.md (o), with the cosines of SmolLM2-135M by depth.
"""

from dataclasses import dataclass
from typing import Any

import torch

from hosl.core.targets import Batch


@dataclass(frozen=True, slots=True)
class Alignment:
    """One layer's update by residual feedback beside its true gradient."""

    layer: str
    """The layer's name in the half."""
    cosine: float
    """1: the same direction; 0: none of it."""
    ratio: float
    """|true gradient| / |update at rate 1|."""


def alignment(client: Any, batch: Batch, gradient: torch.Tensor) -> list[Alignment]:
    """The alignment of every layer that a `ResidualClient` trains, from the cut down. No weight changes.

    Args:
        client: the client, with whole weights trained; decay and optimiser do not count.
        batch: a batch of the task.
        gradient: dL/dh [rows, seq, width] of this batch.
    """
    updates = client.feedback_gradients(batch, gradient)
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets.mask).to(torch.int64)
    with torch.enable_grad():
        h = client.half(ids.to(client.device), mask.to(client.device))
        names = [f"{layer}.weight" for layer in reversed(client.layers)]
        true = torch.autograd.grad(h, [client.trained[name] for name in names], gradient.to(h))
    rows = []
    for name, exact in zip(names, true, strict=True):
        a, b = exact.double().flatten(), updates[name].double().flatten()
        lengths = float(a.norm()), float(b.norm())
        cosine = float(a @ b) / (lengths[0] * lengths[1]) if all(lengths) else 0.0
        rows.append(
            Alignment(name.removesuffix(".weight"), cosine, lengths[0] / lengths[1] if lengths[1] else 0.0)
        )
    return rows
