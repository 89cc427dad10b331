"""The rows of a request among the ranks: each gets as many, the last ones filled with the last row at weight 0.

Nobody is left without a row: a forward pass without rows fails in some models, and the other ranks would wait for it.
"""

from dataclasses import dataclass
from typing import Any

import torch

from hosl.ranks.group import Group


@dataclass(frozen=True, slots=True)
class Share:
    """The rows of one rank."""

    rows: tuple[int, ...]
    """Their indices in the request; the same number on every rank."""
    own: int
    """The number of them that count; those after it are filler, counted by another rank."""


def share_of(rows: int, rank: int, ranks: int) -> Share:
    """The share of `rank` in a request of `rows` rows: the next ceil(rows / ranks) of them."""
    each = -(-rows // ranks)
    start = rank * each
    return Share(
        tuple(min(row, rows - 1) for row in range(start, start + each)), min(max(rows - start, 0), each)
    )


class OwnRows(torch.autograd.Function):
    """[rows, ...] -> those of this rank; backward, every rank gets the gradients of all rows."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, share: Share, group: Group) -> torch.Tensor:
        """[rows, ...] -> [share, ...]."""
        ctx.rows, ctx.group = len(h), group
        return h[list(share.rows)]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """[share, ...] -> [rows, ...]."""
        # filler stands after the last row that counts, so that it is cut off
        return ctx.group.gathered(gradients[0])[: ctx.rows], None, None


class AllRows(torch.autograd.Function):
    """The identity; backward, every rank gets rank 0's gradient: it alone counts its rows."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, group: Group) -> torch.Tensor:
        """As it is."""
        ctx.group = group
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Rank 0's."""
        return ctx.group.of_first(gradients[0]), None


class ValueOfAll(torch.autograd.Function):
    """(part, value) -> value; backward as if it were the part: the loss of all ranks, each with its own gradient."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The value."""
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """To the part."""
        return gradients[0], None
