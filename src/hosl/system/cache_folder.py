"""The user's folder for what can be made again, but not quickly."""

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """$XDG_CACHE_HOME/hosl, else ~/.cache/hosl; None: this user has no home folder. It may not exist yet."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hosl")
    except RuntimeError:
        return None
