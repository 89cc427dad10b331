"""Losses of several batches in one forward pass of a server half: of many clients, or of both sides of a probe.

Rows of batches are put below each other; shorter ones are filled on the right, by at most an eighth, with positions
that no row sees. What a row's loss is does not depend on the rows beside it, but for rounding: matrix products of
other sizes add in another order (at most 3e-7 of the loss in float32). Each batch's mean is taken from its own rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from hosl.core.targets import ClassTargets, Targets
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
    return by_groups(
        parts, lambda part: loss_of(half, part), lambda some: stacked_losses(half, *stacked(some))
    )


def by_groups(
    parts: Sequence[Part],
    alone: Callable[[Part], torch.Tensor],
    together: Callable[[Sequence[Part]], Sequence[torch.Tensor]],
) -> list[torch.Tensor]:
    """The loss of each batch: of groups `together`, of one that no other goes with `alone`."""
    losses: dict[int, torch.Tensor] = {}
    for group in groups(parts):
        some = [parts[index] for index in group]
        losses |= dict(zip(group, [alone(some[0])] if len(some) == 1 else together(some), strict=True))
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


@dataclass(frozen=True, slots=True, eq=False)
class Stacked:
    """The targets of batches whose rows stand below each other, and what each counts in the mean loss of its batch."""

    mask: np.ndarray
    """[rows, longest], int8."""
    rows: np.ndarray
    """[scored], int64: the row of each scored token, or of each class; ascending."""
    positions: np.ndarray | None
    """[scored], int64: the position in its row; None: of classes."""
    labels: np.ndarray
    """[scored], int64: the right token or class."""
    weights: np.ndarray
    """[scored], float64: of its loss in the mean of its batch."""
    batches: np.ndarray
    """[scored], int64: the number of its batch; ascending."""
    count: int
    """The number of batches."""

    def of_rows(self, rows: Sequence[int], counted: int) -> "Stacked":
        """These rows alone, ascending, of which the first `counted` count; the weights of the others are 0."""
        found = [np.nonzero(self.rows == row)[0] for row in rows]
        at = np.concatenate(found)
        new_rows = np.repeat(np.arange(len(rows)), [len(of_row) for of_row in found])
        return replace(
            self, mask=self.mask[list(rows)], rows=new_rows, labels=self.labels[at], batches=self.batches[at],
            positions=None if self.positions is None else self.positions[at],
            weights=np.where(new_rows < counted, self.weights[at], 0.0),
        )  # fmt: skip


def stacked(parts: Sequence[Part]) -> tuple[torch.Tensor, Stacked]:
    """The activations of batches that `groups` puts together, [rows, longest, width], and their targets."""
    longest = max(h.shape[1] for h, _ in parts)
    hidden = torch.cat([F.pad(h, (0, 0, 0, longest - h.shape[1])) for h, _ in parts])
    mask = np.concatenate([np.pad(t.mask, ((0, 0), (0, longest - t.mask.shape[1]))) for _, t in parts])
    rows, positions, labels, weights = zip(*(_scored(t) for _, t in parts), strict=True)
    first_rows = np.cumsum([0, *(len(h) for h, _ in parts[:-1])])
    return hidden, Stacked(
        mask=mask, rows=np.concatenate([r + first for r, first in zip(rows, first_rows, strict=True)]),
        positions=None if positions[0] is None else np.concatenate(positions), labels=np.concatenate(labels),
        weights=np.concatenate(weights), batches=np.repeat(np.arange(len(parts)), [len(r) for r in rows]),
        count=len(parts),
    )  # fmt: skip


def stacked_losses(half: ServerHalf, hidden: torch.Tensor, targets: Stacked) -> list[torch.Tensor]:
    """The mean loss of each batch, nats, in one forward pass; of some rows, their part of it."""
    device = hidden.device
    mask = torch.from_numpy(targets.mask).to(device, torch.int64)
    if targets.positions is None:
        logits = half(hidden, mask)[torch.from_numpy(targets.rows).to(device)]
    else:
        places = np.stack([targets.rows, targets.positions], axis=1)
        logits = half(hidden, mask, torch.from_numpy(places).to(device))[0]
    of_each = F.cross_entropy(widened(logits), torch.from_numpy(targets.labels).to(device), reduction="none")
    weighed = of_each * torch.from_numpy(targets.weights).to(of_each)
    counts = np.bincount(targets.batches, minlength=targets.count).tolist()
    return [of_batch.sum() for of_batch in weighed.split(counts)]


def _scored(targets: Targets) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
    """Of the scored tokens, or of each row's class: row, position or None, token or class, weight in the mean."""
    if isinstance(targets, ClassTargets):
        rows = np.arange(len(targets.labels))
        return rows, None, targets.labels.astype(np.int64), np.full(len(rows), 1 / len(rows))
    scored = targets.tokens >= 0
    rows, spans = np.nonzero(scored)
    if targets.mean_over == "tokens":
        weights = np.full(len(rows), 1 / len(rows))
    else:
        weights = 1 / (len(scored) * scored.sum(axis=1)[rows])
    return (
        rows,
        targets.positions[rows, spans].astype(np.int64),
        targets.tokens[rows, spans].astype(np.int64),
        weights,
    )
