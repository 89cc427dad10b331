"""Sizes of a model that its data must fit, read from its config.json. No torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OFFSET_BY_PADDING = ("roberta", "xlm-roberta", "camembert")
"""Model types whose first positions, up to the padding token's id, are never used."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The sizes of a model; None: its config does not say."""

    positions: int | None = None
    """The largest number of tokens of a row."""
    vocabulary: int | None = None
    """The rows of the embedding table."""
    width: int | None = None
    """The width of the hidden state."""


def model_limits(folder: Path) -> ModelLimits:
    """The limits of the model in a folder, or of a half; unknown where there is no readable config.json."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ModelLimits()
    return limits_of(config) if isinstance(config, dict) else ModelLimits()


def limits_of(config: Mapping[str, Any]) -> ModelLimits:
    """The limits that the content of a config.json states."""
    nested = config.get("text_config")
    config = nested if isinstance(nested, dict) else config

    def size(*names: str) -> int | None:
        sizes = (config.get(name) for name in names)
        return next((value for value in sizes if isinstance(value, int) and value > 0), None)

    positions = size("max_position_embeddings", "n_positions")
    if positions and config.get("model_type") in _OFFSET_BY_PADDING:
        padding = config.get("pad_token_id")
        positions -= 1 + (1 if padding is None else padding)
    return ModelLimits(positions, size("vocab_size"), size("hidden_size", "n_embd", "dim"))
