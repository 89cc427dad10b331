"""One row per architecture. To add a model, add a row to decoders.py or encoders.py; tests do the rest."""

from typing import Any

from hosl.errors import SplitError
from hosl.split.families.decoders import DECODERS
from hosl.split.families.encoders import ENCODERS
from hosl.split.families.family import Family, Head, QueryPlace, StandIn

__all__ = [
    "FAMILIES",
    "Family",
    "Head",
    "QueryPlace",
    "StandIn",
    "family_of",
    "head_of",
    "known_types",
    "row_of",
]

FAMILIES: dict[tuple[str, Head], Family] = {
    (row.model_type, row.head): row
    for row in (*DECODERS, *ENCODERS, *(row.as_classifier() for row in DECODERS))
}


def head_of(architecture: str) -> Head | None:
    """The kind of head of a top-level class, by its name; None: one that hosl does not train."""
    if architecture.endswith("ForSequenceClassification"):
        return "classification"
    return "causal" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else None


def row_of(config: Any, architecture: str) -> Family | None:
    """The row for a Hugging Face config and the name of its top-level class; None: there is none."""
    head = head_of(architecture)
    return None if head is None else FAMILIES.get((config.model_type, head))


def family_of(config: Any, architecture: str) -> Family:
    """The row for a Hugging Face config and the name of its top-level class.

    Raises:
        SplitError: if there is no such row.
    """
    row = row_of(config, architecture)
    if row is None:
        raise SplitError(
            f"cannot cut {architecture} (model_type {config.model_type!r}): no such family. Known: {known_rows()}. "
            f"To add it, write a row for ({config.model_type!r}, its head) in hosl/split/families"
        )
    return row


def known_rows() -> str:
    """The model types and heads that hosl can cut, as a line."""
    decoders = ", ".join(row.model_type for row in DECODERS)
    return f"{decoders} (causal, classification), {', '.join(row.model_type for row in ENCODERS)} (classification)"


def known_types() -> str:
    """The model types that hosl can cut, as a line."""
    return ", ".join(sorted({model_type for model_type, _ in FAMILIES}))
