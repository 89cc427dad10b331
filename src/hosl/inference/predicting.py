"""Labels with their probabilities for rows, through the two parties of training. Nothing is updated. No torch."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from hosl.config import Config
from hosl.core.protocols import ClientSide, ServerSide
from hosl.errors import NonFiniteError
from hosl.inference.new_rows import NewRow
from hosl.tasks import FilesConfig, PromptsConfig, Task, TextTokenizer, load_task, model_labels


@dataclass(frozen=True)
class Scorer:
    """A model that scores rows, wherever its halves are."""

    config: Config
    """The settings of its run, or those that were given."""
    labels: Sequence[str]
    tokenizer: TextTokenizer
    client: ClientSide
    server: ServerSide
    says: str
    """What it is, for a person: such as `runs/my after step 60`."""


def known_labels(config: Config, tokenizer: TextTokenizer, folder: Path) -> Sequence[str]:
    """The labels of a task that no record tells: the config's, the model's own, or those of the task's data.

    Args:
        config: names the task.
        tokenizer: the model's, to read the data.
        folder: the folder of the model or of a half.

    Raises:
        TaskError: if the data are needed and cannot be read.
    """
    task = config.task
    if isinstance(task, PromptsConfig):
        return task.as_template().labels
    if isinstance(task, FilesConfig) and task.labels is not None:
        return [str(label) for label in task.labels]
    names = model_labels(folder)
    return names or load_task(task, tokenizer, seed=config.seed, model_labels=names).labels


@dataclass(frozen=True, slots=True)
class Predicted:
    """The label of a row."""

    row: NewRow
    label: int
    """The index of the label with the highest score."""
    scores: np.ndarray
    """[labels], float32: log-probabilities of classes, or mean log-likelihoods per token of options, nats."""

    def probabilities(self) -> np.ndarray:
        """The softmax of the scores: [labels], float64."""
        scores = self.scores.astype(np.float64)
        weights = np.exp(scores - scores.max())
        return weights / weights.sum()


def predictions(
    client: ClientSide, server: ServerSide, task: Task, rows: Iterable[NewRow], *, rows_per_batch: int
) -> Iterator[Predicted]:
    """The label of every row, in order; in batches as `evaluate` makes them, so that both score alike.

    Raises:
        NonFiniteError: if a score is NaN or infinite.
    """
    left, size = iter(rows), max(1, rows_per_batch // task.rows_per_example())
    while chunk := list(islice(left, size)):
        examples = [row.example for row in chunk]
        batch = task.collate_candidates(examples)
        scores = server.scores(client.forward(batch), batch.targets)
        if not np.isfinite(scores).all():
            raise NonFiniteError(
                f"the scores of rows {chunk[0].number} to {chunk[-1].number} are NaN or infinite; has the "
                "model diverged?"
            )
        labels = task.predict(examples, scores).tolist()
        by_row = scores.reshape(len(chunk), len(task.labels))
        yield from (Predicted(*told) for told in zip(chunk, labels, by_row, strict=True))


@dataclass
class Tally:
    """What is said of all rows at the end."""

    rows: int = 0
    labelled: int = 0
    right: int = 0

    def result(self) -> dict[str, Any]:
        """The numbers; the accuracy is over the rows that have a label of the task."""
        numbers: dict[str, Any] = {"rows": self.rows}
        if self.labelled:
            numbers |= {"labelled": self.labelled, "accuracy": self.right / self.labelled}
        return numbers


def write_predictions(
    predicted: Iterable[Predicted],
    labels: Sequence[str],
    out: TextIO,
    *,
    with_scores: bool,
    with_columns: bool,
    done: Callable[[int], None],
) -> Tally:
    """Write one JSON object per row.

    Args:
        predicted: the predictions, as they come.
        labels: the names of the labels.
        out: where to write.
        with_scores: whether the scores stand beside the probabilities.
        with_columns: whether the columns that a row was read from do.
        done: is called with the number of rows that are written.
    """
    tally = Tally()
    for one in predicted:
        line: dict[str, Any] = {"row": one.row.number, "label": labels[one.label]}
        line["probabilities"] = dict(zip(labels, one.probabilities().tolist(), strict=True))
        if with_scores:
            line["scores"] = dict(zip(labels, one.scores.tolist(), strict=True))
        if with_columns:
            line["columns"] = one.row.columns
        out.write(json.dumps(line, ensure_ascii=False) + "\n")
        tally.rows += 1
        tally.labelled += one.row.label is not None
        tally.right += one.label == one.row.label
        done(tally.rows)
    return tally
