"""Experiment trackers fed from metrics.jsonl after the run: one source of truth, nothing in the training loop."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from hosl.config import Config
from hosl.errors import ConfigError
from hosl.system.run_folder import read_lines


def check_trackers(config: Config) -> None:
    """Refuse a run whose trackers are not installed, before it starts.

    Raises:
        ConfigError: naming the missing package and how to install it.
    """
    packages = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
    for tracker in config.report_to:
        try:
            importlib.import_module(packages[tracker])
        except ImportError:
            raise ConfigError(
                f"report_to asks for {tracker}, which is not installed; `pip install {packages[tracker]}`, "
                "or leave it out: metrics.jsonl is written anyway"
            ) from None


def feed_trackers(config: Config, run: Path) -> None:
    """Send every metric of a finished run to the trackers of `report_to`."""
    feeders: dict[str, Callable[[Config, Path], None]] = {
        "tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio,
    }  # fmt: skip
    for tracker in config.report_to:
        feeders[tracker](config, run)


def _scalars(run: Path) -> Iterator[tuple[int, dict[str, float]]]:
    for line in read_lines(run / "metrics.jsonl"):
        prefix = line.get("split", "train")
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        yield line["step"], {f"{prefix}/{key}": value for key, value in numbers.items()}


def _tensorboard(config: Config, run: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tensorboard")) as writer:
        for step, scalars in _scalars(run):
            for key, value in scalars.items():
                writer.add_scalar(key, value, step)


def _wandb(config: Config, run: Path) -> None:
    _like_wandb(importlib.import_module("wandb"), config, run)


def _trackio(config: Config, run: Path) -> None:
    _like_wandb(importlib.import_module("trackio"), config, run)


def _like_wandb(tracker: Any, config: Config, run: Path) -> None:
    tracker.init(project="hosl", name=run.name, config=msgspec.to_builtins(config))
    for step, scalars in _scalars(run):
        tracker.log(scalars, step=step)
    tracker.finish()
