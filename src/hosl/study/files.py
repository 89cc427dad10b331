"""Files of a study's runs, and the small summary that is kept of each."""

import contextlib
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hosl.config import Config, dump_config, flat, parse_config, read_yaml, with_absolute_paths
from hosl.errors import ConfigError, FolderError
from hosl.report.runs import seed_draws_rows
from hosl.study.grid import Grid, Summary, Trial
from hosl.system.atomic import whole_file
from hosl.system.checkpoint import newest_checkpoint
from hosl.system.run_folder import read_lines

_ALWAYS_KEPT = ("rate", "server_rate", "command")
"""Keys of every summary that there ever was."""
_KEPT = (*_ALWAYS_KEPT, "seed", "config", "versions", "dev_curve")
"""Keys of those that say their `row`."""


@dataclass(frozen=True)
class Places:
    """Folders of a study."""

    summaries: Path
    """One JSON file per finished run."""
    configs: Path
    """One YAML file per run, which `hosl train` takes."""
    runs: Path
    """The runs' own folders."""

    @classmethod
    def below(cls, folder: Path) -> "Places":
        """All three in a folder of their own."""
        return cls(folder / "summaries", folder / "configs", folder / "runs")

    def summary_file(self, run: Trial) -> Path:
        """File of a finished run's summary."""
        return self.summaries / f"{run.name}.json"

    def config_file(self, run: Trial) -> Path:
        """File of a run's config; its output_dir is `run_folder`."""
        return self.configs / f"{run.name}.yaml"

    def run_folder(self, run: Trial) -> Path:
        """Folder that `hosl train` makes."""
        return self.runs / run.name

    def config(self, run: Trial) -> Config:
        """Complete config of a run, its folder included."""
        return run.config(str(self.run_folder(run)))

    def command(self, run: Trial) -> str:
        """Command that makes the run again, bit for bit, in a new folder."""
        return f"OMP_NUM_THREADS=1 hosl train {shlex.quote(str(self.config_file(run)))}"


def check_same_study(folder: Path, file: str) -> None:
    """Refuse the folder of another study, whose tables would be lost; what one study asks for may grow and change.

    Raises:
        FolderError: if the study that was here before had a file of another name.
    """
    kept, name = folder / "study.txt", Path(file).name
    if not kept.is_file():
        whole_file(kept, f"{name}\n".encode())
    before = kept.read_text("utf-8").strip()
    if before != name:
        raise FolderError(
            f"{folder} is the folder of study {before}, this is {name}, whose tables would take the place of those; "
            f"choose another output_dir, or, if it is that study under another name, remove {kept}"
        )


def read_summaries(grid: Grid, places: Places) -> dict[str, Summary]:
    """Every summary that is there, by the name of its run.

    Raises:
        FolderError: if one was made with other settings than the study has now, or is no summary.
    """
    summaries: dict[str, Summary] = {}
    for file in sorted(places.summaries.glob("*.json")):
        with contextlib.suppress(ValueError):  # cut short by a machine that went down: made again
            summaries[file.stem] = json.loads(file.read_text("utf-8"))
    arms = {arm.name: arm for arm in grid.arms}
    for name, summary in summaries.items():
        file = places.summaries / f"{name}.json"
        _check_whole(summary, file)
        arm = arms.get(summary.get("row", ""))
        if arm is not None:
            run = Trial(arm, summary["rate"], summary["server_rate"], summary["seed"])
            check_same_settings(places.config(run), summary["config"], file)
    return summaries


def check_unchanged_inputs(runs: Sequence[Trial], done: Mapping[str, Summary], places: Places) -> None:
    """Refuse runs of one task or model whose content changed in between; older summaries do not tell.

    Raises:
        FolderError: naming two that differ.
    """
    first: dict[str, Trial] = {}
    for run in runs:
        for what, settings in (("task", _of_task), ("model", _of_model)):
            digest = done[run.name].get(f"{what}_digest")
            if digest is None:
                continue
            other = first.setdefault(json.dumps([what, settings(done[run.name]["config"])]), run)
            before = done[other.name][f"{what}_digest"]
            if before != digest:
                raise FolderError(
                    f"runs {other.name} and {run.name} name the same {what}, but what is in its files changed between "
                    f"them (digests {before[:12]} and {digest[:12]}), and a table would mix the two; choose another "
                    "output_dir, or put back the files of one of them and remove, of every run made with the others, "
                    f"{places.summaries}/NAME.json and {places.runs}/NAME"
                )


