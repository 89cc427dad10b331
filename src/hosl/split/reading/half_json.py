"""The content of half.json: side, family, cut, head, digests. No torch, so that a device can read it."""

import json
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import msgspec

from hosl.errors import FolderError, ModelError


class _Facts(TypedDict):
    format: int
    side: Literal["client", "server"]
    family: str
    head: Literal["causal", "classification"]
    cut: int
    classes: NotRequired[int]
    labels: NotRequired[Literal["client", "server"]]
    tied_head: NotRequired[bool]
    base_digest: str
    digest: str
    client_digest: str
    server_digest: str
    head_digest: NotRequired[str]


def read_half_json(folder: Path) -> dict[str, Any]:
    """The content of half.json.

    Raises:
        ModelError: if it is missing, not JSON, of an older version, or a key is missing or of another kind.
    """
    file = folder / "half.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        msgspec.convert(facts, _Facts)
        return facts
    except msgspec.ValidationError as cause:
        raise ModelError(
            f"{file} is damaged, or was made by an older version: {cause}; split the model again"
        ) from cause
    except (OSError, ValueError, RecursionError) as cause:
        raise ModelError(
            f"{folder} is no half of a split model: half.json: {cause}; `hosl split` makes halves"
        ) from cause


def half_facts(folder: Path, side: str) -> dict[str, Any]:
    """The content of half.json of the half of `side`.

    Raises:
        ModelError: if the folder is no half, as in `read_half_json`.
        FolderError: if it is the other side's half.
    """
    facts = read_half_json(folder)
    if facts["side"] != side:
        raise FolderError(
            f"{folder} is the {facts['side']}'s half, the {side}'s is wanted; it lies beside it"
        )
    return facts
