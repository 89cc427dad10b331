"""One round of the synchronous schedule: its members, their contributions, and the mean of these."""

import time
from dataclasses import dataclass, field

import numpy as np

from hosl.core.estimators import MOST_DIRECTIONS
from hosl.errors import LimitError

SHARE_OF_A_ROUND = 0.5
"""The share of a usual round's length that a round waits for the others, where it is longer than the grace."""
ROUNDS_REMEMBERED = 9
"""The rounds whose median length is the usual one."""
ROUNDS_NEEDED = 3
"""The rounds that must be known: the first one or two may have waited a night for devices."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """One client's part of a round: its update of the shared client half, and the number of examples behind it."""

    seeds: tuple[int, ...]
    scales: tuple[float, ...]
    examples: int


@dataclass(eq=False)  # each is itself: after a restart another round may have the same number
class Round:
    """A round that collects contributions. It may close when all the clients expected have contributed."""

    number: int
    expected: int
    """The number of clients that must join; once they have, the round waits for the contribution of each member."""
    members: set[str] = field(default_factory=set)
    contributions: dict[str, Contribution] = field(default_factory=dict)
    seeds: set[int] = field(default_factory=set)
    """The directions of all contributions: so many has the update that every client applies."""
    length_s: float = 0.0
    """The seconds from the round's beginning to its newest contribution: not those that it waited in vain."""
    _begin_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._begin_s = time.monotonic()

    def add(self, client: str, contribution: Contribution) -> None:
        """Add the part of one client.

        Raises:
            LimitError: if all parts together would have more than `MOST_DIRECTIONS`.
        """
        new = set(contribution.seeds) - self.seeds
        together = len(self.seeds) + len(new)
        if together > MOST_DIRECTIONS:
            raise LimitError(
                f"the update of round {self.number} would have {together} directions, of which every device makes "
                f"each; {MOST_DIRECTIONS} are allowed: set clients.directions: common, or zo.directions lower"
            )
        self.seeds |= new
        self.contributions[client] = contribution
        self.length_s = time.monotonic() - self._begin_s

    def join(self, client: str) -> None:
        """Add a client as a member; the round waits for it."""
        self.members.add(client)

    @property
    def complete(self) -> bool:
        """Whether no contribution is missing."""
        return len(self.members) >= self.expected and self.members <= self.contributions.keys()

    def mean_update(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """(seeds, scales) of the update that all clients apply: the mean of their updates, weighed by examples.

        Scales of equal seeds are added. The order is that of the clients' names, not of their arrival. Scales are
        rounded to float32, as the journal keeps them.
        """
        total = sum(part.examples for part in self.contributions.values())
        merged: dict[int, float] = {}
        for _, part in sorted(self.contributions.items()):
            for seed, scale in zip(part.seeds, part.scales, strict=True):
                merged[seed] = merged.get(seed, 0.0) + scale * part.examples / total
        return tuple(merged), tuple(float(np.float32(scale)) for scale in merged.values())
