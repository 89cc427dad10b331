"""Runs read back from their folders, for a report; and the runs that a study's folder stands for."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec

from hosl.config import Config, flat, load_begun_config, read_yaml
from hosl.core.methods import METHODS
from hosl.errors import ConfigError, FolderError
from hosl.system.checkpoint import checkpoint_steps
from hosl.system.run_folder import ANSWERS, EVALUATION, OWN_METRIC, TIMINGS, read_lines, read_record

CHOSEN_RUNS = "runs.csv"
"""File of a finished study that says which of its runs have the rates that were chosen."""
_COMMAND = re.compile(r"(?:\w+=\S* )*hosl train .*/([^/]+)\.yaml'?")
"""Command of a run of a study, maybe behind variables of the environment; its config has the run's name."""

_FILES = ("metrics.jsonl", "timings.jsonl", "config.yaml", "record.json")
_OWN = ("seed", "output_dir", "report_to")
"""Settings in which the runs of one group may differ."""
_TEST_ROWS = ("max_tokens", "train_rows", "dev_rows")
"""Settings of a task that leave the test rows as they are."""


class _Model(msgspec.Struct):
    source: str
    digest: str
    family: str


class _Task(msgspec.Struct):
    name: str
    digest: str = ""


class _Machine(msgspec.Struct, frozen=True):
    cores: int = 0
    threads: int = 0


class _Record(msgspec.Struct):
    """What a page wants from record.json."""

    model: _Model
    task: _Task
    cut: int
    versions: dict[str, Any]
    machine: _Machine = _Machine()
    trained_parameters: dict[str, int] = {}


class _Classes(msgspec.Struct):
    """The content of evaluation.json; without labels where texts were learned."""

    labels: list[str]
    confusion: list[list[Annotated[int, msgspec.Meta(ge=0)]]] | msgspec.UnsetType = msgspec.UNSET


class _OwnMetric(msgspec.Struct):
    """The content of own_metric.json."""

    rows: int
    figures: dict[str, float]


class _Answer(msgspec.Struct):
    """A row of answers.json."""

    prompt: str
    text: str
    before: str = ""
    wanted: str = ""


class _Settings(msgspec.Struct):
    """What a page wants from a config of another version."""

    method: str
    seed: int
    max_steps: int
    per_device_train_batch_size: int
    task: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Files of a run."""

    folder: Path
    config: dict[str, Any]
    """Plain data, with the client's rate as a number."""
    parsed: Config | None
    """None: of a version whose settings this one does not know."""
    record: dict[str, Any]
    steps: list[dict[str, Any]]
    """A line per step."""
    dev: list[dict[str, Any]]
    """A line per evaluation."""
    test: dict[str, Any] | None
    """None: the run is not finished."""
    timings: list[dict[str, Any]]
    classes: dict[str, Any] | None
    """Labels and confusion matrix of the evaluation on test; None: not finished, or of a version that kept none."""
    answers: list[dict[str, str]]
    """What its model says to prompts: prompt, text, and before and wanted where they are known."""
    own_metric: dict[str, Any]
    """The user's own metric over answers: rows, and figures by name; empty: there is none."""
    begun_ns: int
    """Time when it was made, by its config: a run writes that once, whatever happens to it later."""

    @property
    def method(self) -> str:
        """Method that its config names."""
        return self.config["method"]

    @property
    def cut(self) -> int:
        """Blocks on the client; a half that was split earlier knows it, the config does not."""
        return self.record["cut"]

    @property
    def seed(self) -> int:
        """Seed that its config names."""
        return self.config["seed"]

    @property
    def joined(self) -> bool:
        """Whether its server was another process (`hosl join`)."""
        return "run_id" in self.record

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Dotted path -> value, without what the runs of a group may differ in."""
        settings = flat({name: value for name, value in self.config.items() if name not in _OWN})
        method = METHODS.get(self.method)  # None: of a version that had others
        if method and not method.draws:  # a study's order of `directions` must not tear its frozen arm apart
            settings.pop("zo.directions", None)
        return settings | {"model.cut": self.cut, "server": "elsewhere" if self.joined else "in this process"}

    @property
    def task_and_model(self) -> tuple[str, str]:
        """Keys of task and model: what a number has to share with another to be compared with it."""
        task = {name: value for name, value in self.config["task"].items() if name not in _TEST_ROWS}
        return json.dumps([self.record["task"]["name"], task], sort_keys=True), self.record["model"]["digest"]

    @property
    def task_name(self) -> str:
        """Name of its task."""
        return self.record["task"]["name"]

    @property
    def model_name(self) -> str:
        """Name of its model and the family in brackets."""
        source = self.record["model"]["source"]
        return f"{Path(source).name if Path(source).is_absolute() else source} ({self.record['model']['family']})"

    @property
    def draws_rows(self) -> bool:
        """Whether its seed chose its rows."""
        return seed_draws_rows(self.config["task"])


@dataclass(frozen=True)
class ChosenRun:
    """Line of a finished study's runs.csv."""

    folder: Path
    task: str
    """Name that the study gives it."""
    row: str
    """Arm of the study, a row of its table."""


