"""Renamed settings: the former names are read until version 0.3, with a warning that tells the new ones."""

import logging
from collections.abc import Mapping
from typing import Any

from hosl.errors import ConfigError

FORMER_NAMES = {
    "zo.law": "distribution",
    "zo.fo_point": "server_gradient_at",
    "client.micro_batch_rows": "micro_batch_size",
}
"""Dotted path of a former name -> the new name of its last part."""

LEFT_OUT: dict[tuple[str, str], tuple[Any, str]] = {
    ("zo", "guidance"): (
        "none", "is no more, because it gained nothing (docs/adr/0013-pruned-variants.md); leave it out",
    ),
    ("zo", "guided_blocks"): (1, "is called residual.blocks now"),
}  # fmt: skip
"""Removed settings -> the value that changed nothing, which configs of older runs may still hold, and what to do."""

GONE = {
    "hosl-guided": "is no more (docs/adr/0022-residual-feedback.md); take hosl-residual, which learns more",
}
"""Removed methods -> what to do."""


def with_new_names(settings: Any, *, where: str, warn: bool = True) -> Any:
    """The settings with former names replaced by the new ones. Anything but a mapping is returned unchanged.

    Args:
        settings: the settings of a run as plain data, whole or in part.
        where: the name of the file in warnings and errors.
        warn: whether to warn of former names; False for files that hosl itself wrote, in an earlier version.

    Raises:
        ConfigError: if a setting is given by both names, or a setting or method was removed.
    """
    if not isinstance(settings, Mapping):
        return settings
    renamed = dict(settings)
    for path, new in FORMER_NAMES.items():
        section, _, former = path.partition(".")
        if isinstance(renamed.get(section), Mapping) and former in renamed[section]:
            renamed[section] = _replaced(renamed[section], former, new, f"{section}.", where, warn)
    if (advice := GONE.get(str(renamed.get("method")))) is not None:
        raise ConfigError(f"{where}: method: {renamed['method']} {advice}")
    for (section, name), (harmless, advice) in LEFT_OUT.items():
        if isinstance(renamed.get(section), Mapping) and name in renamed[section]:
            value = renamed[section][name]
            if value != harmless:
                raise ConfigError(f"{where}: {section}.{name}: {value} {advice}")
            renamed[section] = {other: kept for other, kept in renamed[section].items() if other != name}
    return renamed


def with_new_name(settings: Any, former: str, new: str, *, where: str) -> Any:
    """The settings with one name of the top level replaced, with a warning; see `with_new_names`."""
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