def check_same_settings(config: Config, content: object, where: Path) -> None:
    """Refuse what was made with other settings; the folder of a run is none, nor what its method does not read.

    Raises:
        FolderError: naming the first setting that differs.
    """
    try:
        before = parse_config(content, where=str(where), warn=False)
    except ConfigError:
        raise FolderError(
            f"{where} was made by a version of hosl whose settings this one does not know; choose another output_dir, "
            "or remove what is there"
        ) from None
    before, config = with_absolute_paths(before), with_absolute_paths(config)
    same = {"output_dir"} | ({"zo.directions"} if not config.method_row.draws else set())
    same |= {"num_train_epochs", "max_steps"} if config.num_train_epochs else set()  # counted from the rows
    old, new = (flat(msgspec.to_builtins(c)) for c in (before, config))
    for name in old | new:
        if name not in same and old.get(name) != new.get(name):
            raise FolderError(
                f"{where} was made with {name}: {old.get(name)}, the study now says {name}: {new.get(name)}; put the "
                "study back as it was, choose another output_dir, or remove what is there"
            )


def begun(folder: Path, config: Config) -> bool:
    """Whether a run's folder is far enough for `hosl train --resume`; what a kill left before that is removed.

    Without a checkpoint, going on would begin with the first step too, but under a record of the data of then.

    Raises:
        FolderError: if it was begun with other settings, or nobody can tell with which.
    """
    record = folder / "record.json"  # what the folder gets last before its first step
    try:
        json.loads(record.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        shutil.rmtree(folder, ignore_errors=True)
        return False
    try:
        content = read_yaml(folder / "config.yaml", kind="config", instead="the folder of a run has one")
    except ConfigError as cause:
        raise FolderError(
            f"{folder} cannot be gone on with: {cause}; remove that folder, or choose another output_dir"
        ) from cause
    check_same_settings(config, content, folder)
    if newest_checkpoint(folder / "checkpoints") is None:
        record.unlink()  # first: a kill in between leaves what the next call takes for no run
        shutil.rmtree(folder)
        return False
    return True


def write_config(run: Trial, places: Places) -> None:
    """Complete YAML, for the run and for whoever makes it again."""
    places.configs.mkdir(parents=True, exist_ok=True)
    places.config_file(run).write_text(dump_config(places.config(run)), encoding="utf-8")


def write_summary(run: Trial, places: Places, said: Summary) -> Summary:
    """`said` with what makes the run again, written whole or not at all; returns it."""
    folder = places.run_folder(run)
    record = json.loads((folder / "record.json").read_text("utf-8"))
    summary = said | {
        "row": run.arm.name, "rate": run.rate, "server_rate": run.server_rate, "seed": run.seed,
        "command": places.command(run), "config": msgspec.to_builtins(places.config(run)),
        "versions": record["versions"], "task_digest": record["task"]["digest"],
        "model_digest": record["model"]["digest"], "dev_curve": _dev_curve(folder),
    }  # fmt: skip
    places.summaries.mkdir(parents=True, exist_ok=True)
    whole_file(places.summary_file(run), json.dumps(summary, allow_nan=False).encode())
    return summary


def drop_weights(run: Trial, places: Places) -> None:
    """Remove what of a finished run is large: its model and its checkpoints."""
    for name in ("model", "checkpoints"):
        shutil.rmtree(places.run_folder(run) / name, ignore_errors=True)


def _of_task(config: dict[str, Any]) -> list[Any]:
    """Settings that the digest of the encoded rows depends on, their files apart; the tokenizer is the model's."""
    task = config["task"]
    return [task, config["model"]["name"], config["seed"] if seed_draws_rows(task) else None]


def _of_model(config: dict[str, Any]) -> str:
    return config["model"]["name"]


def _check_whole(summary: object, file: Path) -> None:
    keys = summary.keys() if isinstance(summary, dict) else set()
    missing = [name for name in (_KEPT if "row" in keys else _ALWAYS_KEPT) if name not in keys]
    if missing:
        raise FolderError(
            f"{file} is not the summary of a run: it lacks {', '.join(missing)}; remove it, and the run is made again"
        )


def _dev_curve(folder: Path) -> list[list[int | float]]:
    """[step, loss in nats, accuracy] of every evaluation on dev."""
    lines = read_lines(folder / "metrics.jsonl")
    return [[m["step"], m["loss_nats"], m["accuracy"]] for m in lines if m.get("split") == "dev"]
