"""Batches, targets and replies: the data that the two parties exchange.

The data boundary is these types. A `Batch` stays with the client; of it, only `Batch.targets` may cross to the
server. No field of `Targets` can carry the input's token ids or text. The calls that carry them: `hosl.core.protocols`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from hosl.core.array_types import Int

Activations: TypeAlias = Any
"""Hidden states at the cut, [rows, seq, width]; a torch tensor or an array. Rounds never look inside."""


Pair: TypeAlias = tuple[Activations, Activations]
"""The activations at theta_c + epsilon u and at theta_c - epsilon u, in this order."""


@dataclass(frozen=True, slots=True, eq=False)
class ClassTargets:
    """Targets of a classification head: one label per row."""

    mask: Int[np.ndarray, "rows seq"]
    """1 where a position holds a token, 0 where it is padding; int8."""
    labels: Int[np.ndarray, " rows"]
    """The index of the right class; int64."""


@dataclass(frozen=True, slots=True, eq=False)
class OptionTargets:
    """Targets of a language-model head: the scored tokens of each row, such as one candidate answer (option).

    Rows with fewer scored tokens than the longest are padded: position 0, token -1. A padded element is not scored.
    """

    mask: Int[np.ndarray, "rows seq"]
    """1 where a position holds a token, 0 where it is padding; int8."""
    positions: Int[np.ndarray, "rows span"]
    """The positions of the logits that predict each option token: the token's own position minus 1; int32."""
    tokens: Int[np.ndarray, "rows span"]
    """The option's tokens, -1 where padded; int32."""
    mean_over: Literal["rows", "tokens"] = "rows"
    """The mean that is the loss: over rows, each the mean of its tokens (MeZO's prompts), or over all scored tokens of
    the step, as causal language models are trained."""


@dataclass(frozen=True, slots=True, eq=False)
class PositionTargets:
    """The scored positions without the right answers: all that a server gets when the labels stay with the client.

    The states asked for are those of every row at all these positions, [rows, positions, width].
    """

    mask: Int[np.ndarray, "rows seq"]
    """1 where a position holds a token, 0 where it is padding; int8."""
    positions: Int[np.ndarray, " positions"]
    """The positions scored in at least one row, ascending; int64."""


@dataclass(frozen=True, slots=True, eq=False)
class RowPositionTargets:
    """The scored positions of each row without the right answers, where the loss is the mean over scored tokens.

    The states asked for are those alone, row by row, [1, scored, width]: texts of many lengths are scored at nearly
    every position of a batch, though each of them at few.
    """

    mask: Int[np.ndarray, "rows seq"]
    """1 where a position holds a token, 0 where it is padding; int8."""
    scored: Int[np.ndarray, "rows seq"]
    """1 where a position is scored; int8."""


Targets: TypeAlias = ClassTargets | OptionTargets
AskedPositions: TypeAlias = PositionTargets | RowPositionTargets


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One mini-batch on the client. Only `targets` may leave the device."""

    input_ids: Int[np.ndarray, "rows seq"]
    """Token ids; int64."""
    targets: Targets


@dataclass(frozen=True, slots=True)
class StepReply:
    """The server's reply to a training step."""

    loss: float
    """Mean loss of the batch at the theta_s that entered the step, in nats."""
    gradient: Activations | None = None
    """dL/dh at the same theta_s, shaped like the activations; None unless asked for."""


def rows_of(targets: Targets, rows: Sequence[int]) -> Targets:
    """The targets of these rows, in this order."""
    at = list(rows)
    if isinstance(targets, ClassTargets):
        return ClassTargets(targets.mask[at], targets.labels[at])
    return OptionTargets(targets.mask[at], targets.positions[at], targets.tokens[at], targets.mean_over)


def weight_of(targets: Targets | AskedPositions) -> int:
    """The weight of this batch among others of the same step: its rows, or its scored tokens."""
    if isinstance(targets, RowPositionTargets):
        return int(targets.scored.sum())
    if isinstance(targets, OptionTargets) and targets.mean_over == "tokens":
        return int((targets.tokens >= 0).sum())
    return len(targets.mask)


def scored_positions(targets: OptionTargets) -> Int[np.ndarray, " positions"]:
    """The positions scored in at least one row, ascending; int64."""
    return np.unique(targets.positions[targets.tokens >= 0]).astype(np.int64)


def scored_tokens(targets: OptionTargets) -> Int[np.ndarray, "rows seq"]:
    """The right token of each scored position of each row, -1 elsewhere; int64."""
    tokens = np.full(targets.mask.shape, -1, np.int64)
    rows, places = np.nonzero(targets.tokens >= 0)
    tokens[rows, targets.positions[rows, places]] = targets.tokens[rows, places]
    return tokens


def positions_of(targets: Targets) -> AskedPositions:
    """The scored positions, of each row where the mean is over tokens; position 0 for a classification head."""
    if isinstance(targets, ClassTargets):
        return PositionTargets(targets.mask, np.zeros(1, np.int64))
    if targets.mean_over == "tokens":
        return RowPositionTargets(targets.mask, (scored_tokens(targets) >= 0).astype(np.int8))
    return PositionTargets(targets.mask, scored_positions(targets))


def states_shape(asked: AskedPositions, width: int) -> tuple[int, int, int]:
    """The shape of the states at these positions."""
    if isinstance(asked, RowPositionTargets):
        return 1, int(asked.scored.sum()), width
    return len(asked.mask), len(asked.positions), width
