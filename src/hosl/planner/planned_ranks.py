"""The server of a plan's recommended row: over several ranks, or with adapters for each of several devices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hosl.methods.torch_parties import DTYPES
from hosl.planner.plan import PlanRow, Question
from hosl.planner.server_ranks import (
    RankCost,
    RankSpeed,
    options_of,
    rank_costs,
    rank_facts,
    recommended_layout,
)
from hosl.system.readable import aligned, readable_bytes, readable_count


@dataclass(frozen=True, kw_only=True)
class PlannedRanks:
    """The layouts of a server half over several ranks, and the one to take."""

    of: str
    """The row in words."""
    costs: Sequence[RankCost]
    chosen: RankCost | None
    why: str
    limit_bytes: float | None
    """The memory of a rank."""
    between_bytes_per_s: float

    def facts(self) -> dict[str, Any]:
        """Content of --json."""
        return {
            "rank_memory_bytes": self.limit_bytes, "between_ranks_bytes_per_s": self.between_bytes_per_s,
            "why": self.why, "recommended": self.chosen and rank_facts(self.chosen, self.limit_bytes),
            "layouts": [rank_facts(cost, self.limit_bytes) for cost in self.costs],
        }  # fmt: skip

    def lines(self) -> list[str]:
        """The table for people."""
        first = self.costs[0]
        limit = "no limit" if self.limit_bytes is None else readable_bytes(self.limit_bytes)
        names = [
            "", "hosl serve", "held", "at work", "opening", "gathers/step", "exchanged/step", "sent by rank 0",
            "compute s", "exchange s",
        ]  # fmt: skip
        return [
            f"its server half over {first.layout.ranks} ranks ({self.of}), {readable_count(first.rows, 'row')} of a "
            f"request each; a rank: {limit}; between ranks {self.between_bytes_per_s / 1e9:g} GB/s assumed "
            "(--between-ranks)",
            "",
            *aligned([names, *map(self._cells, self.costs)], left="hosl serve"),
            "",
            self.why if self.chosen is None else f"+ fits, -> recommended: {self.why}",
        ]

    def _cells(self, cost: RankCost) -> list[str]:
        mark = "->" if cost is self.chosen else "+" if cost.fits(self.limit_bytes) else ""
        sizes = cost.held_bytes, cost.peak_bytes, cost.loading_bytes
        return [
            mark, options_of(cost.layout), *map(readable_bytes, sizes), f"{cost.gathers:g}",
            *map(readable_bytes, (cost.exchanged_bytes, cost.told_bytes)),
            f"{cost.compute_s:.3f}", f"{cost.exchange_s:.3f}",
        ]  # fmt: skip


def planned_ranks(
    question: Question,
    row: PlanRow,
    *,
    ranks: int,
    limit_bytes: float | None,
    between_bytes_per_s: float,
) -> PlannedRanks:
    """The layouts of the server of a row.

    Raises:
        ConfigError: if that server needs one process.
    """
    config = row.config
    speed = RankSpeed(machine=question.server, between_bytes_per_s=between_bytes_per_s)
    costs = rank_costs(config, question.shape, question.rows, question.tokens, ranks=ranks, speed=speed)
    chosen, why = recommended_layout(costs, limit_bytes)
    return PlannedRanks(
        of=f"cut {config.model.cut}, {row.name}", costs=costs, chosen=chosen, why=why,
        limit_bytes=limit_bytes, between_bytes_per_s=between_bytes_per_s,
    )  # fmt: skip


def own_bytes(row: PlanRow) -> float | None:
    """The weights and optimiser state that each device has of its own on the server; None: they share them."""
    if row.config.clients.server != "personal":
        return None
    return row.server.trained * DTYPES[row.config.model.dtype].itemsize + row.server.state_bytes


def own_lines(row: PlanRow) -> list[str]:
    """A line about the adapters of several devices on the server, if they have some."""
    each, count = own_bytes(row), row.config.clients.count
    if each is None:
        return []
    return [
        f"server: {readable_count(count, 'device')} with {readable_bytes(each)} each of adapters and their optimiser's "
        f"state, {readable_bytes(count * each)} in all, of which `server` above has one; hosl serve --adapter-slots N "
        "keeps N of them on its device"
    ]
