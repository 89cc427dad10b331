"""Runs of a report as groups that differ by seed alone, named by what tells them apart.

A comparison holds groups of one task and one model: only their numbers may stand beside each other.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from hosl.report.runs import Run, told

_ORDER = (
    "frozen", "zo-zo", "hosl", "hosl-gradient", "hosl-guided", "hosl-node", "fo-zo", "fo-recompute", "fo-fo",
)  # fmt: skip
"""Of methods in tables and pictures: the two ends of gap closure are first and last."""
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
        """Of all its runs."""
        return self.runs[0].method

    @cached_property
    def finished(self) -> dict[int, Run]:
        """Its finished runs, by seed."""
        return {run.seed: run for run in self.runs if run.test}

    @property
    def timed(self) -> bool:
        """Whether any step was made."""
        return any(run.timings for run in self.runs)

    @property
    def peak_bytes(self) -> int:
        """The most that the client's tensors took in any run."""
        return max(line["client_peak_bytes"] for run in self.runs for line in run.timings)

    @property
    def median_step_s(self) -> float:
        """Over the steps of all runs, from a step's begin to its end."""
        return median(line["step_s"] for run in self.runs for line in run.timings)

    def bytes_per_step(self, way: str) -> float:
        """Mean over the steps of all runs; `way` is up or down."""
        counts = [step[f"bytes_{way}"] for run in self.runs for step in run.steps]
        return sum(counts) / max(len(counts), 1)

    def tested(self, key: str) -> dict[int, float]:
        """A number of the test line, by seed."""
        return {seed: run.test[key] for seed, run in self.finished.items() if run.test}


@dataclass(frozen=True)
class Comparison:
    """Groups of one task and one model, by cut and method."""

    groups: tuple[Group, ...]

    @property
    def first(self) -> Run:
        """What the names of task and model are taken from."""
        return self.groups[0].runs[0]

    @property
    def ways(self) -> list[str]:
        """Each once, in their order."""
        by_method = sorted(self.groups, key=lambda group: _method_place(group.method))
        return list(dict.fromkeys(group.way for group in by_method))

    @property
    def cuts(self) -> list[int]:
        """Ascending."""
        return sorted({group.cut for group in self.groups})

    def method_of(self, way: str) -> str:
        """Of a way."""
        return next(group.method for group in self.groups if group.way == way)


@dataclass(frozen=True)
class PlannedLine:
    """What a way to train would take at several cuts, by the planner."""

    way: str
    method: str
    peak_bytes: dict[int, float]
    """Cut -> tensors of the client's half."""


def comparisons(runs: Iterable[Run]) -> list[Comparison]:
    """Runs as groups of the same settings, these by task and model."""
    runs = list(runs)
    data, places = _data(runs), dict[tuple[str, str, int], list[Run]]()
    for run in runs:
        places.setdefault((*run.place, data[run.folder]), []).append(run)
    return [Comparison(tuple(_groups(of_place))) for of_place in places.values()]


def in_order(lines: Iterable[PlannedLine]) -> list[PlannedLine]:
    """By method, as everything else."""
    return sorted(lines, key=lambda line: _method_place(line.method))


def differing(groups: Sequence[Group]) -> list[str]:
    """Dotted paths of the settings in which groups differ."""
    all_settings = [group.runs[0].settings for group in groups]
    paths = sorted({path for settings in all_settings for path in settings}, key=_telling)
    return [p for p in paths if len({_key(settings.get(p)) for settings in all_settings}) > 1]


def words(path: str, value: Any) -> str:
    """A setting as a person would say it: `client rate 0.03`."""
    name = path.replace(".", " ").replace("_", " ")
    for long, short in _SHORT.items():
        name = name.replace(long, short)
    return f"{name} {told(value)}"


def _groups(runs: list[Run]) -> list[Group]:
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(_key(run.settings), []).append(run)
    found = sorted(alike.values(), key=lambda same: (same[0].cut, _method_place(same[0].method)))
    several_cuts = len({same[0].cut for same in found}) > 1
    groups = []
    for same in found:
        way = _way(same[0], [other[0] for other in found if other[0].method == same[0].method])
        label = f"{way}, cut {same[0].cut}" if several_cuts else way
        groups.append(Group(way, same[0].cut, label, _one_per_seed(same)))
    return groups


def _one_per_seed(runs: Sequence[Run]) -> tuple[Run, ...]:
    """A seed that ran twice is no second sample: of its finished runs, or else of all, the last that was begun."""
    in_time = sorted(runs, key=lambda run: (run.test is not None, run.begun_ns, str(run.folder)))
    by_seed = {run.seed: run for run in in_time}
    return tuple(by_seed[seed] for seed in sorted(by_seed))


def _data(runs: Iterable[Run]) -> dict[Path, int]:
    """Folder -> 0, or 1, 2, ... where a run has other rows than an earlier one that should have had the same.

    A task's digest is of every encoded row, so that settings such as max_tokens change it too: it is compared between
    runs that are alike in them. Where the seed draws rows it tells nothing about other seeds, and all are 0.
    """
    digests: dict[str, list[str]] = {}
    found = {}
    for run in sorted(runs, key=lambda run: (run.begun_ns, str(run.folder))):
        known = digests.setdefault(_key([*run.place, run.config["task"]]), [])
        digest = "" if run.draws_rows else run.record["task"].get("digest", "")
        known += [] if digest in known else [digest]
        found[run.folder] = known.index(digest)
    return found


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
    return ", ".join([run.method, *(words(path, run.settings.get(path)) for path in said)])


def _usual(path: str, runs: list[Run]) -> str | None:
    """The value that more of these runs have than any other, if at least two do."""
    counts = Counter(_key(run.settings.get(path)) for run in runs).most_common(2)
    alone = len(counts) == 1 or counts[0][1] > counts[1][1]
    return counts[0][0] if alone and counts[0][1] > 1 else None


def _telling(path: str) -> tuple[int, str]:
    return (_TELLING.index(path) if path in _TELLING else len(_TELLING), path)


def _method_place(method: str) -> int:
    return _ORDER.index(method) if method in _ORDER else len(_ORDER)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
