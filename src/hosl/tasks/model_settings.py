"""The JSON files of a model's folder that say how its texts are read, and the tokens that they name. No torch."""

import json
from pathlib import Path
from typing import Any

from hosl.errors import TaskError
from hosl.system.own_files import own_file


def model_json(folder: Path, name: str) -> Any:
    """The content of a file of a model's folder; None: there is no such file.

    Raises:
        TaskError: if it is no JSON. FolderError: if it is a link out of the folder.
    """
    file = own_file(folder, name)
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise TaskError(f"{file} cannot be read as JSON: {cause}; fetch it again") from cause


def model_settings(folder: Path, name: str) -> dict[str, Any]:
    """The settings in a file of a model's folder; none where there is no such file, or it holds something else.

    Raises:
        TaskError, FolderError: as `model_json`.
    """
    content = model_json(folder, name)
    return content if isinstance(content, dict) else {}


def token_text(setting: Any) -> str | None:
    """The text of a token as settings name it, plain or with its properties; None: they name none."""
    text = setting.get("content") if isinstance(setting, dict) else setting
    return text if isinstance(text, str) else None
