"""Where a study's runs leave their files, and the small summary that is kept of each."""

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hosl.config import Config, dump_config, load_config, parse_config
from hosl.errors import ConfigError, FolderError
from hosl.folders import whole_file
from hosl.run.record import read_lines
from hosl.run.study_grid import Grid, Summary, Try


@dataclass(frozen=True)
class Places:
    """The folders of a study."""

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

    def summary_file(self, run: Try) -> Path:
        """Of a finished run."""
        return self.summaries / f"{run.name}.json"

    def config_file(self, run: Try) -> Path:
        """Of a run; its output_dir is `run_folder`."""
        return self.configs / f"{run.name}.yaml"

    def run_folder(self, run: Try) -> Path:
        """What `hosl train` makes."""
        return self.runs / run.name

    def config(self, run: Try) -> Config:
        """A run's complete config, its folder included."""
        return run.config(str(self.run_folder(run)))

    def command(self, run: Try) -> str:
        """What makes the run again, in a new folder."""
        return f"hosl train {self.config_file(run)}"


def read_summaries(grid: Grid, places: Places) -> dict[str, Summary]:
    """Every summary that is there, by the name of its run.

    Raises:
        FolderError: if one was made with other settings than the study has now.
    """
    found: dict[str, Summary] = {}
    for file in sorted(places.summaries.glob("*.json")):
        with contextlib.suppress(ValueError):  # cut short by a machine that went down: made again
            found[file.stem] = json.loads(file.read_text("utf-8"))
    rows = {row.name: row for row in grid.rows}
    for name, summary in found.items():
        row = rows.get(summary.get("row", ""))
        if row is not None:
            run = Try(row, summary["rate"], summary["server_rate"], summary["seed"])
            check_same_settings(places.config(run), summary["config"], places.summaries / f"{name}.json")
    return found


def check_same_settings(config: Config, content: object, where: Path) -> None:
    """Refuse what was made with other settings; the folder of a run is none.

    Raises:
        FolderError: naming the first setting that differs.
    """
    try:
        before = parse_config(content, where=str(where))
    except ConfigError:
        raise FolderError(
            f"{where} was made by a version of hosl whose settings this one does not know; choose another output_dir, "
            "or remove that file"
        ) from None
    old, new = (msgspec.to_builtins(msgspec.structs.replace(c, output_dir="")) for c in (before, config))
    for name in new:
        if old[name] != new[name]:
            raise FolderError(
                f"{where} was made with {name}: {old[name]}, the study now says {name}: {new[name]}; put the study "
                "back as it was, choose another output_dir, or remove what is there"
            )


def begun(folder: Path, config: Config) -> bool:
    """Whether a run's folder is far enough for `hosl train --resume`; what a kill left before that is removed.

    Raises:
        FolderError: if it was begun with other settings.
    """
    try:
        json.loads(
            (folder / "record.json").read_text("utf-8")
        )  # what the folder gets last before its first step
    except (FileNotFoundError, ValueError):
        shutil.rmtree(folder, ignore_errors=True)
        return False
    check_same_settings(config, msgspec.to_builtins(load_config(folder / "config.yaml")), folder)
    return True


def write_config(run: Try, places: Places) -> None:
    """Complete YAML, for the run and for whoever makes it again."""
    places.configs.mkdir(parents=True, exist_ok=True)
    places.config_file(run).write_text(dump_config(places.config(run)), encoding="utf-8")


def write_summary(run: Try, places: Places, said: Summary) -> Summary:
    """`said` with what makes the run again, written whole or not at all; returns it."""
    folder = places.run_folder(run)
    summary = said | {
        "row": run.row.name, "rate": run.rate, "server_rate": run.server_rate, "seed": run.seed,
        "command": places.command(run), "config": msgspec.to_builtins(places.config(run)),
        "versions": json.loads((folder / "record.json").read_text("utf-8"))["versions"],
        "dev_curve": _dev_curve(folder),
    }  # fmt: skip
    places.summaries.mkdir(parents=True, exist_ok=True)
    whole_file(places.summary_file(run), json.dumps(summary, allow_nan=False).encode())
    return summary


def drop_weights(run: Try, places: Places) -> None:
    """Remove what of a finished run is large: its model and its checkpoints."""
    for name in ("model", "checkpoints"):
        shutil.rmtree(places.run_folder(run) / name, ignore_errors=True)


def _dev_curve(folder: Path) -> list[list[int | float]]:
    """[step, loss in nats, accuracy] of every evaluation on dev."""
    lines = read_lines(folder / "metrics.jsonl")
    return [[m["step"], m["loss_nats"], m["accuracy"]] for m in lines if m.get("split") == "dev"]
