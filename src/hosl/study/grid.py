"""Runs that a study needs next: rates tried on the first seed, the best by dev loss then run on every seed.

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
"""Record of a run that is kept: `hosl train`'s summary, its rates, seed, config, command, versions and dev curve."""


@dataclass(frozen=True)
class Arm:
    """Arm of a study, a row of its table: how it is run, and the learning rates that are tried."""

    name: str
    settings: dict[str, Any]
    """Settings of a run, as its YAML has them, without rates, seed and folder."""
    rates: tuple[float, ...] = (0.0,)
    """Client's learning rates."""
    server_learning_rates: tuple[float, ...] = ()
    """Server's learning rates, each tried with each of `rates`; empty: the one that was chosen for `server_of`."""
    server_of: str = "frozen"
    """The arm whose server rate this one takes over."""
    one_rate: bool = False
    """Both halves have the client's rate."""

    def pairs(self, server_learning_rates: Sequence[float]) -> list[tuple[float, float]]:
        """Rates that are tried, given the server's: (client's, server's)."""
        if self.one_rate:
            return [(rate, rate) for rate in self.rates]
        return [(rate, of_server) for rate in self.rates for of_server in server_learning_rates]


@dataclass(frozen=True)
class Trial:
    """One run: an arm at two rates and a seed."""

    arm: Arm
    rate: float
    server_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return run_name(self.arm.name, self.rate, self.server_rate, self.seed)

    def config(self, output_dir: str) -> Config:
        """The run's complete config.

        Raises:
            ConfigError: naming the arm, if its settings are none of a run.
        """
        rates = {"client": {"learning_rate": self.rate}, "server": {"learning_rate": self.server_rate}}
        settings = merged(self.arm.settings, rates | {"seed": self.seed, "output_dir": output_dir})
        return parse_config(settings, where=self.arm.name)


@dataclass(frozen=True)
class Grid:
    """Arms and seeds; `done` is always every summary that is there, by the name of its `Trial`."""

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]

    @property
    def conceivable(self) -> list[Trial]:
        """Every run that the study could come to need, whichever rates are chosen."""
        rates = {arm.name: arm.server_learning_rates for arm in self.arms}
        runs = []
        for arm in self.arms:
            pairs = arm.pairs(arm.server_learning_rates or rates[arm.server_of])
            runs += [Trial(arm, *pair, seed) for pair in pairs for seed in self.seeds]
        return runs

    def settled(self, done: Mapping[str, Summary]) -> list[Trial]:
        """The runs whose rates are settled by now, made or not; all of them, once nothing is needed."""
        settled = [t for arm in self.arms for t in (*self._trials(arm, done), *self._chosen(arm, done))]
        return list({t.name: t for t in settled}.values())

    def needed(self, done: Mapping[str, Summary]) -> list[Trial]:
        """Settled runs that are still to be made."""
        return [t for t in self.settled(done) if t.name not in done]

    def chosen(self, done: Mapping[str, Summary]) -> dict[str, list[Summary]]:
        """Summaries of every complete arm at the chosen rates, one per seed.

        An arm that diverged at every rate has the summary of the first seed alone.
        """
        trials = {arm.name: self._chosen(arm, done) for arm in self.arms}
        return {
            name: [done[t.name] for t in tries]
            for name, tries in trials.items()
            if tries and all(t.name in done for t in tries)
        }

    def total(self, done: Mapping[str, Summary]) -> int:
        """Number of runs there are in all, as far as one can know."""
        return sum(self.runs_of(arm, done) for arm in self.arms)

    def runs_of(self, arm: Arm, done: Mapping[str, Summary]) -> int:
        """Number of runs of one arm, as far as one can know: every rate on the first seed, the best on the others."""
        chosen = self._chosen(arm, done)
        tries = len(arm.rates) * max(len(arm.server_learning_rates), 1)
        return tries + (len(chosen) if chosen else len(self.seeds)) - 1

    def _trials(self, arm: Arm, done: Mapping[str, Summary]) -> list[Trial]:
        """All trials on the first seed; empty while the server's rate is unknown."""
        if arm.one_rate or arm.server_learning_rates:
            pairs = arm.pairs(arm.server_learning_rates)
        else:
            (source,) = (other for other in self.arms if other.name == arm.server_of)
            best = self._best(source, done)
            if best is None:
                return []
            if math.isinf(dev_loss(done[best.name])):
                raise NonFiniteError(
                    f"row {source.name} diverged at every server rate tried, {list(source.server_learning_rates)}, and "
                    f"row {arm.name} takes its rate over; try lower server_learning_rates"
                )
            pairs = arm.pairs((best.server_rate,))
        return [Trial(arm, *pair, self.seeds[0]) for pair in pairs]

    def _best(self, arm: Arm, done: Mapping[str, Summary]) -> Trial | None:
        """The try with the lowest dev loss; None while one is missing."""
        tries = self._trials(arm, done)
        if not tries or any(t.name not in done for t in tries):
            return None
        return min(tries, key=lambda t: dev_loss(done[t.name]))

    def _chosen(self, arm: Arm, done: Mapping[str, Summary]) -> list[Trial]:
        """The best try on every seed; only itself if it diverged, empty while it is unknown."""
        best = self._best(arm, done)
        if best is None:
            return []
        seeds = self.seeds[:1] if math.isinf(dev_loss(done[best.name])) else self.seeds
        return [Trial(arm, best.rate, best.server_rate, seed) for seed in seeds]


def run_name(arm: str, rate: float, server_rate: float, seed: int) -> str:
    """Name of a run's files, and for `hosl study --run`."""
    return f"{arm}-{rate:g}-{server_rate:g}-seed{seed}"


def dev_loss(summary: Summary) -> float:
    """Dev loss, by which rates are chosen; infinite for a run that diverged."""
    loss = summary.get("dev_loss_nats")
    return math.inf if loss is None or not math.isfinite(loss) else loss


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with `changes` laid over them, section by section; a section of another `kind` replaces the whole."""
    whole = dict(settings)
    for name, value in changes.items():
        before = whole.get(name)
        if isinstance(before, Mapping) and isinstance(value, Mapping) and _same_kind(before, value):
            whole[name] = merged(before, value)
        else:
            whole[name] = value
    return whole


def _same_kind(before: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return value.get("kind", before.get("kind")) == before.get("kind")
