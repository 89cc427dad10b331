"""One round of the synchronous schedule: who takes part, what they contributed, and its mean."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Contribution:
    """One client's part: its update of the shared halves, and how many examples it stands for."""

    seeds: tuple[int, ...]
    scales: tuple[float, ...]
    examples: int


@dataclass
class Round:
    """A round that is gathering. It may close when everybody expected has contributed."""

    number: int
    expected: int
    """How many clients the round waits for before it has seen them; members count from then on."""
    members: set[str] = field(default_factory=set)
    contributions: dict[str, Contribution] = field(default_factory=dict)
    began: float | None = None
    """When the first contribution came, by the service's clock."""

    def join(self, client: str) -> None:
        """A client that is here and will be waited for."""
        self.members.add(client)

    @property
    def complete(self) -> bool:
        """Whether nobody is missing."""
        return len(self.members) >= self.expected and self.members <= self.contributions.keys()

    def mean_update(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The update that every client applies: each one's scales weighed by its examples; equal seeds are added.

        In the order of the clients' names, whoever was first. float32, as the journal keeps it.
        """
        total = sum(part.examples for part in self.contributions.values())
        merged: dict[int, float] = {}
        for _, part in sorted(self.contributions.items()):
            for seed, scale in zip(part.seeds, part.scales, strict=True):
                merged[seed] = merged.get(seed, 0.0) + scale * part.examples / total
        return tuple(merged), tuple(float(np.float32(scale)) for scale in merged.values())
