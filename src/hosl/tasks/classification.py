"""Text classification with a head: one row per example, the label is a class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hosl.core.targets import Batch
from hosl.tasks.base import Example, content_order
from hosl.tasks.collate import class_batch
from hosl.tasks.encoding import Encoder
from hosl.tasks.labels import class_counts
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
    notes: tuple[str, ...] = ()

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One right-padded row per example."""
        return class_batch(examples, self.pad_id)

    def collate_candidates(self, examples: Sequence[Example]) -> Batch:
        """The same batch as `collate`: the head scores every class at once."""
        return class_batch(examples, self.pad_id)

    def rows_per_example(self) -> int:
        """1: the head scores every class in one row."""
        return 1

    def predict(self, examples: Sequence[Example], scores: np.ndarray) -> np.ndarray:
        """The class with the highest score."""
        return scores.argmax(axis=1).astype(np.int64)

    def losses(self, examples: Sequence[Example], scores: np.ndarray) -> np.ndarray:
        """The negative log-probability of each example's class, nats."""
        return -scores[np.arange(len(examples)), [example.label for example in examples]]


LabelledText = tuple[str, int]
"""A text and the index of its label."""


def classification_task(
    name: str,
    labels: tuple[str, ...],
    parts: Mapping[str, Sequence[LabelledText]],
    tokenizer: TextTokenizer,
    max_tokens: int | Literal["auto"],
    notes: Sequence[str] = (),
) -> ClassificationTask:
    """The task of labelled texts, each cut to `max_tokens` tokens.

    Args:
        name: the task's name.
        labels: the classes.
        parts: train, dev and test.
        tokenizer: the model's.
        max_tokens: the setting of that name.
        notes: what has to be said of the texts.

    Raises:
        TaskError: if the model cannot read a row.
    """
    encoder = Encoder(tokenizer, max_tokens)
    encoded = {
        part: [Example(rows=(encoder.encode(text),), label=label) for text, label in texts]
        for part, texts in parts.items()
    }
    encoder.check(encoded)
    counts = class_counts(labels, {part: [label for _, label in texts] for part, texts in parts.items()})
    return ClassificationTask(
        name, labels, *encoded.values(), pad_id=tokenizer.pad_id, notes=(*notes, *counts, *encoder.notes())
    )


def carve(
    texts: Sequence[LabelledText], sizes: Sequence[int | float], seed: int, *, leave: int | None = None
) -> tuple[list[LabelledText], ...]:
    """Split by content hash: the first parts have the given sizes, the last one is the rest.

    A size is a count (int) or a share (float). A part may grow a little, so that equal texts stay in one part.

    Args:
        texts: texts and labels; what occurs twice is taken once.
        sizes: of the first parts.
        seed: the seed of the hash.
        leave: None: classes fall as they may. A number: every class keeps its share in each part; the first part gets
            a row of every class that has more than `leave`.
    """
    unique = list(dict.fromkeys(texts))
    if leave is None:
        order = content_order([text for text, _ in unique], seed)
    else:
        order = _stratified_order(unique, seed, leave)
    parts, start = [], 0
    for size in sizes:
        count = round(size * len(unique)) if isinstance(size, float) else size
        end = min(start + count, len(order))
        while 0 < end < len(order) and unique[order[end]][0] == unique[order[end - 1]][0]:
            end += 1
        parts.append([unique[index] for index in order[start:end]])
        start = end
    return (*parts, [unique[index] for index in order[start:]])


def _stratified_order(pairs: Sequence[LabelledText], seed: int, leave: int) -> list[int]:
    """The indices of `pairs` in an order of which any beginning has each class by its share; equal texts adjacent.

    A class with more than `leave` texts has its first one at the beginning, the texts of a smaller class are the last.
    """
    indices: dict[str, list[int]] = {}
    for index, (text, _) in enumerate(pairs):
        indices.setdefault(text, []).append(index)
    texts = list(indices)
    hashed = [texts[number] for number in content_order(texts, seed)]
    classes: dict[int, list[int]] = {}
    for place, text in enumerate(hashed):
        classes.setdefault(min(pairs[index][1] for index in indices[text]), []).append(place)
    keys = [0.0] * len(hashed)
    for places in classes.values():
        for rank, place in enumerate(places):
            small = len(places) <= leave
            keys[place] = 1.0 if small else (rank + 0.5) / len(places) if rank else 0.0
    order = sorted(range(len(hashed)), key=lambda place: (keys[place], place))
    return [index for place in order for index in indices[hashed[place]]]


def without(texts: Sequence[LabelledText], held_out: Sequence[LabelledText]) -> list[LabelledText]:
    """The pairs of `texts` whose text is not in `held_out`."""
    held = {text for text, _ in held_out}
    return [pair for pair in texts if pair[0] not in held]
