"""What a task is: encoded examples in three disjoint splits, batches from them, predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from hosl.core.targets import Batch


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded example: its candidate rows of tokens, and which of them is right.

    A classification example has one row, and its label is a class; a prompt has one row per candidate answer.
    """

    rows: tuple[tuple[int, ...], ...]
    """Token ids, special tokens included."""
    label: int
    """Index of the right class or candidate."""
    option_lengths: tuple[int, ...] = ()
    """Per row, how many of its last tokens are the candidate answer; empty for classification."""


@runtime_checkable
class Task(Protocol):
    """Text turned into batches. The training loop reads train and dev; test is looked at once, after training."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, or the candidate answers."""
        ...

    @property
    def head(self) -> Literal["classification", "causal"]:
        """Which head the model needs."""
        ...

    @property
    def train(self) -> Sequence[Example]:
        """To train on."""
        ...

    @property
    def dev(self) -> Sequence[Example]:
        """To choose by."""
        ...

    @property
    def test(self) -> Sequence[Example]:
        """To report on; no text of it is in train or dev."""
        ...

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A training batch: one row per example, for prompts the right candidate's."""
        ...

    def collate_candidates(self, examples: Sequence[Example]) -> Batch:
        """A scoring batch: every candidate of an example is a row, candidates of an example one after the other."""
        ...

    def rows_per_example(self) -> int:
        """Rows that an example becomes in `collate_candidates`, at most."""
        ...

    def predict(self, examples: Sequence[Example], scores: np.ndarray) -> np.ndarray:
        """The best-scored label of each example, int64."""
        ...

    def losses(self, examples: Sequence[Example], scores: np.ndarray) -> np.ndarray:
        """Negative log-likelihood of each example's right label, in nats."""
        ...


def content_order(texts: Sequence[str], seed: int) -> list[int]:
    """Indices of `texts` by the hash of (seed, text): the same on every machine, in whatever order they came."""
    keys = [(blake2b(f"{seed}/{text}".encode(), digest_size=16).digest(), text) for text in texts]
    return sorted(range(len(texts)), key=lambda index: (keys[index], index))


def task_digest(task: Task) -> str:
    """SHA-256 over every encoded example of the three splits, in order: equal for equal data and settings."""
    digest = sha256()
    for part in (task.train, task.dev, task.test):
        for example in part:
            digest.update(repr((example.rows, example.label, example.option_lengths)).encode())
        digest.update(b"|")
    return digest.hexdigest()
