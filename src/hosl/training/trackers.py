"""Experiment trackers, fed from metrics.jsonl after the run; the training loop does not know them."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from hosl.config import Config
from hosl.errors import ConfigError
from hosl.system.run_folder import read_lines


def check_trackers(config: Config) -> None:
    """Refuse a run whose trackers are not installed.

    Raises:
        ConfigError: naming the missing package and the command that installs it.
    """
    for tracker in config.report_to:  # each has the name of its package
        try:
            importlib.import_module(tracker)
        except ImportError:
            raise ConfigError(
                f"report_to asks for {tracker}, which is not installed; `pip install {tracker}`, "
                "or leave it out: metrics.jsonl is written anyway"
            ) from None


def feed_trackers(config: Config, run: Path) -> None:
    """Send every metric of a finished run to the trackers of `report_to`."""
    for tracker in config.report_to:
        if tracker == "tensorboard":
            _feed_tensorboard(run)
        else:
            _feed(importlib.import_module(tracker), config, run)


def _scalars(run: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, numbers by name) of every line of metrics.jsonl."""
    for line in read_lines(run / "metrics.jsonl"):
        prefix = line.get("split", "train")
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        yield line["step"], {f"{prefix}/{key}": value for key, value in numbers.items()}


def _feed_tensorboard(run: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tensorboard")) as writer:
        for step, scalars in _scalars(run):
            for key, value in scalars.items():
                writer.add_scalar(key, value, step)


def _feed(tracker: Any, config: Config, run: Path) -> None:
    """Feed wandb, or a package with the interface of wandb."""
    tracker.init(project="hosl", name=run.name, config=msgspec.to_builtins(config))
    for step, scalars in _scalars(run):
        tracker.log(scalars, step=step)
    tracker.finish()
