"""Losses, their gradients and scores from a head's logits, in numpy. The twin of `engine.loss`.

Of a batch's states only those that predict a scored token are read: `Scored` says which, their right tokens, and the
weight of each in the loss. So one formula serves classes, options and texts:

    loss = sum_i weight_i (log sum_v exp z_iv - z_i,token_i)
    d loss / d z_iv = weight_i (softmax(z_i)_v - [v = token_i])
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

from hosl.core.array_types import Float, Int
from hosl.core.targets import ClassTargets, OptionTargets, Targets, scored_positions, scored_tokens


@dataclass(frozen=True, slots=True)
class Scored:
    """The states of a batch that the head is asked for, row by row."""

    rows: Int[np.ndarray, " scored"]
    """The index of each along the states' first dimension, int64."""
    columns: Int[np.ndarray, " scored"]
    """The index of each along the second one, int64."""
    tokens: Int[np.ndarray, " scored"]
    """The right token, or class, of each, int64."""
    weights: Float[np.ndarray, " scored"]
    """The weight of each in the loss, float64; they sum to 1."""
    texts: Int[np.ndarray, " scored"]
    """The batch's row of each, int64."""

    def some(self, places: slice) -> "Scored":
        """Those at these places; their weights are still those among all."""
        return Scored(*(getattr(self, field.name)[places] for field in fields(self)))


def scored(targets: Targets) -> Scored:
    """The states that a batch's loss needs among those that a trunk sends (`core.targets.states_shape`)."""
    if isinstance(targets, ClassTargets):
        rows = np.arange(len(targets.labels))
        labels = targets.labels.astype(np.int64)
        return Scored(rows, np.zeros_like(rows), labels, np.full(len(rows), 1 / len(rows)), rows)
    if targets.mean_over == "tokens":
        tokens = scored_tokens(targets)
        texts, _ = np.nonzero(tokens >= 0)
        count = len(texts)
        places = np.arange(count)
        return Scored(
            np.zeros_like(places), places, tokens[tokens >= 0], np.full(count, 1 / max(count, 1)), texts
        )
    texts, spans = np.nonzero(targets.tokens >= 0)
    columns = np.searchsorted(scored_positions(targets), targets.positions[texts, spans])
    counts = np.bincount(texts, minlength=len(targets.tokens))
    weights = 1 / (counts[texts] * len(targets.tokens))
    return Scored(texts, columns, targets.tokens[texts, spans].astype(np.int64), weights, texts)


def loss_of(logits: Float[np.ndarray, "scored vocabulary"], of: Scored) -> float:
    """The mean loss of a batch, nats; the logits stay as they are."""
    return float(of.weights @ _losses(logits, of))


def loss_and_gradient_(logits: Float[np.ndarray, "scored vocabulary"], of: Scored) -> float:
    """The mean loss of a batch, nats; the logits are replaced by their gradients, so that no second array is held."""
    at = np.arange(len(logits))
    right = logits[at, of.tokens].astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    np.subtract(logits, top, out=logits)
    np.exp(logits, out=logits)
    sums = logits.sum(axis=1, dtype=np.float64)
    losses = np.log(sums) + top[:, 0] - right
    logits *= (of.weights / sums).astype(logits.dtype)[:, None]
    logits[at, of.tokens] -= of.weights.astype(logits.dtype)
    return float(of.weights @ losses)


def class_scores(logits: Float[np.ndarray, "rows classes"]) -> Float[np.ndarray, "rows classes"]:
    """Log-probabilities per class, float32."""
    return (logits - _log_sums(logits)[:, None]).astype(np.float32)


def token_scores(
    logits: Iterable[Float[np.ndarray, "some vocabulary"]], targets: OptionTargets, of: Scored
) -> Float[np.ndarray, "rows scores"]:
    """Log-probabilities of each row's option, mean per token [rows, 1], float32, from logits in pieces.

    Where the mean is over tokens [rows, 2]: the second score is the number of tokens that the model ranks first.
    """
    losses, right, done = np.empty(len(of.tokens)), np.empty(len(of.tokens)), 0
    for piece in logits:
        places = slice(done, done := done + len(piece))
        losses[places] = _losses(piece, of.some(places))
        right[places] = piece.argmax(axis=1) == of.tokens[places]
    rows = len(targets.mask)
    means = -np.bincount(of.texts, losses, minlength=rows) / np.bincount(of.texts, minlength=rows)
    if targets.mean_over == "rows":
        return means[:, None].astype(np.float32)
    return np.stack([means, np.bincount(of.texts, right, minlength=rows)], axis=1).astype(np.float32)


def _losses(logits: Float[np.ndarray, "scored vocabulary"], of: Scored) -> Float[np.ndarray, " scored"]:
    """The negative log-likelihood of each right token, float64."""
    return _log_sums(logits) - logits[np.arange(len(logits)), of.tokens]


def _log_sums(logits: Float[np.ndarray, "scored vocabulary"]) -> Float[np.ndarray, " scored"]:
    """log sum exp of each row, float64."""
    top = logits.max(axis=1)
    return np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)) + top