ReferenceRuns = Mapping[Path, tuple[Run | None, Run | None]]
"""Folder of a study's run -> runs of the arms that are 0 and 1 of gap closure beside it."""


def read_run(folder: Path) -> Run:
    """Read what a run wrote.

    Raises:
        FolderError: if it is no run's folder, or its run has not begun.
    """
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing and {"config.yaml", "record.json"} <= {*_FILES} - {*missing}:
        raise FolderError(
            f"{folder} is a run's folder that lacks {', '.join(missing)}: wait for the run's first step, or put back "
            f"what was lost (an empty {TIMINGS} makes a page without times and memory)"
        )
    if missing:
        raise FolderError(
            f"{folder} is no run's folder: it {_content(folder, missing)}; a report wants folders that `hosl train` or "
            "`hosl join` made, or one of `hosl study`"
        )
    record, kept = read_record(folder), folder / EVALUATION
    if record is None:
        raise FolderError(
            f"{folder}/record.json cannot be read; put it back, or let `hosl train --resume {folder}` write it anew"
        )
    if not {"model", "task", "cut"} & record.keys():
        raise FolderError(f"{folder}: its run has not begun yet; wait for its first step")
    _check_content(record, _Record, folder / "record.json")
    config, parsed = _config(folder / "config.yaml", record)
    metrics, timings = read_lines(folder / "metrics.jsonl"), _timings(folder / TIMINGS)
    if not metrics and (steps := checkpoint_steps(folder / "checkpoints")):
        raise FolderError(
            f"{folder}/metrics.jsonl has no line, but the run has a checkpoint of step {steps[-1]}: lines were lost; "
            f"put the file back (`hosl eval {folder}` scores the weights without it)"
        )
    classes = _classes(kept) if kept.is_file() else None
    return Run(
        folder, config, parsed, record, steps=[line for line in metrics if "split" not in line],
        dev=[line for line in metrics if line.get("split") == "dev"],
        test=next((line for line in metrics if line.get("split") == "test"), None), timings=timings,
        classes=classes, answers=_answers(folder / ANSWERS), own_metric=_own_metric(folder / OWN_METRIC),
        begun_ns=(folder / "config.yaml").stat().st_mtime_ns,
    )  # fmt: skip


def run_folders(asked: Sequence[Path]) -> list[Path]:
    """Folders of runs, each once, however it was written; in place of a study's folder those of its chosen runs.

    Raises:
        FolderError: if a study's folder has no run yet, or no whole runs.csv.
    """
    folders: dict[Path, Path] = {}
    for folder in asked:
        for of_run in _of_study(folder) if is_study(folder) else [folder]:
            folders.setdefault(of_run.resolve(), of_run)
    return list(folders.values())


def chosen_runs(study: Path) -> list[ChosenRun] | None:
    """The chosen runs of a finished study; None: it is not finished.

    Raises:
        FolderError: if its runs.csv is cut short, or has runs that are not there.
    """
    file = study / CHOSEN_RUNS
    try:
        with file.open(newline="", encoding="utf-8") as text:
            lines = list(csv.DictReader(text))
    except FileNotFoundError:
        return None
    except (ValueError, csv.Error) as cause:
        raise _no_list(file, f"cannot be read: {cause}") from cause
    chosen = [_chosen_run(file, number, line) for number, line in enumerate(lines, start=2)]
    if not any(chosen):
        raise _no_list(file, "has no chosen run")
    return list(dict.fromkeys(run for run in chosen if run))


def reference_runs(runs: Sequence[Run], chosen: Sequence[ChosenRun], rows: tuple[str, str]) -> ReferenceRuns:
    """Two runs beside every chosen one, of the same task at the same cut; None: the study has none such."""
    both = list(zip(chosen, runs, strict=True))
    of_row = {(one.task, run.cut, one.row): run for one, run in both}
    return {
        run.folder: (of_row.get((one.task, run.cut, rows[0])), of_row.get((one.task, run.cut, rows[1])))
        for one, run in both
    }


def is_study(folder: Path) -> bool:
    """Whether a folder is one of `hosl study`."""
    return (folder / "runs").is_dir() and not (folder / "metrics.jsonl").is_file()


def seed_draws_rows(task: Mapping[str, Any]) -> bool:
    """Whether the seed chooses the rows of train or dev: then the task's digest is another for every seed."""
    return task.get("kind") not in ("docstrings", "files", "sft") or task.get("train_rows") is not None


