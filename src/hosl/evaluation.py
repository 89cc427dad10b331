"""Accuracy, macro F1, perplexity and loss by scoring, through the two parties of training. Nothing is updated."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hosl.core.protocols import ClientSide, ServerSide
from hosl.core.targets import Batch, OptionTargets
from hosl.errors import NonFiniteError
from hosl.tasks import Example, Task


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of the two halves on a set of examples."""

    accuracy: float
    """The share of examples whose best-scored label is the right one; of scored tokens that are ranked first, where
    texts are learned."""
    loss_nats: float
    """The mean negative log-likelihood of the right label, of the right option (per token), or of a scored token."""
    examples: int
    f1_macro: float | None = None
    """The F1 score averaged over the labels that occur or are predicted, each with the same weight; None: no labels."""
    confusion: np.ndarray | None = None
    """Examples of each label, by what was predicted: [labels, predicted labels], int64; None: no labels."""
    tokens: int | None = None
    """The number of scored tokens, where texts are learned."""

    def numbers(self) -> dict[str, float]:
        """What metrics.jsonl holds: all but the confusion matrix, and the perplexity, e to the loss, of texts."""
        shared = {"accuracy": self.accuracy, "loss_nats": self.loss_nats, "examples": self.examples}
        if self.f1_macro is not None:
            return shared | {"f1_macro": self.f1_macro}
        return shared | {"perplexity": math.exp(min(self.loss_nats, 700.0)), "tokens": self.tokens or 0}


def evaluate(
    client: ClientSide, server: ServerSide, task: Task, examples: Sequence[Example], *, rows_per_batch: int
) -> Evaluation:
    """Score `examples` in batches of at most `rows_per_batch` rows; a row is one candidate answer, or one text.

    Raises:
        NonFiniteError: if a score is NaN or infinite.
    """

    def scored() -> Iterator[tuple[Sequence[Example], Batch, np.ndarray]]:
        for chunk in _chunks(examples, max(1, rows_per_batch // task.rows_per_example())):
            batch = task.collate_candidates(chunk)
            scores = server.scores(client.forward(batch), batch.targets)
            if not np.isfinite(scores).all():
                raise NonFiniteError(
                    "an evaluation score is NaN or infinite; the model has diverged: lower the learning rates"
                )
            yield chunk, batch, scores

    return _of_labels(task, scored()) if task.labels else _of_tokens(scored())


def _of_labels(task: Task, scored: Iterator[tuple[Sequence[Example], Batch, np.ndarray]]) -> Evaluation:
    truths, predictions, losses = [], [], []
    for chunk, _, scores in scored:
        truths.append([example.label for example in chunk])
        predictions.append(task.predict(chunk, scores))
        losses.append(task.losses(chunk, scores))
    truth, predicted = np.concatenate(truths).astype(np.int64), np.concatenate(predictions)
    confusion = np.zeros((len(task.labels), len(task.labels)), dtype=np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    occurs = [row for row in by_class(task.labels, confusion) if row["support"] or row["predicted"]]
    return Evaluation(
        accuracy=float((predicted == truth).mean()),
        loss_nats=float(np.concatenate(losses).astype(np.float64).mean()),
        examples=len(truth),
        f1_macro=float(np.mean([row["f1"] for row in occurs])),
        confusion=confusion,
    )


def _of_tokens(scored: Iterator[tuple[Sequence[Example], Batch, np.ndarray]]) -> Evaluation:
    """Every token weighs the same, in whichever batch it is. Scores [rows, 2]: mean log-likelihood, tokens right."""
    nats, right, tokens, examples = 0.0, 0.0, 0, 0
    for chunk, batch, scores in scored:
        assert isinstance(batch.targets, OptionTargets), "a task without labels scores tokens"
        counts = (batch.targets.tokens >= 0).sum(axis=1)
        nats -= float((scores[:, 0].astype(np.float64) * counts).sum())
        right += float(scores[:, 1].sum())
        tokens, examples = tokens + int(counts.sum()), examples + len(chunk)
    return Evaluation(accuracy=right / tokens, loss_nats=nats / tokens, examples=examples, tokens=tokens)


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
