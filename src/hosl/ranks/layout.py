"""The layout of ranks, and the place of this process in it, by the environment that torchrun sets too. No torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hosl.errors import ConfigError

STORE = "HOSL_RANKS_STORE"
"""The environment variable with the file by which the ranks of one machine find each other."""
BROKEN = 75
"""The exit status of a rank whose group broke: to be started again, all ranks together (EX_TEMPFAIL)."""

RowsOn = Literal["split", "all"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The share of each rank: of the rows of a request, and of the weights."""

    ranks: int
    per_copy: int
    """The ranks that hold one copy of the weights together; 1: each rank holds all of them."""
    rows: RowsOn = "split"
    """split: each rank computes its share of the rows. all: each computes every row, the bits of one process."""
    keep_gathered: bool = False
    """Whether weights that were gathered for a question stay so until they change."""

    def __post_init__(self) -> None:
        if self.ranks < 2:
            raise ConfigError(f"--ranks {self.ranks}: several are two or more; leave it out for one")
        if self.per_copy < 1 or self.ranks % self.per_copy:
            raise ConfigError(
                f"--ranks-per-copy {self.per_copy} must divide --ranks {self.ranks} into whole copies of the half; "
                f"{self.ranks} makes one copy, 1 makes {self.ranks}"
            )

    @property
    def described(self) -> str:
        """A line about what each rank has."""
        copies = "one copy" if self.copies == 1 else f"{self.copies} copies"
        weights = (
            f"{copies} of the weights over {self.per_copy} each"
            if self.per_copy > 1
            else "each with all weights"
        )
        rows = "every row on each" if self.rows == "all" else "rows shared out"
        return f"{self.ranks} ranks: {weights}, {rows}"

    @property
    def copies(self) -> int:
        """The number of copies of the weights."""
        return self.ranks // self.per_copy


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process among the ranks."""

    rank: int
    local_rank: int
    """Its number on this machine, which is that of its GPU."""
    ranks: int
    store: Path | None = None
    """The file of the launcher's store; None: the ranks meet at MASTER_ADDR and MASTER_PORT, as torchrun has it."""


def place_of_process(ranks: int) -> Place | None:
    """The place that the environment gives this process; None: it gives none, and ranks are still to be started.

    Raises:
        ConfigError: if the environment is of another number of ranks, or incomplete.
    """
    environment = os.environ
    if "RANK" not in environment or not (STORE in environment or "MASTER_ADDR" in environment):
        return None
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    try:
        rank, local_rank, world = (int(environment[name]) for name in names)
    except (KeyError, ValueError) as cause:
        raise ConfigError(
            f"the environment of a rank has {', '.join(names)} as numbers, as torchrun sets them: {cause!r}"
        ) from cause
    if world != ranks or not 0 <= rank < world:
        raise ConfigError(
            f"--ranks {ranks}: the environment says rank {rank} of {world}; give the same number to both, such as "
            f"`torchrun --nnodes 1 --nproc-per-node {ranks} -m hosl serve ... --ranks {ranks}`"
        )
    store = environment.get(STORE)
    return Place(rank=rank, local_rank=local_rank, ranks=world, store=Path(store) if store else None)
