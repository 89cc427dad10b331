"""The place of this process among the ranks, by the environment that torchrun sets too. No torch."""

import os
from dataclasses import dataclass
from pathlib import Path

from hosl.errors import ConfigError

STORE = "HOSL_RANKS_STORE"
"""The environment variable with the file by which the ranks of one machine find each other."""
BROKEN = 75
"""The exit status of a rank whose group broke: to be started again, all ranks together (EX_TEMPFAIL)."""


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
