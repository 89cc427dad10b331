"""A model from its config alone: halves of any depth on the meta device, without time or memory for weights."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hosl.errors import ConfigError, ModelError, SplitError
from hosl.split import (
    ClientHalf,
    HeadHalf,
    ServerHalf,
    TrunkHalf,
    resolve_model_folder,
    split_model,
    split_u_shape,
)
from hosl.split.families import FAMILIES, Head
from hosl.split.reading.config_json import read_config
from hosl.split.reading.skeleton import skeleton
from hosl.split.shapes import SHAPES, shape_config
from hosl.split.structure import with_blocks
from hosl.system.model_limits import limits_of


@dataclass(frozen=True)
class ModelShape:
    """The config of a model, and its head: all that a plan needs of a model."""

    name: str
    config: Any
    """The config of Hugging Face transformers."""
    head: Head
    scored_tokens: int = 0
    """The scored tokens of a row, where texts are learned token by token; 0: a row has one label, or one token."""

    @property
    def blocks(self) -> int:
        """The number of blocks; cuts lie in 0..blocks."""
        return self.config.get_text_config().num_hidden_layers

    @property
    def width(self) -> int:
        """The width of the hidden state at the cut."""
        return self.config.get_text_config().hidden_size

    @property
    def longest(self) -> int | None:
        """The largest number of tokens that the model reads; None: its config does not have it."""
        return limits_of(self.config.to_dict()).positions

    @property
    def has_experts(self) -> bool:
        """Whether feed-forwards are experts, of which each token meets a few."""
        return _has_experts(self.config)

    def of_blocks(self, count: int) -> "ModelShape":
        """The shape of the same model with its first `count` blocks only."""
        return replace(self, config=with_blocks(self.config, count))

    def halves(self, cut: int) -> tuple[ClientHalf, ServerHalf]:
        """The client half and the server half, on the meta device.

        Raises:
            SplitError: if the cut is outside the model.
            ConfigError: if transformers cannot build a model from the config.
        """
        return split_model(skeleton(self.config, self.head)[0], cut)

    def three_pieces(self, cut: int) -> tuple[ClientHalf, TrunkHalf, HeadHalf]:
        """The pieces where the labels stay with the client, on the meta device; raises as `halves`."""
        return split_u_shape(skeleton(self.config, self.head)[0], cut)


def model_shape(name: str, *, head: Head | None = None, num_labels: int | None = None) -> ModelShape:
    """The shape of a model by name; no weights are read.

    Args:
        name: a known shape (`hosl.split.shapes`), a folder with a config.json, a config.json, a GGUF file, or a hub
            name.
        head: the head of its top-level class; None: the one that its family has.
        num_labels: the number of labels of a classification head.

    Raises:
        ConfigError: if the config lacks a setting that a plan needs, hosl has no such family, or no row for one with
            experts: those with one make all products of a layer's experts at once, however the tokens are shared.
        ModelError: if there is no model of this name.
    """
    if name in SHAPES:
        return ModelShape(name, shape_config(name), "causal")
    config = _read_config(name)
    heads: list[Head] = [
        family_head for model_type, family_head in FAMILIES if model_type == config.model_type
    ]
    if _has_experts(config) and not heads:
        raise ConfigError(
            f"{name}: no plan of a {config.model_type}: how its experts share the tokens is known with the data only, "
            "and with it the memory; leave client.memory_budget out, or plan a model of the same width without experts"
        )
    if num_labels is not None:
        config.num_labels = num_labels
    if head in heads or (heads and head is None):
        return ModelShape(name, config, head or heads[0])
    try:  # no row: by its structure
        skeleton(config, head or "causal")
    except SplitError as cause:
        wanted = config.model_type if head is None else f"{config.model_type} ({head})"
        raise ConfigError(f"{name}: model_type {wanted} cannot be cut: {cause}") from cause
    return ModelShape(name, config, head or "causal")


def _has_experts(config: Any) -> bool:
    return bool(getattr(config.get_text_config(), "num_experts_per_tok", None))


def _read_config(name: str) -> Any:
    path = Path(os.path.expanduser(os.path.expandvars(name)))
    if not path.is_file() or path.suffix.lower() == ".gguf":
        path = _folder_or_hub(name)
    return read_config(path, name)


def _folder_or_hub(name: str) -> Path:
    try:
        return resolve_model_folder(name)
    except ModelError as cause:
        raise ModelError(f"{cause}; known shapes are {', '.join(SHAPES)}") from cause
