"""The classes of a task in the order of the model's own head, and a digest by which devices compare their lists."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from hosl.tasks.base import Example
from hosl.tasks.classification import ClassificationTask
from hosl.tasks.labels import whole_numbers


def model_labels(folder: Path) -> tuple[str, ...]:
    """The names of the classes that a model's head was trained for, in its order; empty if config.json has none."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = {int(index): str(name) for index, name in (config.get("id2label") or {}).items()}
        names = names or {int(index): str(name) for name, index in (config.get("label2id") or {}).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return ()  # the model's loader says what is wrong with the file
    order = tuple(names.get(index, "") for index in range(len(names)))
    return () if any(re.fullmatch(r"(LABEL_\d+)?", name) for name in order) else order


def in_model_order(
    task: ClassificationTask, names: Sequence[str], *, reorder: bool = True
) -> ClassificationTask:
    """The task with the classes of the model's head, in its order, where the head has every class of the data.

    Names are compared without case and outer spaces, and written as in the data; otherwise, or without `reorder`, the
    task stays as it is. Where its classes are then not those of the head, a note says so (`label_note`).
    """
    task = _in_order(task, names) if reorder else task
    note = label_note(task.labels, names)
    return replace(task, notes=(*task.notes, note)) if note else task


def _in_order(task: ClassificationTask, names: Sequence[str]) -> ClassificationTask:
    ours = {_key(label): label for label in task.labels}
    theirs = [_key(name) for name in names]
    if len(ours) < len(task.labels) or len({*theirs}) < len(theirs) or not ours.keys() <= {*theirs}:
        return task
    order = tuple(ours.get(_key(name), name) for name in names)
    places = [order.index(label) for label in task.labels]

    def moved(examples: Sequence[Example]) -> list[Example]:
        return [replace(example, label=places[example.label]) for example in examples]

    return replace(task, labels=order, train=moved(task.train), dev=moved(task.dev), test=moved(task.test))


def label_note(labels: Sequence[str], names: Sequence[str]) -> str:
    """The line about a head that was trained for other classes than the task's, as many; empty: it was not.

    Args:
        labels: the classes of the task, in order.
        names: those of the model's head.
    """
    if len(names) != len(labels) or [*map(_key, names)] == [*map(_key, labels)]:
        return ""
    pairs = ", ".join(
        f"`{label}` is its `{name}`" for label, name in list(zip(labels, names, strict=True))[:8]
    )
    return f"the model's head was trained for other classes and goes on from them: {pairs}; task.labels sets the order"


def labels_digest(labels: Sequence[str]) -> str:
    """SHA-256 over the names of the classes, in order."""
    return sha256(json.dumps([*labels]).encode()).hexdigest()


def _key(name: str) -> str:
    key = name.strip().casefold()
    return whole_numbers([key]).get(key, key)
