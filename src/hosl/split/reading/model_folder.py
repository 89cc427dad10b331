"""A model's folder by its name: an embedded model's, a local folder, a GGUF file's, the hub's."""

import os
import re
from pathlib import Path

from hosl.errors import ModelError
from hosl.split.reading.embedded import (
    EMBEDDED_MODELS,
    ENCODER,
    LANGUAGE_MODEL,
    LANGUAGE_MODEL_SHA256,
    encoder_folder,
    language_model_file,
)
from hosl.system.readable import one_line


def resolve_model_folder(name: str) -> Path:
    """The local folder of a model: an embedded model's, the named folder, a GGUF file's, or the hub's download.

    Raises:
        ModelError: if there is no such folder, the file is no model of a known family, or the hub does not have it.
        FailureError: if the folder of a GGUF file cannot be written.
    """
    if name == ENCODER:
        return encoder_folder()
    if name == LANGUAGE_MODEL:
        from hosl.split.reading.gguf_file import gguf_folder

        return gguf_folder(language_model_file(), name, sha256=LANGUAGE_MODEL_SHA256)
    expanded = os.path.expanduser(os.path.expandvars(name))
    if Path(expanded).is_dir():
        return Path(expanded)
    if "$" in expanded:
        raise ModelError(
            f"model {name}: the environment variable in it is not set; set it, or give the folder itself"
        )
    if expanded.lower().endswith(".gguf"):
        from hosl.split.reading.gguf_file import gguf_folder

        return gguf_folder(Path(expanded), name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", expanded):
        raise ModelError(
            f"model {name}: no such folder, and no hub name either (those read owner/model); "
            f"the embedded models are called {' and '.join(EMBEDDED_MODELS)}"
        )
    return _from_hub(expanded)


def adapter_base(name: str, folder: Path) -> str:
    """The name by which peft finds the base of adapters: the hub's, or the absolute path of the model's folder."""
    from_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).is_dir()
    return name if from_hub else str(folder.resolve())


def _from_hub(name: str) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
            )
        )
    except Exception as cause:  # the hub client raises its own, its HTTP library's and the system's
        raise ModelError(
            f"model {name} is no local folder and the hub did not give it: {one_line(cause)}; "
            "check the name and the network, or give a local folder"
        ) from cause