def setting_text(value: Any) -> str:
    """Value of a config, short."""
    if isinstance(value, float):
        return f"{value:g}"
    return (
        "none"
        if value is None
        else ", ".join(map(setting_text, value))
        if isinstance(value, list)
        else str(value)
    )


def _check_content(content: object, kind: type, file: Path) -> None:
    try:
        msgspec.convert(content, kind)
    except msgspec.ValidationError as cause:
        raise FolderError(f"{file} is damaged: {cause}; put it back") from cause


def _classes(file: Path) -> dict[str, Any] | None:
    """The content of evaluation.json; None: texts were learned, which have no classes."""
    try:
        content = json.loads(file.read_bytes())
        _check_content(content, _Classes, file)
        labels, confusion = content["labels"], content.get("confusion", [])
        if not labels and not confusion:
            return None
        if any(len(row) != len(labels) for row in (confusion, *confusion)):
            raise ValueError("the confusion matrix has not a row and a column for each label")
    except FolderError:
        raise
    except ValueError as cause:
        raise FolderError(
            f"{file} is damaged: {cause}; put it back, or remove it for a page without classes"
        ) from cause
    return content


def _own_metric(file: Path) -> dict[str, Any]:
    """The content of own_metric.json; empty where there is none."""
    if not file.is_file():
        return {}
    try:
        return msgspec.to_builtins(msgspec.json.decode(file.read_bytes(), type=_OwnMetric))
    except msgspec.MsgspecError as cause:
        raise FolderError(
            f"{file} is damaged: {cause}; put it back, or remove it for a page without your own metric"
        ) from cause


def _answers(file: Path) -> list[dict[str, str]]:
    """The rows of answers.json; none where nobody kept any."""
    if not file.is_file():
        return []
    try:
        rows = msgspec.json.decode(file.read_bytes(), type=list[_Answer])
    except msgspec.MsgspecError as cause:
        raise FolderError(
            f"{file} is damaged: {cause}; put it back, or remove it for a page without answers"
        ) from cause
    return [msgspec.to_builtins(row) for row in rows]


def _timings(path: Path) -> list[dict[str, Any]]:
    """The steps' lines of timings.jsonl; `client_calls_s` was called `client_verbs_s` before version 0.2."""
    return [
        {name.replace("_verbs_s", "_calls_s"): value for name, value in line.items()}
        for line in read_lines(path)
        if "split" not in line
    ]


def _config(path: Path, record: dict[str, Any]) -> tuple[Any, Config | None]:
    try:
        config = load_begun_config(path, record, warn=False)
    except ConfigError:
        content = read_yaml(path, kind="config", instead="the folder of a run has one")
        if not isinstance(content, dict) or "config" in record:
            raise
        _check_content(content, _Settings, path)
        return content, None  # of another version: what it says can still be shown
    plain = msgspec.to_builtins(config)
    if config.client.learning_rate is None:
        plain["client"]["learning_rate"] = config.client_rate
    plain["server"]["learning_rate"] = config.server_rate
    return plain, config


def _of_study(folder: Path) -> list[Path]:
    """Folders of a finished study's chosen runs; of an unfinished one's runs, all that have begun."""
    chosen = chosen_runs(folder)
    if chosen is not None:
        return [run.folder for run in chosen]
    begun = [path for path in sorted((folder / "runs").iterdir()) if (path / "metrics.jsonl").is_file()]
    if not begun:
        raise FolderError(f"{folder} is a study's folder, but no run has begun in {folder / 'runs'}")
    return begun


def _chosen_run(file: Path, number: int, line: dict[Any, Any]) -> ChosenRun | None:
    """The run of a line of runs.csv; None: it was only tried."""
    if None in line or not all(line.get(name) for name in ("task", "row", "chosen", "command")):
        raise _no_list(file, f"lacks a part of line {number}")
    command = _COMMAND.fullmatch(line["command"])
    if command is None:
        raise _no_list(file, f"has no whole command in line {number}")
    if line["chosen"] != "True":
        return None
    folder = file.parent / "runs" / command[1]
    if not (folder / "metrics.jsonl").is_file():
        raise FolderError(
            f"{file} has {command[1]} as chosen, which is not in {folder.parent}; put it back, or remove "
            f"{file.parent}/summaries/{command[1]}.json and call `hosl study` again, which makes it anew"
        )
    return ChosenRun(folder, line["task"], line["row"])


def _no_list(file: Path, fault: str) -> FolderError:
    return FolderError(
        f"{file} {fault}: it was cut short, or is of other runs than are there; call `hosl study` again, which writes "
        "it anew, or remove it for a page of all runs that have begun"
    )


def _content(folder: Path, missing: list[str]) -> str:
    if not folder.exists():
        return "does not exist"
    if not folder.is_dir():
        return "is a file"
    names = sorted(path.name for path in folder.iterdir())
    holds = f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}" if names else "nothing"
    return f"lacks {', '.join(missing)} and holds {holds}"
