"""Accuracy, macro F1 and loss by scoring, through the same two parties as training. Nothing is updated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hosl.core.protocols import ClientSide, ServerSide
from hosl.errors import NonFiniteError
from hosl.tasks import Example, Task


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of the two halves on a set of examples."""

    accuracy: float
    """The share of examples whose best-scored label is the right one."""
    f1_macro: float
    """The F1 score averaged over the labels that occur, each with the same weight."""
    loss_nats: float
    """The mean negative log-likelihood of the right label, or of the right option (per token)."""
    examples: int


def evaluate(
    client: ClientSide, server: ServerSide, task: Task, examples: Sequence[Example], *, rows_per_batch: int
) -> Evaluation:
    """Score `examples` in batches of at most `rows_per_batch` rows; a row is one candidate answer.

    Raises:
        NonFiniteError: if a score is NaN or infinite.
    """
    predictions, losses = [], []
    for chunk in _chunks(examples, max(1, rows_per_batch // task.rows_per_example())):
        batch = task.collate_candidates(chunk)
        scores = server.scores(client.forward(batch), batch.targets)
        if not np.isfinite(scores).all():
            raise NonFiniteError(
                "an evaluation score is NaN or infinite; the model has diverged: lower the learning rates"
            )
        predictions.append(task.predict(chunk, scores))
        losses.append(task.losses(chunk, scores))
    truth = np.array([example.label for example in examples], dtype=np.int64)
    predicted = np.concatenate(predictions)
    return Evaluation(
        accuracy=float((predicted == truth).mean()),
        f1_macro=_f1_macro(predicted, truth),
        loss_nats=float(np.concatenate(losses).astype(np.float64).mean()),
        examples=len(examples),
    )


def _chunks(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def _f1_macro(predicted: np.ndarray, truth: np.ndarray) -> float:
    scores = []
    for label in np.unique(truth):
        hits = int(((predicted == label) & (truth == label)).sum())
        scores.append(2 * hits / max(int((predicted == label).sum() + (truth == label).sum()), 1))
    return float(np.mean(scores))
