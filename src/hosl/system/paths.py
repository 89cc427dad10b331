"""Paths as people write them in settings, `~` and environment variables filled in, and the user's own cache folder."""

import os
from pathlib import Path

from hosl.errors import ConfigError


def expanded_folder(text: str, setting: str) -> str:
    """The path of a folder to make, with `~` and environment variables filled in.

    Args:
        text: the path as it was given.
        setting: the name of the setting, for errors.

    Raises:
        ConfigError: if it is empty or names no folder of its own, or a variable in it is not set.
    """
    path = os.path.expanduser(os.path.expandvars(text))
    if "$" in path:
        raise ConfigError(
            f"{setting}: {text}: the environment variable in it is not set; set it, or give the path itself"
        )
    if Path(path).name in ("", "..") or "\0" in path:
        raise ConfigError(f"{setting}: {text!r} names no folder that could be made; give one such as runs/my")
    return path


def cache_folder() -> Path | None:
    """The user's folder for what can be made again, but not quickly; it may not exist yet.

    $XDG_CACHE_HOME/hosl, else ~/.cache/hosl; None: this user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hosl")
    except RuntimeError:
        return None
