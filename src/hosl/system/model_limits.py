"""Sizes of a model that its data must fit, read from its config.json. No torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosl.errors import SplitError

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

    positions = size("max_position_embeddings", "n_positions", "max_seq_len")
    if positions and config.get("model_type") in _OFFSET_BY_PADDING:
        padding = config.get("pad_token_id")
        positions -= 1 + (1 if padding is None else padding)
    limits = [limit for limit in (positions, scaling_limit(config)) if limit]
    return ModelLimits(
        min(limits, default=None), size("vocab_size"), size("hidden_size", "n_embd", "d_model", "dim")
    )


def scaling_limit(config: Mapping[str, Any]) -> int | None:
    """The tokens up to which every row of a batch has the same rotary frequencies as alone; None: however many.

    Beyond it, transformers chooses the frequencies of `dynamic` and `longrope` by the longest row of the batch.
    """
    said = config.get("rope_parameters") or config.get("rope_scaling")
    ropes: Mapping[str, Any] = said if isinstance(said, dict) else {}
    original = config.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    limits = []
    for rope in (
        ropes,
        *(rope for rope in ropes.values() if isinstance(rope, dict)),
    ):  # one, or one per kind of layer
        kind = rope.get("rope_type") or rope.get("type")
        if kind == "longrope":
            limits.append(rope.get("original_max_position_embeddings") or original)
        elif kind == "dynamic":
            limits.append(config.get("max_position_embeddings"))
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def check_row_length(config: Mapping[str, Any], model_type: str, tokens: int) -> None:
    """Refuse rows beyond `scaling_limit`: their scores would change with the rows beside them.

    Args:
        config: the settings of the text model.
        model_type: of the whole model, for the error.
        tokens: of the longest row.

    Raises:
        SplitError: naming the limit.
    """
    limit = scaling_limit(config)
    if limit is not None and tokens > limit:
        raise SplitError(
            f"a row of {tokens} tokens: this {model_type} scales its rotary frequencies (dynamic or longrope) "
            f"beyond {limit}, by the longest row of a batch, so that scores would depend on the other rows; set "
            f"task.max_tokens: {limit} or less"
        )
