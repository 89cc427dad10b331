"""A run's config.yaml, held against the settings that the run was begun with, which its record.json keeps.

A file that was cut is often valid YAML still, of other settings: those that it lost would be the defaults.
"""

from pathlib import Path
from typing import Any

import msgspec

from hosl.config.files import parse_config, read_yaml
from hosl.config.former_names import with_new_names
from hosl.config.schema import Config
from hosl.errors import ConfigError

_FREE = (
    "output_dir", "report_to", "max_steps", "num_train_epochs", "per_device_eval_batch_size", "eval_steps",
    "save_steps", "snapshot_steps", "save_model", "save_optimiser", "save_best", "model.name", "task.train", "task.dev",
    "task.test", "task.folder", "task.chat_template", "client.device", "client.memory_budget",
    "client.micro_batch_size", "server.device", "wire.connect_s", "wire.idle_s", "clients.grace_s",
)  # fmt: skip
"""Settings that may change within a run: how far, where, how often. Model and data are known by their digests."""


def load_begun_config(file: Path, record: dict[str, Any], *, warn: bool = True) -> Config:
    """The config of a run's folder.

    Args:
        file: its config.yaml.
        record: the content of its record.json; without settings, as of version 0.2, nothing is compared.
        warn: as in `parse_config`.

    Raises:
        ConfigError: if it cannot be read, lacks a setting, or has another value where a run must keep its own.
    """
    content = read_yaml(file, kind="config", instead="the folder of a run has one")
    if content is None:
        raise ConfigError(f"config {file} is empty, it was cut or lost; put it back")
    config, kept = parse_config(content, where=str(file), warn=warn), record.get("config")
    if not isinstance(kept, dict):
        return config
    where = f"{file.parent / 'record.json'}"
    lost = [name for name in flat(_plain(kept, where)) if name not in flat(_plain(content, where))]
    if lost:
        raise ConfigError(
            f"config {file} lacks {', '.join(lost[:3])}{' and more' * (len(lost) > 3)}: it was cut since the run "
            f"began; put it back (the settings also stand in {where})"
        )
    before, now = (
        flat(msgspec.to_builtins(of)) for of in (parse_config(kept, where=where, warn=False), config)
    )
    for name in before | now:
        if name not in _FREE and before.get(name) != now.get(name):
            raise ConfigError(
                f"config {file} says {name}: {now.get(name)}, but the run was begun with {before.get(name)}; put that "
                f"back, or start a new run (if it is meant so, change {where}, too)"
            )
    return config


def flat(config: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted path -> value."""
    paths: dict[str, Any] = {}
    for name, value in config.items():
        paths |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return paths


def _plain(content: Any, where: str) -> dict[str, Any]:
    return dict(with_new_names(content, where=where, warn=False))
