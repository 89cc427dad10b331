"""The content of half.json: side, family, cut, head, digests. No torch, so that a device can read it."""

import json
from pathlib import Path
from typing import Any

from hosl.errors import FolderError, ModelError


def read_half_json(folder: Path) -> dict[str, Any]:
    """The content of half.json, unchecked.

    Raises:
        ModelError: if it is missing or not JSON.
    """
    try:
        return json.loads((folder / "half.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise ModelError(
            f"{folder} is no half of a split model: half.json: {cause}; `hosl split` makes halves"
        ) from cause


def half_facts(folder: Path, side: str) -> dict[str, Any]:
    """The content of half.json of the half of `side`.

    Raises:
        ModelError: if the folder is no half, or one of an older version.
        FolderError: if it is the other side's half.
    """
    facts = read_half_json(folder)
    if facts.get("side") != side:
        raise FolderError(
            f"{folder} is the {facts.get('side')}'s half, the {side}'s is wanted; it lies beside it"
        )
    if "client_digest" not in facts:
        raise ModelError(f"{folder} was made by an older version; split the model again")
    return facts
