"""A Hugging Face model by name, opened without reading a weight, or loaded whole. New weights come from the seed."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hosl.errors import ConfigError
from hosl.split.families import Family, Head
from hosl.split.reading.config_json import PLAIN_CALLS, quiet_transformers, read_config
from hosl.split.reading.model_folder import resolve_model_folder
from hosl.split.reading.padding import last_token_padding
from hosl.split.reading.skeleton import fill_, skeleton
from hosl.split.reading.weight_files import checkpoint_digest
from hosl.split.reading.weights import Weights, find_weights
from hosl.split.structure import guess_note, submodule

_MOST_LABELS = 1_000_000


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
        name: an embedded model, a folder (environment variables allowed), a GGUF file, or a hub name.
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
    return LoadedModel(model.eval(), weights.new, name, checkpoint_digest(folder, name), found.notes)


class Pretrained(NamedTuple):
    """A model's folder, opened: everything is checked, and no weight is read yet."""

    config: Any
    model: Any
    """The whole model on the meta device."""
    family: Family
    weights: Weights
    notes: tuple[str, ...]
    """What was passed over, replaced, drawn or guessed: lines for people."""


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
    with quiet_transformers():
        model, family = skeleton(config, head, dtype)
    notes = [guess_note(family)] if family.guessed else []
    if family.shared and any(submodule(model, module) is not None for module in family.shared):
        notes.append(f"both halves have {' and '.join(family.shared)}, which stay as they are")
    if family.pools_last_token:
        padding, said = last_token_padding(folder, config)
        config.pad_token_id = model.config.pad_token_id = padding
        notes += said
    weights = find_weights(folder, name, model, family, seed)
    if weights.untied:
        config.tie_word_embeddings = model.config.tie_word_embeddings = False
    aside = [
        f"{key} {getattr(config, key)}" for key, plain in PLAIN_CALLS.items() if getattr(config, key) != plain
    ]
    if aside:
        note = f"set aside from config.json: {', '.join(aside)}; it says how a model is called, not what it computes"
        weights = replace(weights, notes=(*weights.notes, note))
    return Pretrained(config, model, family, weights, (*notes, *weights.notes))
