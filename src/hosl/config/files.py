"""Reading a run's config from YAML and writing it; the error for a wrong name suggests the nearest right one."""

import difflib
import os
import re
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml

from hosl.config.former_names import with_new_names
from hosl.config.schema import Config
from hosl.config.sections import ModelConfig
from hosl.errors import ConfigError


def load_config(path: str | Path, *, warn: bool = True) -> Config:
    """A checked `Config` from a YAML file; `warn` as in `parse_config`.

    Raises:
        ConfigError: if there is no such file, it is not YAML, or a setting is unknown or impossible.
    """
    content = read_yaml(path, kind="config", instead="`hosl train --help` lists the settings")
    if content is None:
        raise ConfigError(
            f"config {path} is empty; a run needs at least one setting, such as `max_steps: 300`"
        )
    return parse_config(content, where=str(path), warn=warn)


def read_yaml(path: str | Path, *, kind: str, instead: str) -> object:
    """The content of a YAML file; None for an empty one.

    Args:
        path: the file.
        kind: the name of such a file in errors.
        instead: the advice where there is no such file.

    Raises:
        ConfigError: if there is no such file, or it is not YAML.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{kind} {path}: no such file; {instead}") from None
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"{kind} {path} cannot be read as text: {cause}") from cause
    except yaml.YAMLError as cause:
        raise ConfigError(f"{kind} {path} is not YAML: {' '.join(str(cause).split())}") from cause


def parse_config(content: object, *, where: str, warn: bool = True) -> Config:
    """A checked `Config` from plain data, as YAML gives it.

    Args:
        content: a mapping; former names are read, too.
        where: the name of the data in errors.
        warn: whether to warn of former names; False for files that hosl itself wrote, in an earlier version.

    Raises:
        ConfigError: if a setting is unknown or impossible.
    """
    content = with_new_names(content, where=where, warn=warn)
    try:
        return msgspec.convert(content, Config)
    except msgspec.ValidationError as cause:
        raise ConfigError(f"config {where}: {cause}{_hint(str(cause), content)}") from cause


def dump_config(config: Config) -> str:
    """Complete YAML, every default spelled out; `load_config` reads it back to an equal Config."""
    return yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False, allow_unicode=True)


def with_absolute_paths(config: Config) -> Config:
    """This config with its relative paths below the working directory, so that a run can be gone on with elsewhere.

    A name of a model that is no folder here stays as it is, and so does a path with ~ or environment variables.
    """
    paths = {
        name: _absolute(value)
        for name in ("train", "dev", "test", "folder")
        if isinstance(value := getattr(config.task, name, None), str)
    }
    name = config.model.name
    embedded = name == ModelConfig().name  # which no folder of that name replaces
    model = msgspec.structs.replace(config.model, name=name if embedded else _absolute(name))
    return msgspec.structs.replace(config, task=msgspec.structs.replace(config.task, **paths), model=model)


def _absolute(name: str) -> str:
    return name if name.startswith(("~", "$")) or not Path(name).exists() else os.path.abspath(name)


def _hint(message: str, content: object) -> str:
    unknown = re.search(r"unknown field `([^`]+)`(?: - at `\$\.?([^`]*)`)?", message)
    if unknown:
        allowed = _field_names(unknown[2] or "", content)
        nearest = difflib.get_close_matches(unknown[1], allowed, n=1)
        suggestion = f"; did you mean `{nearest[0]}`?" if nearest else ""
        return f"{suggestion} Allowed here: {', '.join(allowed)}."
    if re.search(r"Expected `float.*got `str`|Invalid enum value '[\d.]+e", message):
        return ". YAML reads 1e-3 as text: write 1.0e-3"
    return ""


def _field_names(path: str, content: object) -> list[str]:
    """The fields of the struct at a dotted path of the schema; of a union, those of the kind in `content`."""
    struct: Any = Config
    for key in filter(None, path.split(".")):
        struct = get_type_hints(struct)[key]
        content = content.get(key, {}) if isinstance(content, dict) else {}
        if get_origin(struct) in (Union, types.UnionType):
            kind = content.get("kind") if isinstance(content, dict) else None
            choices = get_args(struct)
            struct = next((c for c in choices if c.__struct_config__.tag == kind), choices[0])
    return [field.encode_name for field in msgspec.structs.fields(struct)]
