"""Accuracy, macro F1 and loss by scoring, through the same two parties as training. Nothing is updated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
    """The F1 score averaged over the labels that occur or are predicted, each with the same weight."""
    loss_nats: float
    """The mean negative log-likelihood of the right label, or of the right option (per token)."""
    examples: int
    confusion: np.ndarray
    """Examples of each label, by what was predicted: [labels, predicted labels], int64."""

    def numbers(self) -> dict[str, float]:
        """What metrics.jsonl holds: all but the confusion matrix."""
        return {
            "accuracy": self.accuracy, "f1_macro": self.f1_macro, "loss_nats": self.loss_nats,
            "examples": self.examples,
        }  # fmt: skip


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
    confusion = np.zeros((len(task.labels), len(task.labels)), dtype=np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    occurs = [row for row in by_class(task.labels, confusion) if row["support"] or row["predicted"]]
    return Evaluation(
        accuracy=float((predicted == truth).mean()),
        f1_macro=float(np.mean([row["f1"] for row in occurs])),
        loss_nats=float(np.concatenate(losses).astype(np.float64).mean()),
        examples=len(examples),
        confusion=confusion,
    )


def by_class(labels: Sequence[str], confusion: np.ndarray) -> list[dict[str, Any]]:
    """Precision, recall, F1, support and number of predictions of each label; 0 where there is nothing to divide by.

    Args:
        labels: the labels.
        confusion: as in `Evaluation`.
    """
    rows = []
    for index, label in enumerate(labels):
        hits, support, predicted = (
            int(count)
            for count in (confusion[index, index], confusion[index].sum(), confusion[:, index].sum())
        )
        rows.append({
            "label": label, "precision": hits / max(predicted, 1), "recall": hits / max(support, 1),
            "f1": 2 * hits / max(support + predicted, 1), "support": support, "predicted": predicted,
        })  # fmt: skip
    return rows


def _chunks(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
