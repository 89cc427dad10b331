"""A pretrained model's folder, read by one rule for training and for splitting, or refused.

The weights are those of model.safetensors.index.json, else of model.safetensors; no other file counts. Every tensor of
the model must be there, with its shape and as floats; only the head of a new task may be missing, and is drawn.
"""

import json
import math
from collections.abc import Collection
from copy import deepcopy
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from hosl.errors import ConfigError, ModelError, SplitError
from hosl.split.families import FAMILIES, Family, Head, family_of
from hosl.split.streaming import Source

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")
_MOST_BLOCKS = 1000
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
"""What DataParallel, torch.compile and PEFT put before a tensor's name when their wrapper is saved."""
_BUFFERS = (
    "position_ids",
    "inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
"""The ends of the names of buffers that older versions of transformers stored and nobody reads."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a model, by their names in it: where each is stored, or how it is drawn."""

    sources: dict[str, Source]
    new: tuple[str, ...]
    """The weights of a new head: the checkpoint does not hold them."""
    notes: tuple[str, ...]
    """What was passed over, replaced or drawn: lines for people."""
    untied: bool
    """Whether the config ties head and embedding, but the checkpoint has two different ones, which are both read."""


def read_config(path: Path, name: str) -> Any:
    """The config of a model folder, or of a config.json. No code of the folder is executed.

    Raises:
        ModelError: if the folder has none, or the weights are quantised.
        ConfigError: if it is not JSON, has no model_type, or transformers refuses its values.
        SplitError: if transformers does not know the model type.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if (path / "adapter_config.json").is_file():
            raise ModelError(
                f"model {name}: {path} holds a PEFT adapter only; merge it into its base model first"
            )
        raise ModelError(f"model {name}: {path} has no config.json, so it is no Hugging Face model folder")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as cause:
        raise ConfigError(f"{file} cannot be read as JSON: {cause}") from cause
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ConfigError(
            f"{file} has no model_type, so nobody can tell what model it is of; known: {_known_types()}"
        )
    _refuse_quantised(content, name)
    for key, value in content.items():
        if key in ("num_hidden_layers", "n_layer", "n_layers") and not _counts_blocks(value):
            raise ConfigError(f"{file}: {key} must lie in 1..{_MOST_BLOCKS}, got {value!r}")
    if content["model_type"] not in transformers.CONFIG_MAPPING:
        raise SplitError(
            f"model {name}: model_type {content['model_type']!r} is unknown to transformers "
            f"{transformers.__version__}, and code of a model folder is never executed; hosl can cut {_known_types()}"
        )
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as cause:  # a config's checks may raise any error about its values
        raise ConfigError(f"{file} is no config that transformers takes: {_reason(cause)}") from cause


def skeleton(config: Any, head: Head, dtype: torch.dtype = torch.float32) -> tuple[Any, Family]:
    """The model of a config on the meta device: shapes, names and dtypes, without memory. `config` is left as it is.

    Raises:
        SplitError: if hosl has no such family, or transformers no such model.
        ConfigError: if no model can be built from the config's values.
    """
    auto: Any = transformers.AutoModelForCausalLM
    if head == "classification":
        auto = transformers.AutoModelForSequenceClassification
    if type(config) not in auto._model_mapping:
        raise SplitError(
            f"transformers has no {head} model of model_type {config.model_type!r}; known: {_known_types()}"
        )
    try:
        with torch.device("meta"):
            model = auto.from_config(deepcopy(config), dtype=dtype, trust_remote_code=False)
    except Exception as cause:  # a model's constructor may raise any error about its numbers
        raise ConfigError(
            f"no model can be built from the config of this {config.model_type}: {_reason(cause)}; it must have what "
            f"transformers' own config of {config.model_type!r} has"
        ) from cause
    return model, family_of(config, type(model).__name__)


def weights_files(folder: Path, name: str) -> dict[Path, set[str] | None]:
    """The safetensors files of a checkpoint, each with the tensors that the index says are in it; None: all.

    Raises:
        ModelError: if there is none, or an index and a whole file side by side, or the index is damaged.
    """
    index, single = folder / INDEX, folder / SINGLE
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
            f"model {name}: {folder} holds {content}; {SINGLE} is wanted, or {INDEX} and its files: save it with "
            "`model.save_pretrained(folder)` of transformers 5"
        )
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {
            folder / Path(file).name: {k for k, f in places.items() if f == file}
            for file in {*places.values()}
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise ModelError(f"model {name}: {INDEX} is damaged ({cause!r}); fetch it again") from cause
    absent = sorted(file.name for file in files if not file.is_file())
    if single.is_file() and len(absent) == len(files):
        return {single: None}  # a later save removed the index's files but not the index
    if single.is_file() and single not in files:
        raise ModelError(
            f"model {name}: {folder} holds {SINGLE}, and {INDEX} with its own files; transformers reads the first, "
            "other tools the second, and nobody can tell which is the newer: delete the other"
        )
    if absent or not files:
        raise ModelError(
            f"model {name}: {INDEX} names {', '.join(absent) or 'no file'}, not in {folder}; fetch it again"
        )
    return dict(sorted(files.items()))


def find_weights(folder: Path, name: str, model: Any, family: Family, seed: int) -> Weights:
    """The place of every tensor of `model`, a skeleton of the whole; new heads are drawn from `seed`.

    Raises:
        ModelError: if any but a new head's is missing, has another shape, or is not stored as floats.
    """
    expected, stored, unread = model.state_dict(), *_stored(folder, name, model)
    ties = tied_names(model, model.config)
    sources = {**stored}
    for tied, source in ties.items():
        for there, absent in ((tied, source), (source, tied)):
            if there in stored and absent not in stored:
                sources[absent] = replace(stored[there], name=absent)
    untied = any(
        tied in stored and source in stored and not torch.equal(stored[tied].read(), stored[source].read())
        for tied, source in ties.items()
    )
    new = [key for key, tensor in expected.items() if _is_new(key, tensor, sources, model, family)]
    _refuse_lacking(name, model, sources, unread, new)
    notes = _passed_over(folder)
    if untied:
        notes.append(
            "config.json ties head and embedding, but the checkpoint has two different ones: both are read"
        )
    if unread:
        notes.append(
            f"{len(unread)} stored tensors are no part of {type(model).__name__} and not read: {_some(unread)}"
        )
    if new:
        replaced = [f"{key} {list(sources[key].shape)}" for key in new if key in sources]
        instead = f", in place of the stored {_some(replaced)}" if replaced else ""
        notes.append(f"drawn from the seed: {_some(new)}{instead}")
    for key in new:
        sources[key] = _drawn(key, tuple(expected[key].shape), model.config, seed)
    return Weights(sources, tuple(sorted(new)), tuple(notes), untied)


def fill_(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Give a skeleton its tensors and buffers, in place; every parameter can be trained afterwards."""
    _restore_buffers_(model)
    model.load_state_dict(tensors, assign=True)
    for p in model.parameters():
        p.requires_grad_(True)


def tied_names(model: Any, config: Any) -> dict[str, str]:
    """The tensors that head and embedding share: name in the head -> name of the embedding; empty when untied."""
    return dict(type(model)._tied_weights_keys or {}) if getattr(config, "tie_word_embeddings", False) else {}


def seeded_generator(seed: int, name: str) -> np.random.Generator:
    """A random generator that depends on the seed and the tensor's name alone."""
    key = np.frombuffer(blake2b(f"hosl/init/{seed}/{name}".encode(), digest_size=16).digest(), dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key))


