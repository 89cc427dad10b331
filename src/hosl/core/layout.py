"""The layout of a server half over several processes, the ranks: who holds which weights and computes which rows."""

from dataclasses import dataclass
from typing import Literal

from hosl.errors import ConfigError

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
