"""A model in a GGUF file, the format of llama.cpp, as an ordinary folder: made once, kept in the user's cache.

transformers reads the file, with the packages gguf and accelerate (extra `gguf`). It refuses to save what it has read,
since its config says that it is quantised; here its weights are float32, and a model of the same config is saved.
"""

import fcntl
import importlib.util
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from functools import cache
from hashlib import file_digest
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers.integrations.gguf.reader import read_gguf_metadata

from hosl.errors import FailureError, HoslError, ModelError
from hosl.split.reading.config_json import quiet_transformers
from hosl.split.reading.skeleton import skeleton
from hosl.system.atomic import whole_folder
from hosl.system.paths import cache_folder
from hosl.system.readable import one_line, readable_bytes, readable_count

_FORMAT = 1
"""Of the folders in the cache; a reader that writes others counts on."""
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""The values of `tokenizer.ggml.pre` for which llama.cpp splits GPT-2's way after setting every digit apart."""


def gguf_folder(file: Path, name: str, *, sha256: str | None = None) -> Path:
    """The folder of a GGUF file's model, in float32 and with its tokenizer; made at the first use of its content.

    Args:
        file: the GGUF file.
        name: the model as the user named it.
        sha256: the expected digest of the file; None: any.

    Raises:
        ModelError: if the file is damaged, not the expected one, of a model that hosl or transformers cannot read, or
            a package that reads it is absent.
        FailureError: if the folder cannot be written.
    """
    try:
        stat = file.stat()
        digest = _digest(file.resolve(), stat.st_size, stat.st_mtime_ns)
    except OSError as cause:
        raise ModelError(f"model {name}: {file} cannot be read: {cause.strerror}") from cause
    if sha256 is not None and digest != sha256:
        raise ModelError(
            f"model {name}: {file.name} has the digest {digest[:12]}, expected {sha256[:12]}: install its package again"
        )
    caches = cache_folder() or Path(tempfile.gettempdir(), f"hosl-{os.getuid()}")
    folder = caches / "gguf" / f"{file.stem[:100]}-{digest[:16]}-{_FORMAT}"
    if not folder.is_dir():
        with _one_at_a_time(folder.parent):
            if not folder.is_dir():
                _make(file, name, folder)
    return folder


@cache
def _digest(file: Path, size: int, changed_ns: int) -> str:
    """SHA-256 of a file's content; a file of the same size and time is not read again."""
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process is inside with this folder, which is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as cause:
        raise FailureError(
            f"{folder} cannot be written: {cause.strerror}; name another folder in XDG_CACHE_HOME"
        ) from cause
    with lock:
        with suppress(OSError):  # a filesystem without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(file: Path, name: str, folder: Path) -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"model {name}: a GGUF file is read with the package {package}: pip install 'hosl[gguf]'"
            )
    with tempfile.TemporaryDirectory() as alone:  # files beside it would change what is read
        link = Path(alone, file.name)
        link.symlink_to(file.resolve())
        with quiet_transformers(), redirect_stderr(io.StringIO()):  # progress bars
            config, metadata, tensors = _known(link, name)
        if "rope_freqs.weight" in tensors:
            sys.stderr.write(
                f"hosl: {name}: rope_freqs is not read: rotary frequencies are those of no scaling\n"
            )
        sys.stderr.write(f"hosl: {name}: {file.name} becomes float32 weights once, kept in {folder}\n")
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            model, tokenizer = _read(link, name, config)
    if metadata.get("tokenizer.ggml.pre") in _DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    try:
        with whole_folder(folder) as partial, quiet_transformers():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    except safetensors.SafetensorError as cause:  # a full disk
        raise FailureError(
            f"{folder} could not be written: {one_line(cause)}; nothing was left behind"
        ) from cause
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    sys.stderr.write(f"hosl: {name}: {readable_bytes(size)} written\n")


def _known(file: Path, name: str) -> tuple[Any, dict[str, Any], tuple[str, ...]]:
    """The config, metadata and tensors' names of a file whose model hosl can cut; no tensor is read."""
    try:
        metadata, tensors = read_gguf_metadata(str(file))
        config = transformers.AutoConfig.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
    except Exception as cause:  # readers raise what numpy and struct raise on damaged bytes
        raise ModelError(
            f"model {name}: {file.name} cannot be read as GGUF: {_reason(cause, file)}"
        ) from cause
    try:
        skeleton(config, "causal")
    except HoslError as cause:
        raise ModelError(f"model {name}: {file.name}: {cause}") from cause
    return config, metadata, tensors


def _read(file: Path, name: str, config: Any) -> tuple[Any, Any]:
    """The model, as if it had never been quantised, and its tokenizer."""
    auto: Any = transformers.AutoModelForCausalLM
    try:
        read, info = auto.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True, trust_remote_code=False,
        )  # fmt: skip
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
    except Exception as cause:  # as above
        raise ModelError(
            f"model {name}: {file.name} is cut short, or transformers cannot read it: {_reason(cause, file)}"
        ) from cause
    absent = sorted(info["missing_keys"])
    if absent:
        shard = re.search(r"-\d{5}-of-\d{5}$", file.stem)
        advice = "join its parts by `llama-gguf-split --merge`" if shard else "fetch it again"
        count = readable_count(len(absent), "tensor")
        raise ModelError(f"model {name}: {file.name} lacks {count}, {absent[0]} first; {advice}")
    for key, found, expected in sorted(info["mismatched_keys"]):
        raise ModelError(
            f"model {name}: {file.name}: {key} has another shape than its metadata say, {list(found)}, not "
            f"{list(expected)}"
        )
    config = read.config
    del config.quantization_config
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model, tokenizer


def _reason(error: Exception, file: Path) -> str:
    """What a reader says of a file, under the file's own name."""
    return one_line(f"{type(error).__name__}: {error}".replace(str(file), file.name))
