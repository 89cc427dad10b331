"""Runs of a report as groups that differ by seed alone, named by what tells them apart.

Groups of one task and one model stand together: only their numbers may stand beside each other.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hosl.core.methods import FIRST_ORDER, FROZEN, METHODS
from hosl.report.comparison import Arm, Comparison, Costs, Row, same_work
from hosl.report.runs import ReferenceRuns, Run, setting_text

_TELLING = (
    "zo.directions", "client.trainable", "client.learning_rate", "server.learning_rate", "zo.distribution",
    "per_device_train_batch_size", "max_steps",
)  # fmt: skip
"""Settings that are named first where several tell two groups apart."""
_SHORT = {"learning rate": "rate", "zo ": "", "model ": ""}


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed alone."""

    way: str
    """The method, and what tells it apart from others at the same cut; what has a colour of its own."""
    cut: int
    label: str
    """The way, and the cut where there are several."""
    runs: tuple[Run, ...]
    """One per seed, ascending."""

    @property
    def method(self) -> str:
        """Method of all its runs."""
        return self.runs[0].method

    @cached_property
    def finished(self) -> dict[int, Run]:
        """Its finished runs, by seed."""
        return {run.seed: run for run in self.runs if run.test}

    @property
    def timings(self) -> list[dict[str, Any]]:
        """Lines of timings.jsonl of all its runs."""
        return [line for run in self.runs for line in run.timings]

    @cached_property
    def arm(self) -> Arm:
        """The group as a comparison has it: what its finished runs reached, what all of them cost."""
        unfinished = len(self.runs) - len(self.finished)
        seeds = (f"{len(self.finished)}", f"{unfinished} unfinished" if unfinished else "")
        tests = {seed: run.test for seed, run in self.finished.items() if run.test}
        values = {
            f"test_{key}": {s: test[key] for s, test in tests.items()} for key in ("accuracy", "loss_nats")
        }
        peaks = [line["client_peak_bytes"] for line in self.timings]
        costs = Costs(
            max(peaks, default=None), self._bytes_per_step("up"), self._bytes_per_step("down"),
            median(line["step_s"] for line in self.timings) if self.timings else None,
            *(self._eval_bytes(direction) for direction in ("up", "down")),
        )  # fmt: skip
        details = ({"cut": (f"{self.cut}", "")} if self.label != self.way else {}) | {"seeds": seeds}
        return Arm(self.label, self.way, self.method, self.runs[0].settings, values, costs, details)

    @property
    def dev_loss(self) -> float:
        """Mean over its finished runs of the last dev loss."""
        losses = [run.dev[-1]["loss_nats"] for run in self.finished.values() if run.dev]
        return float(np.mean(losses or [np.inf]))

    def _eval_bytes(self, direction: str) -> float:
        evaluations = [line for run in self.runs for line in (*run.dev, *([run.test] if run.test else []))]
        return sum(line.get(f"eval_bytes_{direction}", 0) for line in evaluations) / len(self.runs)

    def _bytes_per_step(self, direction: str) -> float:
        counts = [step[f"bytes_{direction}"] for run in self.runs for step in run.steps]
        return sum(counts) / max(len(counts), 1)


@dataclass(frozen=True)
class TaskGroups:
    """Groups of one task and one model, by cut and method."""

    groups: tuple[Group, ...]

    @property
    def first(self) -> Run:
        """The run that the names of task and model are taken from."""
        return self.groups[0].runs[0]

    @property
    def methods(self) -> dict[str, str]:
        """Way -> its method, in the order of methods."""
        by_method = sorted(self.groups, key=lambda group: _method_place(group.method))
        return {group.way: group.method for group in by_method}

    @property
    def cuts(self) -> list[int]:
        """Cuts, ascending."""
        return sorted({group.cut for group in self.groups})

    def comparison(self, of_study: ReferenceRuns | None = None) -> Comparison:
        """Its groups beside the two reference groups; `of_study`: which these are, by a study's own rows."""
        rows = [
            Row(group.arm, *(self._reference(group, end, of_study) for end in (0, 1)))
            for group in self.groups
        ]
        return Comparison(rows)

    def _reference(self, group: Group, end: int, of_study: ReferenceRuns | None) -> Arm | None:
        """Arm that is 0 (end 0) or 1 (end 1) of a group's gap closure, at the same cut, after the same work if any is.

        A study says which; else it is the group of its method, of several the one with the lowest dev loss.
        """

        def is_reference(other: Group) -> bool:
            if of_study is None:
                return other.method == (FROZEN, FIRST_ORDER)[end]
            named = of_study[group.runs[0].folder][end]
            return named is not None and other.runs[0].settings == named.settings

        candidates = [
            other
            for other in self.groups
            if is_reference(other) and other.cut == group.cut and other.finished
        ]
        alike = [other for other in candidates if same_work(group.runs[0].settings, other.runs[0].settings)]
        nearest = min(alike or candidates, key=lambda other: other.dev_loss, default=None)
        return nearest.arm if nearest else None


