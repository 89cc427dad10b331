"""Text classification with a head: one row per example, the label is a class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hosl.core.targets import Batch
from hosl.tasks.base import Example, content_order
from hosl.tasks.collate import class_batch
from hosl.tasks.tokenizer import TextTokenizer


@dataclass(frozen=True)
class ClassificationTask:
    """Encoded text with class labels; implements `Task`."""

    name: str
    labels: tuple[str, ...]
    train: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example]
    pad_id: int
    head: Literal["classification", "causal"] = "classification"

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One right-padded row per example."""
        return class_batch(examples, self.pad_id)

    def collate_candidates(self, examples: Sequence[Example]) -> Batch:
        """As `collate`: the head scores every class at once."""
        return class_batch(examples, self.pad_id)

    def rows_per_example(self) -> int:
        """1."""
        return 1

    def predict(self, examples: Sequence[Example], scores: np.ndarray) -> np.ndarray:
        """The class with the highest score."""
        return scores.argmax(axis=1).astype(np.int64)

    def losses(self, examples: Sequence[Example], scores: np.ndarray) -> np.ndarray:
        """Negative log-probability of each example's class."""
        return -scores[np.arange(len(examples)), [example.label for example in examples]]


LabelledText = tuple[str, int]
"""A text and the index of its label."""


def encode_classes(texts: Sequence[LabelledText], tokenizer: TextTokenizer, max_tokens: int) -> list[Example]:
    """Labelled texts as examples."""
    return [Example(rows=(tokenizer.encode(text, max_tokens),), label=label) for text, label in texts]


def carve(
    texts: Sequence[LabelledText], sizes: Sequence[int | float], seed: int
) -> tuple[list[LabelledText], ...]:
    """Split by content hash: the first parts have the given sizes (counts, or shares), the rest comes last.

    Equal texts stand side by side in the order, and a text never lies in two parts.
    """
    unique = list(dict.fromkeys(texts))
    order = content_order([text for text, _ in unique], seed)
    parts, place = [], 0
    for size in sizes:
        count = round(size * len(unique)) if isinstance(size, float) else size
        end = min(place + count, len(order))
        while 0 < end < len(order) and unique[order[end]][0] == unique[order[end - 1]][0]:
            end += 1
        parts.append([unique[index] for index in order[place:end]])
        place = end
    return (*parts, [unique[index] for index in order[place:]])


def without(texts: Sequence[LabelledText], held_out: Sequence[LabelledText]) -> list[LabelledText]:
    """`texts` less those whose text stands in `held_out`."""
    held = {text for text, _ in held_out}
    return [pair for pair in texts if pair[0] not in held]
