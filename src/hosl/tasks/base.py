"""The interface of a task: encoded examples in three disjoint splits, batches of them, predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from hosl.core.targets import Batch


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded example: its candidate rows of tokens, and which of them is right.

    A classification example has one row, and its label is a class; a prompt has one row per candidate answer. A text to
    learn (`scored`) has one row and no label.
    """

    rows: tuple[tuple[int, ...], ...]
    """Token ids, special tokens included."""
    label: int = 0
    """The index of the right class or candidate."""
    option_lengths: tuple[int, ...] = ()
    """Per row, the number of its last tokens that are the candidate answer; empty for classification."""
    scored: tuple[tuple[int, int], ...] = ()
    """The spans [start, stop) of the row's tokens that are learned, ascending and apart; start is 1 or more."""


@runtime_checkable
class Task(Protocol):
    """Text turned into batches. The training loop reads train and dev; test is looked at once, after training."""

    @property
    def name(self) -> str:
        """The name that reports show."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, or the candidate answers; empty where texts are learned token by token."""
        ...

    @property
    def head(self) -> Literal["classification", "causal"]:
        """The head that the model needs."""
        ...

    @property
    def train(self) -> Sequence[Example]:
        """The examples to train on."""
        ...

    @property
    def dev(self) -> Sequence[Example]:
        """The examples to choose checkpoints and settings by."""
        ...

    @property
    def test(self) -> Sequence[Example]:
        """The examples to report on; none of their texts is in train or dev."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a run says before it starts, a line each: classes and their rows, what was cut, dropped or guessed."""
        ...

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A training batch: one row per example; for prompts, the row of the right candidate."""
        ...

    def collate_candidates(self, examples: Sequence[Example]) -> Batch:
        """A scoring batch: one row per candidate, the candidates of an example one after the other."""
        ...

    def rows_per_example(self) -> int:
        """The largest number of rows of an example in `collate_candidates`."""
        ...

    def predict(self, examples: Sequence[Example], scores: np.ndarray) -> np.ndarray:
        """The label with the highest score of each example: [examples], int64.

        `scores` are those of the rows of `collate_candidates`, [rows, scores].
        """
        ...

    def losses(self, examples: Sequence[Example], scores: np.ndarray) -> np.ndarray:
        """The negative log-likelihood of each example's right label: [examples], nats; `scores` as in `predict`."""
        ...


def content_order(texts: Sequence[str], seed: int) -> list[int]:
    """The indices of `texts`, ordered by the hash of (seed, text): the same order of texts on every machine."""
    keys = [(blake2b(f"{seed}/{text}".encode(), digest_size=16).digest(), text) for text in texts]
    return sorted(range(len(texts)), key=lambda index: (keys[index], index))


def task_digest(task: Task) -> str:
    """SHA-256 over every encoded example of the three splits, in order: equal for equal data and settings."""
    digest = sha256()
    for part in (task.train, task.dev, task.test):
        for example in part:
            fields = (example.rows, example.label, example.option_lengths)
            digest.update(repr((*fields, example.scored) if example.scored else fields).encode())
        digest.update(b"|")
    return digest.hexdigest()