@dataclass(frozen=True)
class PlannedLine:
    """Memory that a way to train would take at several cuts, by the planner."""

    way: str
    method: str
    peak_bytes: dict[int, float]
    """Cut -> bytes."""


def by_task_and_model(runs: Iterable[Run]) -> list[TaskGroups]:
    """Runs as groups of the same settings, these by task and model."""
    runs = list(runs)
    data, alike = _data(runs), dict[tuple[str, str, int], list[Run]]()
    for run in runs:
        alike.setdefault((*run.task_and_model, data[run.folder]), []).append(run)
    return [TaskGroups(tuple(_groups(same))) for same in alike.values()]


def in_order(lines: Iterable[PlannedLine]) -> list[PlannedLine]:
    """Lines by method, as everything else."""
    return sorted(lines, key=lambda line: _method_place(line.method))


def differing(groups: Sequence[Group]) -> list[str]:
    """Dotted paths of the settings in which groups differ."""
    all_settings = [group.runs[0].settings for group in groups]
    paths = sorted({path for settings in all_settings for path in settings}, key=_telling)
    return [p for p in paths if len({_key(settings.get(p)) for settings in all_settings}) > 1]


def _groups(runs: list[Run]) -> list[Group]:
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(_key(run.settings), []).append(run)
    ordered = sorted(alike.values(), key=lambda same: (same[0].cut, _method_place(same[0].method)))
    several_cuts = len({same[0].cut for same in ordered}) > 1
    groups = []
    for same in ordered:
        way = _way(same[0], [other[0] for other in ordered if other[0].method == same[0].method])
        label = f"{way}, cut {same[0].cut}" if several_cuts else way
        groups.append(Group(way, same[0].cut, label, _one_per_seed(same)))
    return groups


def _one_per_seed(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Runs of different seeds: of a seed that ran twice the finished one, or else any, that was begun last."""
    in_time = sorted(runs, key=lambda run: (run.test is not None, run.begun_ns, str(run.folder)))
    by_seed = {run.seed: run for run in in_time}
    return tuple(by_seed[seed] for seed in sorted(by_seed))


def _data(runs: Iterable[Run]) -> dict[Path, int]:
    """Folder -> 0, or 1, 2, ... where a run has other rows than an earlier one that should have had the same.

    A task's digest is of every encoded row, so that settings such as max_tokens change it too: it is compared between
    runs that are alike in them. Where the seed draws rows it tells nothing about other seeds, and all are 0.
    """
    digests: dict[str, list[str]] = {}
    places = {}
    for run in sorted(runs, key=lambda run: (run.begun_ns, str(run.folder))):
        earlier = digests.setdefault(_key([*run.task_and_model, run.config["task"]]), [])
        digest = "" if run.draws_rows else run.record["task"].get("digest", "")
        earlier += [] if digest in earlier else [digest]
        places[run.folder] = earlier.index(digest)
    return places


def _way(run: Run, of_method: list[Run]) -> str:
    """The method, and the fewest settings by which it can be told from the others of the same method and cut.

    What most of them have is not said: beside four clients of epsilon 0.001, `epsilon 0.01` is told by that alone.
    """
    paths = sorted({path for other in of_method for path in other.settings} - {"model.cut"}, key=_telling)
    named: list[str] = []

    def kinds(chosen: list[str]) -> int:
        return len({(run.cut, *(_key(run.settings.get(p)) for p in chosen)) for run in of_method})

    for path in paths:
        if kinds(named) == len(of_method):
            break
        if kinds([*named, path]) > kinds(named):
            named.append(path)
    said = [path for path in named if _key(run.settings.get(path)) != _usual(path, of_method)]
    return ", ".join([run.method, *(_as_spoken(path, run.settings.get(path)) for path in said)])


def _as_spoken(path: str, value: Any) -> str:
    """A setting as a person would say it: `client rate 0.03`."""
    name = path.replace(".", " ").replace("_", " ")
    for long, short in _SHORT.items():
        name = name.replace(long, short)
    return f"{name} {setting_text(value)}"


def _usual(path: str, runs: list[Run]) -> str | None:
    """The value that more of these runs have than any other, if at least two do."""
    counts = Counter(_key(run.settings.get(path)) for run in runs).most_common(2)
    alone = len(counts) == 1 or counts[0][1] > counts[1][1]
    return counts[0][0] if alone and counts[0][1] > 1 else None


def _telling(path: str) -> tuple[int, str]:
    return (_TELLING.index(path) if path in _TELLING else len(_TELLING), path)


def _method_place(method: str) -> int:
    return list(METHODS).index(method) if method in METHODS else len(METHODS)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
