"""What half.json says of a half: side, family, cut, head, digests. No torch, so that a device can ask."""

import json
from pathlib import Path
from typing import Any

from hosl.errors import FolderError, ModelError


def half_facts(folder: Path, side: str) -> dict[str, Any]:
    """What half.json says of a half.

    Raises:
        ModelError: if the folder is no half. FolderError: if it is the other side's.
    """
    try:
        facts = json.loads((folder / "half.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise ModelError(
            f"{folder} is no half of a split model: half.json: {cause}; `hosl split` makes halves"
        ) from cause
    if facts.get("side") != side:
        raise FolderError(
            f"{folder} is the {facts.get('side')}'s half, the {side}'s is wanted; it lies beside it"
        )
    if "client_digest" not in facts:
        raise ModelError(f"{folder} was made by an older version; split the model again")
    return facts