def _stored(folder: Path, name: str, model: Any) -> tuple[dict[str, Source], list[str]]:
    """The stored tensors by their names in the model of today, and the names of those that it does not have."""
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    expected, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."
    found: dict[str, Source] = {}
    unread = []
    for file, keys in weights_files(folder, name).items():
        try:
            with safetensors.safe_open(file, "pt") as content:
                slices = {
                    key: content.get_slice(key) for key in list(content.keys()) if keys is None or key in keys
                }
                facts = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
        except safetensors.SafetensorError as cause:
            raise ModelError(
                f"model {name}: {file.name} is cut short or damaged ({cause}); an interrupted download? fetch it again"
            ) from cause
        for key, (dtype, shape) in facts.items():
            today = key
            for renaming in renamings:
                today, _ = renaming.rename_source_key(today)
            if today not in expected and prefix + today in expected:  # saved as the model without its head
                today = prefix + today
            if today in found:
                raise ModelError(
                    f"model {name}: {today} is stored twice, under a former name too; save the model anew"
                )
            if today in expected:
                found[today] = Source(today, dtype, shape, _reader(file, key))
            elif not today.endswith(_BUFFERS):
                unread.append(today)
    return found, unread


def _reader(file: Path, key: str) -> Any:
    def read() -> torch.Tensor:
        with safetensors.safe_open(file, "pt") as content:
            return content.get_tensor(key)

    return read


