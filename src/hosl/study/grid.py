"""Which runs a study needs next: rates tried on the first seed, the best by dev loss then run on every seed.

Everything here is a function of the summaries that are there: no files, no clocks. So a study that was killed goes
on by asking again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hosl.config import Config, parse_config
from hosl.errors import NonFiniteError

Summary = dict[str, Any]
"""What is kept of a run: `hosl train`'s own summary, its rates, seed, config, command, versions and dev curve."""


@dataclass(frozen=True)
class Row:
    """A row of a table: how it is run, and which learning rates are tried."""

    name: str
    settings: dict[str, Any]
    """Of a run, as its YAML has them, without rates, seed and folder."""
    rates: tuple[float, ...] = (0.0,)
    """Of the client."""
    server_learning_rates: tuple[float, ...] = ()
    """Of the server, each tried with each of `rates`; empty: the one that was chosen for `server_of`."""
    server_of: str = "frozen"
    """The row whose server rate this one takes over."""
    one_rate: bool = False
    """Both halves have the client's rate."""

    def pairs(self, server_learning_rates: Sequence[float]) -> list[tuple[float, float]]:
        """What is tried, given the server's rates: (client's, server's)."""
        if self.one_rate:
            return [(rate, rate) for rate in self.rates]
        return [(rate, of_server) for rate in self.rates for of_server in server_learning_rates]


@dataclass(frozen=True)
class Trial:
    """One run: a row at two rates and a seed."""

    row: Row
    rate: float
    server_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return run_name(self.row.name, self.rate, self.server_rate, self.seed)

    def config(self, output_dir: str) -> Config:
        """The run's complete config.

        Raises:
            ConfigError: naming the row, if its settings are none of a run.
        """
        rates = {"client": {"learning_rate": self.rate}, "server": {"learning_rate": self.server_rate}}
        settings = merged(self.row.settings, rates | {"seed": self.seed, "output_dir": output_dir})
        return parse_config(settings, where=self.row.name)


@dataclass(frozen=True)
class Grid:
    """Rows and seeds; `done` is always every summary that is there, by the name of its `Trial`."""

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]

    @property
    def conceivable(self) -> list[Trial]:
        """Every run that the study could come to need, whichever rates are chosen."""
        rates = {row.name: row.server_learning_rates for row in self.rows}
        found = []
        for row in self.rows:
            pairs = row.pairs(row.server_learning_rates or rates[row.server_of])
            found += [Trial(row, *pair, seed) for pair in pairs for seed in self.seeds]
        return found

    def known(self, done: Mapping[str, Summary]) -> list[Trial]:
        """The runs whose rates are known by now, made or not; all of them, once nothing is needed."""
        found = [t for row in self.rows for t in (*self._trials(row, done), *self._chosen(row, done))]
        return list({t.name: t for t in found}.values())

    def needed(self, done: Mapping[str, Summary]) -> list[Trial]:
        """Of these, the ones that are still to be made."""
        return [t for t in self.known(done) if t.name not in done]

    def chosen(self, done: Mapping[str, Summary]) -> dict[str, list[Summary]]:
        """Of every row that is complete: its summaries at the chosen rates, one per seed.

        A row that diverged at every rate has the summary of the first seed alone.
        """
        found = {row.name: self._chosen(row, done) for row in self.rows}
        return {
            name: [done[t.name] for t in tries]
            for name, tries in found.items()
            if tries and all(t.name in done for t in tries)
        }

    def total(self, done: Mapping[str, Summary]) -> int:
        """How many runs there are in all, as far as one can know."""
        runs = 0
        for row in self.rows:
            chosen = self._chosen(row, done)
            tries = len(row.rates) * max(len(row.server_learning_rates), 1)
            runs += tries + (len(chosen) if chosen else len(self.seeds)) - 1
        return runs

    def _trials(self, row: Row, done: Mapping[str, Summary]) -> list[Trial]:
        """All on the first seed; empty while the server's rate is unknown."""
        if row.one_rate or row.server_learning_rates:
            pairs = row.pairs(row.server_learning_rates)
        else:
            (source,) = (other for other in self.rows if other.name == row.server_of)
            best = self._best(source, done)
            if best is None:
                return []
            if math.isinf(dev_loss(done[best.name])):
                raise NonFiniteError(
                    f"row {source.name} diverged at every server rate tried, {list(source.server_learning_rates)}, and "
                    f"row {row.name} takes its rate over; try lower server_learning_rates"
                )
            pairs = row.pairs((best.server_rate,))
        return [Trial(row, *pair, self.seeds[0]) for pair in pairs]

    def _best(self, row: Row, done: Mapping[str, Summary]) -> Trial | None:
        """The try with the lowest dev loss; None while one is missing."""
        tries = self._trials(row, done)
        if not tries or any(t.name not in done for t in tries):
            return None
        return min(tries, key=lambda t: dev_loss(done[t.name]))

    def _chosen(self, row: Row, done: Mapping[str, Summary]) -> list[Trial]:
        """The best try on every seed; only itself if it diverged, empty while it is unknown."""
        best = self._best(row, done)
        if best is None:
            return []
        seeds = self.seeds[:1] if math.isinf(dev_loss(done[best.name])) else self.seeds
        return [Trial(row, best.rate, best.server_rate, seed) for seed in seeds]


def run_name(row: str, rate: float, server_rate: float, seed: int) -> str:
    """Of a run's files, and of `hosl study --run`."""
    return f"{row}-{rate:g}-{server_rate:g}-seed{seed}"


def dev_loss(summary: Summary) -> float:
    """By which rates are chosen; infinite for a run that diverged."""
    loss = summary.get("dev_loss_nats")
    return math.inf if loss is None or not math.isfinite(loss) else loss


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with `changes` laid over them, section by section; a section of another `kind` replaces the whole."""
    found = dict(settings)
    for name, value in changes.items():
        before = found.get(name)
        if isinstance(before, Mapping) and isinstance(value, Mapping) and _same_kind(before, value):
            found[name] = merged(before, value)
        else:
            found[name] = value
    return found


def _same_kind(before: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return value.get("kind", before.get("kind")) == before.get("kind")
