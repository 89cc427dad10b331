"""Reading a run's config from YAML and writing it; the error for a wrong name suggests the nearest right one."""

import difflib
import json
import math
import os
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml

from hosl.config.former_names import with_new_names
from hosl.config.schema import Config
from hosl.errors import ConfigError
from hosl.split.reading.embedded import EMBEDDED_MODELS


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
        ConfigError: if there is no such file, it is not YAML, or a key stands twice in it.
    """
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        loader.name = f"{kind} {path}"
        content = loader.get_single_data()
        json.dumps(
            content, ensure_ascii=False, default=str, skipkeys=True
        ).encode()  # a lone surrogate cannot
        return content
    except FileNotFoundError:
        raise ConfigError(f"{kind} {path}: no such file; {instead}") from None
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"{kind} {path} cannot be read as text: {cause}") from cause
    except ConfigError:
        raise
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as cause:  # a date or a number that there is not, a deep nest
        raise ConfigError(f"{kind} {path} is not YAML: {' '.join(str(cause).split())}") from cause


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that stands twice: plain YAML would silently take the last."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            line, named = key.start_mark.line + 1, (key.tag, str(key.value))
            if named in lines and isinstance(key, yaml.ScalarNode):
                raise ConfigError(
                    f"{self.name}, line {line}: the key `{key.value}` stands there a second time, first in line "
                    f"{lines[named]}; keep one of the two"
                )
            lines[named] = line
        return node


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
        raise ConfigError(f"config {where}: {cause}{hint(str(cause), content, Config)}") from cause


def dump_config(config: Config) -> str:
    """Complete YAML, every default spelled out; `load_config` reads it back to an equal Config."""
    return yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False, allow_unicode=True)


def with_absolute_paths(config: Config) -> Config:
    """This config with its relative paths below the working directory, so that a run can be gone on with elsewhere.

    A name of a model that is no folder here stays as it is, and so does a path with ~ or environment variables.
    """
    paths = {
        name: _absolute(value)
        for name in ("train", "dev", "test", "folder", "chat_template")
        if isinstance(value := getattr(config.task, name, None), str)
    }
    name = config.model.name
    model = msgspec.structs.replace(config.model, name=name if name in EMBEDDED_MODELS else _absolute(name))
    return msgspec.structs.replace(config, task=msgspec.structs.replace(config.task, **paths), model=model)


def _absolute(name: str) -> str:
    return name if name.startswith(("~", "$")) or not Path(name).exists() else os.path.abspath(name)


def hint(message: str, content: object, schema: Any) -> str:
    """The advice after an error of msgspec: the nearest name, the values allowed, or the number as YAML wants it.

    Args:
        message: the error's text.
        content: the data that was refused.
        schema: the struct that it was read as.
    """
    where = re.search(r" - at `\$([^`]*)`$", message)
    kind, value = _at(where[1] if where else "", content, schema)
    if unknown := re.search(r"unknown field `([^`]+)`", message):
        allowed = [field.encode_name for field in msgspec.structs.fields(kind)]
        return f"{_nearest(unknown[1], allowed)} Allowed here: {', '.join(allowed)}."
    if number := number_as_yaml(value, whole="`int" in message):
        return f". YAML reads {value} as text: write {number}"
    if "required field `kind`" in message or message.startswith("Invalid ") or get_origin(kind) is Literal:
        allowed = _allowed(kind)
        return f"{_nearest(str(value), allowed)} Allowed: {', '.join(allowed)}."
    if re.search(r"Expected `.*str.*got `bool`", message):
        return ". YAML reads yes, no, on, off, true and false as truth values: write them in quotes"
    return ""


def number_as_yaml(value: object, *, whole: bool = False) -> str | None:
    """The number that a text such as 1e-3 stands for, as YAML reads numbers; None: it stands for none."""
    try:
        number = float(str(value)) if isinstance(value, str | float) else math.nan
    except ValueError:
        return None
    if not math.isfinite(number) or (isinstance(value, float) and not whole):
        return None
    if whole:
        return str(int(number)) if number.is_integer() else None
    mantissa, _, exponent = str(value).strip().lower().partition("e")
    if not exponent:
        return mantissa
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent if exponent[0] in '+-' else '+' + exponent}"


def _nearest(word: str, allowed: list[str]) -> str:
    nearest = difflib.get_close_matches(word, allowed, n=1)
    return f"; did you mean `{nearest[0]}`?" if nearest else "."


def _at(path: str, content: Any, schema: Any) -> tuple[Any, Any]:
    """The type at a path of a schema, such as `.zo.sides` or `.report_to[0]`, and the value that stands there.

    Of a union of structs the type is the one whose kind the content names; at the kind itself it is the union.
    """
    kind = schema
    for key, index in re.findall(r"\.([^.\[]+)|\[([^\]]*)\]", path):
        if key:
            content = content.get(key) if isinstance(content, dict) else None
            tagged = _tags(kind)
            kind = kind if key == "kind" and tagged else get_type_hints(_struct(kind))[key]
        else:  # of a tuple, or of a mapping whose key msgspec does not tell
            content = content[int(index)] if isinstance(content, list | tuple) and index.isdigit() else None
            kind = get_args(kind)[1 if get_origin(kind) is dict else 0]
        tagged = _tags(kind)
        if tagged and isinstance(content, dict) and content.get("kind") in tagged:
            kind = tagged[content["kind"]]
    return kind, content


def _tags(kind: Any) -> dict[str, Any]:
    """kind -> struct, of a union of structs."""
    choices = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else ()
    structs = [
        choice for choice in choices if isinstance(choice, type) and issubclass(choice, msgspec.Struct)
    ]
    return {str(choice.__struct_config__.tag): choice for choice in structs}


def _struct(kind: Any) -> Any:
    return next(iter(_tags(kind).values()), kind)


def _allowed(kind: Any) -> list[str]:
    """The values that a setting may have, in words."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    if tagged := _tags(kind):
        return list(tagged)
    if get_origin(kind) in (Union, types.UnionType):
        return [word for choice in get_args(kind) for word in _allowed(choice)]
    return [{float: "a number", int: "a whole number", types.NoneType: "null"}.get(kind, "text")]