def _is_new(key: str, tensor: torch.Tensor, stored: dict[str, Source], model: Any, family: Family) -> bool:
    """Whether a tensor is of a new task's head: nothing of a head is stored, or one for another number of labels."""
    if family.head != "classification" or not key.startswith(tuple(f"{m}." for m in family.server_only)):
        return False
    if key not in stored:
        return not any(k.startswith(f"{list(family.server_only)[-1]}.") for k in stored)
    expected, found = tuple(tensor.shape), stored[key].shape
    return found != expected and found[1:] == expected[1:] and expected[0] == model.config.num_labels


def _refuse_lacking(
    name: str, model: Any, sources: dict[str, Source], unread: list[str], new: Collection[str]
) -> None:
    """Refuse a checkpoint that lacks anything but a new head, or has it otherwise than the config says."""
    expected, kind = model.state_dict(), type(model).__name__
    for key, source in sources.items():
        if source.dtype not in _FLOATS:
            raise ModelError(
                f"model {name}: {key} is stored as {source.dtype}, so it is quantised; give the original model"
            )
        if key not in new and source.shape != tuple(expected[key].shape):
            raise ModelError(
                f"model {name}: {key} has another shape in the weights, {list(source.shape)}, than by config.json, "
                f"{list(expected[key].shape)}"
            )
    lost = [key for key in expected if key not in sources and key not in new]
    if not lost:
        return
    wrapper = next((w for w in _WRAPPERS if any(w in key for key in unread)), None)
    instead = f"; it holds {_some(unread)} instead" if unread else ""
    if wrapper:
        instead = f"; its names hold {wrapper!r}: a wrapper was saved, save the model inside it"
    raise ModelError(
        f"model {name}: the checkpoint lacks {lost[0]} and {len(lost) - 1} more tensors of its {kind}{instead}; "
        "only a new task's head is drawn at random"
    )


def _drawn(key: str, shape: tuple[int, ...], config: Any, seed: int) -> Source:
    """A new weight: normal, of standard deviation `initializer_range`; biases are 0, norms 1. float32."""
    std = getattr(config, "initializer_range", 0.02)
    if not isinstance(std, int | float) or not 0 <= std < math.inf:
        raise ConfigError(f"config.json: initializer_range must be a number >= 0, got {std!r}")

    def read() -> torch.Tensor:
        if key.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        return torch.from_numpy(seeded_generator(seed, key).normal(0.0, std, shape).astype(np.float32))

    return Source(key, "F32", shape, read)


def _restore_buffers_(model: Any) -> None:
    """Compute the buffers that no file holds (rotary frequencies, position ids): the meta device has none."""
    for module in model.modules():
        lost = [key for key, b in module._buffers.items() if b is not None and b.is_meta]
        for key in lost:
            b = module._buffers[key]
            module._buffers[key] = torch.zeros(b.shape, dtype=b.dtype)
        if lost:
            # transformers' own initialisation; parameters are still meta, so only buffers are filled
            model._init_weights(module)


def _refuse_quantised(content: dict[str, Any], name: str) -> None:
    settings = content.get("quantization_config") or content.get("compression_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise ModelError(
            f"model {name} is quantised ({method or 'compressed-tensors'}), which cannot be trained or cut; give the "
            "original model, and client.dtype: int8 where the device needs it"
        )
    if content.get("transformers_weights"):
        raise ModelError(
            f"model {name}: transformers_weights in config.json is not read; name the file {SINGLE}"
        )


def _passed_over(folder: Path) -> list[str]:
    adapters = [
        file for file in ("adapter_model.safetensors", "adapter_model.bin") if (folder / file).is_file()
    ]
    return [f"{file} beside the model is not applied; merge it first if it is wanted" for file in adapters]


def _counts_blocks(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_BLOCKS


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:2])
    return shown if len(names) <= 2 else f"{shown} and {len(names) - 2} more"


def _known_types() -> str:
    return ", ".join(sorted({model_type for model_type, _ in FAMILIES}))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
