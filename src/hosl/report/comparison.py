"""Arms compared: each one's metrics over seeds, p and gap closure beside the two reference arms, and its costs. Pure.

An arm is a way to train as it is compared: runs that differ by their seed alone. Folders become arms in `groups`, a
study's summaries in `hosl.study.tables`; `tables`, the templates and `figures` show them. Gap closure G is the share of
the performance gap recovered: 0 for the frozen arm, 1 for the first-order one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from hosl.report.statistics import GapClosure, NoGap, gap_closure, mean_interval, paired_p, spread_text

_SAME_WORK = ("max_steps", "per_device_train_batch_size", "task.")


@dataclass(frozen=True)
class Metric:
    """Number that every finished run has."""

    key: str
    """Its key in the summary of a run."""
    heading: str = ""
    gap_heading: str = ""
    scale: float = 1.0
    """Factor by which it is shown."""
    digits: int = 4
    lower_is_better: bool = True


ACCURACY = Metric("test_accuracy", "test accuracy, %", "G (accuracy)", 100.0, 2, lower_is_better=False)
TOKENS = replace(ACCURACY, heading="test tokens right, %", gap_heading="G (tokens right)")
LOSS = Metric("test_loss_nats", "test loss, nats", "G (loss)")
DEV_LOSS = Metric("dev_loss_nats", "dev loss, nats", "G (loss)")


def learns_texts(settings: Mapping[str, Any] | None) -> bool:
    """Whether runs with these settings, by dotted path, learn texts token by token: there are no classes then."""
    return (settings or {}).get("task.kind") == "sft"


def accuracy_of(settings: Mapping[str, Any] | None) -> Metric:
    """`ACCURACY`, or `TOKENS` where texts are learned."""
    return TOKENS if learns_texts(settings) else ACCURACY


@dataclass(frozen=True)
class Costs:
    """Price of an arm; None where no step was timed."""

    peak_bytes: float | int | None
    """The most that the client's tensors took in any run."""
    bytes_up: float | int
    """Mean over steps, as `bytes_down`."""
    bytes_down: float | int
    step_s: float | None
    """Median step."""
    eval_bytes_up: float = 0.0
    """Bytes of a run's evaluations, mean over runs, as `eval_bytes_down`; 0: not known."""
    eval_bytes_down: float = 0.0


@dataclass(frozen=True)
class Arm:
    """Runs that differ by their seed alone, and what they came to."""

    label: str
    way: str
    """The label without the cut: what has a colour of its own."""
    method: str
    settings: Mapping[str, Any] | None
    """Dotted path -> value; None: not known, so that it counts as the same work."""
    values: Mapping[str, Mapping[int, float | int]]
    """Key of a metric -> seed -> value."""
    costs: Costs
    details: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Further columns of its row: heading -> (text, smaller text behind it)."""
    diverged: str = ""
    """On how many of its runs, if on any."""

    def numbers(self, metric: Metric) -> np.ndarray:
        """One number per seed, as it is shown."""
        return metric.scale * np.array(list(self.values.get(metric.key, {}).values()), dtype=float)


@dataclass(frozen=True)
class Measure:
    """One metric of an arm over its seeds, and beside the reference arms."""

    numbers: np.ndarray
    """One per seed, as they are shown."""
    digits: int
    p: float | NoGap | None
    """Against the frozen arm; None: it is that arm, or has one seed."""
    gap: GapClosure | NoGap

    @property
    def spread(self) -> str:
        """`44.04 ± 0.64`; of one seed its number."""
        return spread_text(self.numbers, self.digits)

    @property
    def interval(self) -> str:
        """95 % interval of the mean as `[38.29, 49.79]`; empty for one seed."""
        if len(self.numbers) < 2:
            return ""
        low, high = mean_interval(self.numbers)
        return f"[{low:.{self.digits}f}, {high:.{self.digits}f}]"

    @property
    def p_text(self) -> str:
        """`0.25`, or why there is none."""
        return "" if self.p is None else self.p if isinstance(self.p, NoGap) else f"{self.p:.3g}"


@dataclass(frozen=True)
class Row:
    """Arm beside the two that are 0 and 1 of its gap closure, at the same cut."""

    arm: Arm
    frozen: Arm | None
    first_order: Arm | None

    def measure(self, metric: Metric) -> Measure:
        """A metric with what it is worth beside the reference arms."""
        return Measure(self.arm.numbers(metric), metric.digits, *self._beside(metric))

    def _beside(self, metric: Metric) -> tuple[float | NoGap | None, GapClosure | NoGap]:
        """(p, G), each a number or the reason why there is none."""
        arm, frozen, first_order = self.arm, self.frozen, self.first_order
        if frozen is None or frozen.diverged:
            reason = NoGap.NO_FROZEN if frozen is None else NoGap.FROZEN_DIVERGED
            return reason, reason
        if len(arm.values.get(metric.key, {})) < 2:
            return None, NoGap.ONE_SEED if arm.values.get(metric.key) else NoGap.UNFINISHED
        if not _same_work(arm, frozen):
            return NoGap.OTHER_WORK, NoGap.OTHER_WORK
        paired = _by_shared_seeds(metric, arm, frozen)
        p = None if arm is frozen else NoGap.FEW_SHARED if paired is None else paired_p(*paired)
        if first_order is None or first_order.diverged:
            return p, NoGap.NO_FIRST_ORDER if first_order is None else NoGap.FIRST_ORDER_DIVERGED
        if not _same_work(first_order, frozen):
            return p, NoGap.FIRST_ORDER_OTHER_WORK
        of_three = _by_shared_seeds(metric, arm, frozen, first_order)
        if of_three is None:
            return p, NoGap.FEW_SHARED
        return p, gap_closure(*of_three, lower_is_better=metric.lower_is_better)


@dataclass(frozen=True)
class Comparison:
    """Rows whose numbers may stand beside each other."""

    rows: Sequence[Row]

    @property
    def metrics(self) -> tuple[Metric, Metric]:
        """Test accuracy, or tokens right, and loss."""
        return accuracy_of(self.rows[0].arm.settings if self.rows else None), LOSS

    @cached_property
    def measures(self) -> list[Measure]:
        """Test accuracy and loss of every row that has not diverged."""
        return [row.measure(m) for row in self.rows if not row.arm.diverged for m in self.metrics]

    @property
    def reasons(self) -> list[NoGap]:
        """Reasons for which measures have no gap closure, each once."""
        return list(dict.fromkeys(m.gap for m in self.measures if isinstance(m.gap, NoGap)))

    @property
    def has_columns(self) -> bool:
        """Whether p and gap closure have columns: a reason that all rows share stands in the note alone."""
        numbers = any(
            isinstance(number, float | GapClosure) for m in self.measures for number in (m.p, m.gap)
        )
        return numbers or len(self.reasons) > 1


def same_work(settings: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether runs made the same steps of the same task, by dotted paths; else their gap closure means nothing."""
    return all(value == others.get(path) for path, value in settings.items() if path.startswith(_SAME_WORK))


def _same_work(arm: Arm, other: Arm) -> bool:
    """Whether two arms did; those of an earlier version do not say, and all of its arms do."""
    return arm.settings is None or other.settings is None or same_work(arm.settings, other.settings)


def _by_shared_seeds(metric: Metric, *arms: Arm) -> list[np.ndarray] | None:
    """Values of each arm at the seeds that all have, in the order of the seeds; None: under two."""
    values = [arm.values.get(metric.key, {}) for arm in arms]
    seeds = sorted(set.intersection(*map(set, values)))
    return [np.array([of[seed] for seed in seeds], float) for of in values] if len(seeds) > 1 else None
