"""A model known by its config alone: halves on the meta device, of any depth, in no time and no memory."""

import copy
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from hosl.errors import ConfigError, HoslError, ModelError
from hosl.split import ClientHalf, ServerHalf, resolve_model_folder, split_model
from hosl.split.families import FAMILIES, Head
from hosl.split.shapes import SHAPES, shape_config

_PER_BLOCK = ("layer_types",)
"""Settings of a config that have an entry for every block."""


@dataclass(frozen=True)
class ModelShape:
    """What a plan has to know of a model."""

    name: str
    config: Any
    """Hugging Face's."""
    head: Head

    @property
    def blocks(self) -> int:
        """How many there are; cuts lie in 0..blocks."""
        return self.config.get_text_config().num_hidden_layers

    @property
    def width(self) -> int:
        """Of the hidden state at the cut."""
        return self.config.get_text_config().hidden_size

    @property
    def longest(self) -> int | None:
        """How many tokens the model reads at most; None: its config does not say."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def of_blocks(self, count: int) -> "ModelShape":
        """The same model with its first `count` blocks only."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = count
        for name in _PER_BLOCK:
            if getattr(text, name, None):
                setattr(text, name, getattr(text, name)[:count])
        return replace(self, config=config)

    def halves(self, cut: int) -> tuple[ClientHalf, ServerHalf]:
        """Both, on the meta device.

        Raises:
            SplitError: if the cut is outside the model.
            ConfigError: if transformers cannot build a model from the config.
        """
        auto: Any = transformers.AutoModelForCausalLM
        if self.head == "classification":
            auto = transformers.AutoModelForSequenceClassification
        try:
            with torch.device("meta"):
                return split_model(auto.from_config(self.config), cut)
        except HoslError:
            raise
        except Exception as cause:  # whatever a model's constructor finds wrong with its numbers
            reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
            raise ConfigError(
                f"no model can be built from the config of {self.name}: {reason}; it must have what transformers' "
                f"own config of {self.config.model_type!r} has"
            ) from cause


def model_shape(name: str, *, head: Head | None = None, num_labels: int | None = None) -> ModelShape:
    """The shape of a model by name; no weights are read.

    Args:
        name: a known shape (`hosl.split.shapes`), a folder with a config.json, a config.json, or a hub name.
        head: of its top-level class; None: the one that its family has.
        num_labels: of a classification head.

    Raises:
        ConfigError: if the config lacks what a plan needs. SplitError: if hosl has no such family.
        ModelError: if nothing is found under the name.
    """
    if name in SHAPES:
        return ModelShape(name, shape_config(name), "causal")
    config = _read_config(name)
    if num_labels is not None:
        config.num_labels = num_labels
    known: list[Head] = [
        family_head for model_type, family_head in FAMILIES if model_type == config.model_type
    ]
    if not known or (head is not None and head not in known):
        rows = ", ".join(f"{model_type} ({of_row})" for model_type, of_row in FAMILIES)
        wanted = config.model_type if head is None else f"{config.model_type} ({head})"
        raise ConfigError(f"{name}: model_type {wanted} cannot be cut; known: {rows}")
    return ModelShape(name, config, head or known[0])


def _read_config(name: str) -> Any:
    path = Path(os.path.expanduser(os.path.expandvars(name)))
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"model {name}: {path} has no config.json, so it is no Hugging Face model folder")
    if not path.exists():
        path = _folder_or_hub(name)
    file = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise ConfigError(f"{file} cannot be read as JSON: {cause}") from cause
    if not isinstance(content, dict) or "model_type" not in content:
        raise ConfigError(
            f"{file} has no model_type, so nobody can tell what model it is of; known: {_types()}"
        )
    try:
        return transformers.AutoConfig.for_model(**content)
    except (ValueError, TypeError, KeyError) as cause:
        raise ConfigError(
            f"{file} is no config that transformers knows: {' '.join(str(cause).split())}"
        ) from cause


def _folder_or_hub(name: str) -> Path:
    try:
        return resolve_model_folder(name)
    except ModelError as cause:
        raise ModelError(f"{cause}; known shapes are {', '.join(SHAPES)}") from cause


def _types() -> str:
    return ", ".join(sorted({model_type for model_type, _ in FAMILIES}))
