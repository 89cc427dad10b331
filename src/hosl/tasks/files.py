"""Labelled text from your own files: values are checked by type, rows split by label and content."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hosl.errors import TaskError
from hosl.tasks.classification import (
    ClassificationTask,
    LabelledText,
    carve,
    classification_task,
    without,
)
from hosl.tasks.configs import FilesConfig
from hosl.tasks.labels import (
    check_classes,
    class_order,
    label_of,
    near_labels,
    near_name,
    renamed_labels,
    text_of,
    whole_numbers,
)
from hosl.tasks.rows import expanded_path, read_rows
from hosl.tasks.tokenizer import TextTokenizer


@dataclass(frozen=True)
class _Part:
    """The rows of a file."""

    name: str
    """The file, as the config names it."""
    rows: list[tuple[int, str, str]]
    """Row number, text, label."""
    class_names: Sequence[str] | None
    """The names of its classes in their order, if the file has them."""
    notes: list[str]
    """What was guessed or changed in reading."""


def files_task(config: FilesConfig, tokenizer: TextTokenizer, *, seed: int) -> ClassificationTask:
    """Read, check and encode the files. Classes: `class_order`; splits are disjoint by text, stratified by label.

    Raises:
        TaskError: if a file is missing, empty, binary, lacks a column or a text, or has a value that is no class, or a
            label that is not in train; if labels look like free text; if the model cannot read a row.
    """
    files = {name: _part(config, name) for name in ("train", "dev", "test") if getattr(config, name)}
    wanted = files["train"].class_names if config.labels is None else config.labels
    spelt = [label_of(value)[1] for value in wanted or ()]
    renamed = whole_numbers({*spelt, *(label for part in files.values() for _, _, label in part.rows)})
    labels = _classes(config, files["train"], renamed, [renamed.get(label, label) for label in spelt])
    given = {name: _indexed(part, labels, renamed, config) for name, part in files.items()}
    parts, split_notes = split_rows(config.train, config.train_rows, given, seed)
    notes = [note for part in files.values() for note in part.notes]
    return classification_task(
        Path(config.train).stem, labels, parts, tokenizer, config.max_tokens,
        notes=[note for note in (*notes, renamed_labels(renamed), near_labels(labels), *split_notes) if note],
    )  # fmt: skip


def _classes(
    config: FilesConfig, train: _Part, renamed: dict[str, str], wanted: Sequence[str]
) -> tuple[str, ...]:
    """The classes: `wanted`, which are those of task.labels, else the file's own; else the labels of training."""
    pairs = [(text, renamed.get(label, label)) for _, text, label in train.rows]
    found = {label for _, label in pairs}
    if config.labels is not None:
        return class_order(found, wanted)
    if train.class_names is not None:
        return class_order(found, wanted, said_by=f"{train.name}: the list of its own classes")
    check_classes(pairs, train.name)
    return class_order(found)


def split_rows(
    file: str, train_rows: int | None, given: Mapping[str, list[LabelledText]], seed: int
) -> tuple[dict[str, list[LabelledText]], list[str]]:
    """Train, dev and test, disjoint by text, and the lines about what was drawn or dropped.

    Args:
        file: the name of the training rows' file.
        train_rows: the number of training rows to keep; None: all.
        given: the rows of train, and of dev and test where there are files of these; else they are drawn from train.
        seed: the seed of the training rows that are kept.

    Raises:
        TaskError: if no row is left for one of the three.
    """
    notes, train = [], given["train"]
    carved = [name for name in ("test", "dev") if name not in given]
    if carved or train_rows is not None:
        unique = list(dict.fromkeys(train))
        if len(unique) < len(train):
            notes.append(f"{len(train) - len(unique)} rows of train are dropped: they repeat another row")
        train = unique
    test, dev, dropped = given.get("test"), given.get("dev"), 0
    if test is None:
        test, train = carve(train, [0.15], seed=0, leave=2 if dev is None else 1)
    dropped += len(train) - len(train := without(train, test))
    if dev is None:
        dev, train = carve(train, [0.10], seed=0, leave=1)
    dropped += len(dev) - len(dev := without(dev, test))
    dropped += len(train) - len(train := without(train, dev))
    if dropped:
        notes.append(f"{dropped} rows are dropped: their texts are in dev or test as well")
    if train_rows is not None:
        train = carve(train, [train_rows], seed, leave=0)[0]
    parts = {"train": train, "dev": dev, "test": test}
    for name, part in parts.items():
        if not part:
            raise TaskError(f"{file}: no row is left for {name} once the splits are disjoint; give more rows")
    if carved:
        drawn = " and ".join(f"{name} ({len(parts[name])} rows)" for name in carved)
        notes.append(f"{drawn} drawn from {file}, by label and content")
    texts: dict[str, int] = {}
    several = {text for text, label in train if texts.setdefault(text, label) != label}
    if several:
        notes.append(f"{len(several)} texts of train have more than one label")
    return parts, notes


def _part(config: FilesConfig, split: str) -> _Part:
    """The checked rows of a split's file."""
    name = str(getattr(config, split))
    read = read_rows(expanded_path(name), split)
    names, kinds, trimmed = read.class_names.get(config.label_column), dict[str, int](), 0
    rows: list[tuple[int, str, str]] = []
    for number, row in enumerate(read.rows, start=1):
        text, value = (_cell(row, column, name) for column in (config.text_column, config.label_column))
        column = config.text_column
        try:
            text = text_of(text)
            column = config.label_column
            kind, label = label_of(value, names)
            if label.casefold() == "nan" and label not in (config.labels or ()):
                raise TaskError(
                    "is nan, a missing value; fill it, or list it in task.labels if it is a class"
                )
        except TaskError as cause:
            raise TaskError(f"{name}, row {number}: `{column}` {cause}") from None
        trimmed += isinstance(value, str) and value != value.strip()
        kinds.setdefault(kind, number)
        rows.append((number, text, label))
    if not rows:
        raise TaskError(f"{name} holds no rows; it should hold one example per row")
    if len(kinds) > 1:
        found = ", ".join(f"{kind} in row {number}" for kind, number in kinds.items())
        raise TaskError(f"{name}: `{config.label_column}` is {found}; write all labels as one kind")
    note = f"{name}: spaces around {trimmed} labels are dropped" if trimmed else ""
    return _Part(name, rows, names, [*read.notes, note])


def _cell(row: dict[str, object], column: str, name: str) -> object:
    if column in row:
        return row[column]
    raise TaskError(
        f"{name}: no column `{column}`; there are {', '.join(map(str, row))}{near_name(column, row)}"
    )


def _indexed(
    part: _Part, labels: tuple[str, ...], renamed: dict[str, str], config: FilesConfig
) -> list[LabelledText]:
    index_of = {label: index for index, label in enumerate(labels)}
    indexed = []
    for number, text, label in part.rows:
        index = index_of.get(renamed.get(label, label))
        if index is None:
            fault = "never occurs in training" if config.labels is None else "is not in task.labels"
            shown = ", ".join(labels[:20])
            raise TaskError(f"{part.name}, row {number}: label `{label}` {fault}; known: {shown}")
        indexed.append((text, index))
    return indexed
