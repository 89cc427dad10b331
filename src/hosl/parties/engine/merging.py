"""Losses of several batches in one forward pass of a server half: of many clients, or of both sides of a probe.

Rows of batches are put below each other; shorter ones are filled on the right, by at most an eighth, with positions
that no row sees. What a row's loss is does not depend on the rows beside it, but for rounding: matrix products of
other sizes add in another order (at most 3e-7 of the loss in float32). Each batch's mean is taken from its own rows.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from hosl.core.targets import OptionTargets, Targets
from hosl.parties.engine.loss import mean_loss, wanted_positions, widened
from hosl.split import ServerHalf


class Part(NamedTuple):
    """One batch: activations [rows, seq, width] on the half's device, and their targets."""

    activations: torch.Tensor
    targets: Targets


def logits_of(half: ServerHalf, part: Part) -> torch.Tensor:
    """The logits of one batch that its loss needs, in a forward pass of its own."""
    h, targets = part
    mask = torch.from_numpy(targets.mask).to(h.device, torch.int64)
    positions = wanted_positions(targets)
    return half(h, mask, None if positions is None else positions.to(h.device))


def loss_of(half: ServerHalf, part: Part) -> torch.Tensor:
    """The mean loss of one batch, nats, in a forward pass of its own."""
    return mean_loss(logits_of(half, part), part.targets)


def merged_losses(half: ServerHalf, parts: Sequence[Part]) -> list[torch.Tensor]:
    """The mean loss of each batch, nats, in as few forward passes as their lengths and dtypes allow.

    A batch that no other goes with has the loss of `loss_of`, bit for bit.
    """
    losses: dict[int, torch.Tensor] = {}
    for group in groups(parts):
        together = [parts[index] for index in group]
        found = _losses(half, together) if len(together) > 1 else [loss_of(half, together[0])]
        losses |= dict(zip(group, found, strict=True))
    return [losses[index] for index in range(len(parts))]


def groups(parts: Sequence[Part]) -> Iterator[list[int]]:
    """Indices of the batches that go into one pass: one kind of targets, one dtype, lengths within an eighth.

    The batches of a group are one group, in the same order.
    """

    def sort(index: int) -> tuple[str, str, int]:
        h, targets = parts[index]
        return type(targets).__name__, str(h.dtype), -h.shape[1]

    group = list[int]()
    for index in sorted(range(len(parts)), key=sort):
        if group:
            *kind, least = sort(index)
            *first_kind, most = sort(group[0])
            if kind != first_kind or 8 * least > 7 * most:  # both are negative
                yield group
                group = []
        group.append(index)
    if group:
        yield group


def _losses(half: ServerHalf, parts: Sequence[Part]) -> list[torch.Tensor]:
    longest = max(h.shape[1] for h, _ in parts)
    device = parts[0].activations.device
    hidden = torch.cat([F.pad(h, (0, 0, 0, longest - h.shape[1])) for h, _ in parts])
    mask = np.concatenate([np.pad(t.mask, ((0, 0), (0, longest - t.mask.shape[1]))) for _, t in parts])
    mask_there = torch.from_numpy(mask).to(device, torch.int64)
    options = [t for _, t in parts if isinstance(t, OptionTargets)]
    if not options:
        logits = half(hidden, mask_there)
        of_part = logits.split([len(h) for h, _ in parts])
        return [mean_loss(of_rows, t) for of_rows, (_, t) in zip(of_part, parts, strict=True)]
    places, tokens, weights, counts = _scored(options)
    logits = half(hidden, mask_there, torch.from_numpy(places).to(device))[0]
    of_tokens = F.cross_entropy(widened(logits), torch.from_numpy(tokens).to(device), reduction="none")
    weighed = of_tokens * torch.from_numpy(weights).to(of_tokens)
    return [of_part.sum() for of_part in weighed.split(counts)]


def _scored(
    options: Sequence[OptionTargets],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Of the scored tokens of all batches: (row, position), token and weight in its batch's mean; their counts."""
    places, tokens, weights, first_row = list[np.ndarray](), list[np.ndarray](), list[np.ndarray](), 0
    for targets in options:
        scored = targets.tokens >= 0
        rows, spans = np.nonzero(scored)
        places.append(np.stack([first_row + rows, targets.positions[rows, spans].astype(np.int64)], axis=1))
        tokens.append(targets.tokens[rows, spans].astype(np.int64))
        if targets.mean_over == "tokens":
            weights.append(np.full(len(rows), 1 / len(rows)))
        else:
            weights.append(1 / (len(scored) * scored.sum(axis=1)[rows]))
        first_row += len(scored)
    return np.concatenate(places), np.concatenate(tokens), np.concatenate(weights), [len(t) for t in tokens]
