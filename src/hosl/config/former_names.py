"""Renamed settings: the former names are read until version 0.3, with a warning that says the new ones."""

import logging
from collections.abc import Mapping
from typing import Any

from hosl.errors import ConfigError

FORMER_NAMES = {
    "zo.law": "distribution",
    "zo.fo_point": "server_gradient_at",
    "client.micro_batch_rows": "micro_batch_size",
}
"""Dotted path -> the name that takes the place of its last part."""


def with_new_names(settings: Any, *, where: str, warn: bool = True) -> Any:
    """The same plain data with former names replaced; what is no mapping is handed through, to be refused elsewhere.

    Args:
        settings: of a run, as YAML gives them, whole or in part.
        where: names the file in a warning.
        warn: False for what hosl itself wrote, in an earlier version.

    Raises:
        ConfigError: if a setting stands there by both names.
    """
    if not isinstance(settings, Mapping):
        return settings
    renamed = dict(settings)
    for path, new in FORMER_NAMES.items():
        section, _, former = path.partition(".")
        if isinstance(renamed.get(section), Mapping) and former in renamed[section]:
            renamed[section] = _replaced(renamed[section], former, new, f"{section}.", where, warn)
    return renamed


def with_new_name(settings: Any, former: str, new: str, *, where: str) -> Any:
    """The same plain data with one name of its top level replaced, and a warning; see `with_new_names`."""
    if not isinstance(settings, Mapping) or former not in settings:
        return settings
    return _replaced(settings, former, new, "", where, warn=True)


def _replaced(
    settings: Mapping[str, Any], former: str, new: str, section: str, where: str, warn: bool
) -> dict[str, Any]:
    if new in settings:
        raise ConfigError(
            f"{where}: {section}{former} is the former name of {section}{new}, and both are given; leave out "
            f"{section}{former}"
        )
    if warn:
        logging.getLogger("hosl").warning(
            "hosl: %s: %s%s is called %s%s now; the former name is read until version 0.3",
            where, section, former, section, new,
        )  # fmt: skip
    return {new if name == former else name: value for name, value in settings.items()}
