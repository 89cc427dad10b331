"""Schema of a study: the YAML file of `hosl study`, and the arms, groups and runs that it stands for."""

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hosl.config import parse_config, read_yaml
from hosl.config.files import hint
from hosl.config.former_names import with_new_name, with_new_names
from hosl.core.methods import FROZEN, METHODS
from hosl.errors import ConfigError
from hosl.study.grid import Arm, Grid, merged

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OWN = {
    "output_dir": "the study names its runs' folders",
    "seed": "`seeds` has them",
    "client.learning_rate": "`rates` of each method has them",
}


class StudyMethod(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of an arm, a row of the table."""

    rates: tuple[float, ...] = ()
    """Client learning rates that are tried; none for a client that does not move."""
    one_rate: bool = False
    """Both halves have the client's rate: for zo-zo, whose server is probed, too."""
    settings: dict[str, Any] = {}
    """Settings of a run, laid over those of the task. `method` is the row's own name unless given here."""


class Study(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Grid of ordinary runs: every method on every task at every cut and Q."""

    output_dir: str
    """The study's folder; a study that was stopped goes on in it."""
    base: dict[str, Any]
    """Settings of a run, as in a run's own YAML."""
    tasks: dict[str, dict[str, Any]]
    """Name -> settings laid over `base`."""
    methods: dict[str, StudyMethod]
    """Name -> how the row is run. All have equally many rates."""
    frozen: str = "frozen"
    """The row whose client does not move: 0 of gap closure."""
    first_order: str = "fo-fo"
    """The row whose client is trained by backprop: 1 of gap closure."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Rates are chosen by dev loss on the first; every method's chosen rate then runs on all."""
    server_learning_rates: tuple[float, ...] = ()
    """Tried on the frozen row, the best kept for all others; none: server.learning_rate of `base`."""
    cuts: tuple[int, ...] = ()
    """Cuts of the model; none: model.cut of the settings."""
    directions: tuple[int, ...] = ()
    """Q, for methods that probe; none: zo.directions of the settings."""
    at_once: int | None = None
    """Runs at a time; null: as many as there are cores."""
    keep_models: bool = False
    """Whether finished runs keep their model and checkpoints."""

    def __post_init__(self) -> None:
        for what in ("tasks", "methods", "seeds"):
            if not getattr(self, what):
                raise ConfigError(f"{what} is empty; a study needs one at least")
        for what in ("seeds", "server_learning_rates", "cuts", "directions"):
            values = getattr(self, what)
            if len(set(values)) < len(values):
                raise ConfigError(f"{what} names one twice: {list(values)}; give each once")
        if min(self.seeds) < 0:
            raise ConfigError(f"seeds must be >= 0, got {list(self.seeds)}")
        if self.at_once is not None and self.at_once < 1:
            raise ConfigError(f"at_once must be >= 1 or null, got {self.at_once}")
        for name in (*self.tasks, *self.methods):
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"`{name}` names files: it must be of letters, digits, `.`, `_` and `-`, the first no sign"
                )
        self._check_reference_rows()
        self._check_rates()
        self._check_own_settings()

    def method_of(self, name: str) -> str:
        """Method of an arm: its settings', its own name, or that of `base`."""
        own = name if name in METHODS else self.base.get("method", name)
        return self.methods[name].settings.get("method", own)

    def draws(self, name: str) -> bool:
        """Whether an arm evaluates the loss along random directions."""
        method = METHODS.get(self.method_of(name))  # None: refused when its config is parsed
        return method is None or bool(method.draws)

    def _check_reference_rows(self) -> None:
        for what, name in (("frozen", self.frozen), ("first_order", self.first_order)):
            allowed = [method.name for method in METHODS.values() if method.end == what]
            if name not in self.methods:
                raise ConfigError(
                    f"{what}: methods has no row `{name}`, only {', '.join(self.methods)}; every comparison needs a "
                    "frozen client and a first-order one, for what lies between them is all that a method can gain: "
                    f"add the row, or name another by `{what}`"
                )
            if self.method_of(name) not in allowed:
                raise ConfigError(
                    f"{what}: row `{name}` has method {self.method_of(name)}; it must be {' or '.join(allowed)}"
                )

    def _check_rates(self) -> None:
        moving = {n: len(m.rates) for n, m in self.methods.items() if self.method_of(n) != FROZEN}
        for name in self.methods.keys() - moving.keys():
            if self.methods[name].rates:
                raise ConfigError(f"methods.{name}.rates: a frozen client has no rate; leave it out")
            if self.methods[name].one_rate:
                raise ConfigError(
                    f"methods.{name}.one_rate: a frozen client has no rate that the server could share; leave it out"
                )
        if 0 in moving.values() or len(set(moving.values())) > 1:
            counts = ", ".join(f"{name} {count}" for name, count in moving.items())
            raise ConfigError(
                f"methods: every row but the frozen one needs equally many rates, or the best-tuned wins; found "
                f"{counts}"
            )
        _check_numbers("server_learning_rates", self.server_learning_rates)
        for name, method in self.methods.items():
            _check_numbers(f"methods.{name}.rates", method.rates)

    def _check_own_settings(self) -> None:
        _check_left_out("base", self.base, _OWN)
        # an axis replaces what base says; over the rest it would quietly win or lose
        axes = dict(_OWN)
        axes |= {"model.cut": "`cuts` has them"} if self.cuts else {}
        axes |= {"zo.directions": "`directions` has them"} if self.directions else {}
        axes |= (
            {"server.learning_rate": "`server_learning_rates` has them"} if self.server_learning_rates else {}
        )
        for name, settings in self.tasks.items():
            _check_left_out(f"tasks.{name}", settings, axes | {"method": "each row of `methods` has its own"})
        for name, method in self.methods.items():
            one = {"server.learning_rate": "by `one_rate` it is the client's"} if method.one_rate else {}
            _check_left_out(f"methods.{name}.settings", method.settings, axes | one)


@dataclass(frozen=True)
class Group:
    """Arms that are compared with each other: one task at one cut and one Q."""

    name: str
    """Name of its files."""
    task: str
    cut: int | None
    directions: int | None
    arms: dict[str, str]
    """Name in the study's file -> arm of the grid."""


def read_study(path: str | Path) -> object:
    """Content of a study's YAML file, of whichever kind the study is.

    Raises:
        ConfigError: if there is no such file, or it is not YAML.
    """
    return read_yaml(path, kind="study", instead="examples/studies has some to start from")


def parse_study(content: object, *, where: str) -> Study:
    """Study of a file's content; `where` names the file in errors.

    Raises:
        ConfigError: if something in it is unknown or impossible.
    """
    content = with_new_name(content, "server_rates", "server_learning_rates", where=where)
    if isinstance(content, dict):
        content = content | {
            name: _renamed(name, content[name], where) for name in _RENAMED_IN if name in content
        }
    try:
        return msgspec.convert(content, Study)
    except msgspec.ValidationError as cause:
        raise ConfigError(f"study {where}: {cause}{hint(str(cause), content, Study)}") from cause


def _check_numbers(what: str, rates: tuple[float, ...]) -> None:
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise ConfigError(f"{what} must be finite numbers >= 0, got {list(rates)}")
    if len({f"{rate:g}" for rate in rates}) < len(rates):  # as runs are named
        raise ConfigError(
            f"{what} must be different numbers, in their first six digits, by which runs are named; got {list(rates)}"
        )


def _check_left_out(part: str, settings: dict[str, Any], own: dict[str, str]) -> None:
    """Refuse the settings of `own`, dotted path -> where the study says them."""
    for path, why in own.items():
        section, _, name = path.rpartition(".")
        within = settings.get(section) if section else settings
        if isinstance(within, dict) and name in within:
            raise ConfigError(f"{part}.{path}: {why}; leave it out here")


def study_groups(study: Study) -> list[Group]:
    """Groups of a study: every task at every cut and Q, with the arms of each method."""
    groups = []
    for task, cut, directions in itertools.product(
        study.tasks, study.cuts or (None,), study.directions or (None,)
    ):
        task_at_cut = task if cut is None else f"{task}-cut{cut}"
        arms = {}
        for name in study.methods:
            probes = directions is not None and study.draws(name)
            arms[name] = f"{task_at_cut}-q{directions}-{name}" if probes else f"{task_at_cut}-{name}"
        of_group = task_at_cut if directions is None else f"{task_at_cut}-q{directions}"
        groups.append(Group(of_group, task, cut, directions, arms))
    return groups


def study_grid(study: Study) -> Grid:
    """The runs that a study stands for.

    Raises:
        ConfigError: if two rows would have the same name.
    """
    arms: dict[str, tuple[tuple[Any, ...], Arm]] = {}
    for group in study_groups(study):
        for name, arm_name in group.arms.items():
            probes = group.directions is not None and study.draws(name)
            key = (group.task, group.cut, group.directions if probes else None, name)
            if arms.setdefault(arm_name, (key, _arm(study, group, name)))[0] != key:
                raise ConfigError(
                    f"two rows would be called {arm_name}: {arms[arm_name][0]} and {key}; rename a task or a method"
                )
    return Grid(tuple(arm for _, arm in arms.values()), study.seeds)


def _arm(study: Study, group: Group, name: str) -> Arm:
    method = study.methods[name]
    settings = merged(study.base, study.tasks[group.task])
    if group.cut is not None:
        settings = merged(settings, {"model": {"cut": group.cut}})
    if group.directions is not None:
        settings = merged(settings, {"zo": {"directions": group.directions}})
    settings = merged(settings, {"method": study.method_of(name), **method.settings})
    server_learning_rates = study.server_learning_rates if name == study.frozen else ()
    if not (study.server_learning_rates or method.one_rate):
        server_learning_rates = (parse_config(settings, where=group.arms[name]).server_rate,)
    return Arm(
        group.arms[name], settings, method.rates or (0.0,), server_learning_rates, group.arms[study.frozen],
        method.one_rate,
    )  # fmt: skip


_RENAMED_IN = ("base", "tasks", "methods")


def _renamed(part: str, settings: Any, where: str) -> Any:
    """Part of a study with the settings of runs in it by their new names."""
    if part == "base" or not isinstance(settings, dict):
        return with_new_names(settings, where=where)
    if part == "tasks":
        return {name: with_new_names(task, where=where) for name, task in settings.items()}
    return {
        name: method | {"settings": with_new_names(method["settings"], where=where)}
        if isinstance(method, dict) and "settings" in method
        else method
        for name, method in settings.items()
    }
