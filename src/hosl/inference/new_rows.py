"""Rows without labels, or with some: each is read, checked and encoded as the rows that a model was trained on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosl.errors import ConfigError, TaskError
from hosl.tasks import DocstringsConfig, Example, FilesConfig, PromptsConfig, Task, TaskConfig, TextTokenizer
from hosl.tasks.classification import ClassificationTask
from hosl.tasks.encoding import Encoder
from hosl.tasks.labels import label_of, near_name, text_of, whole_numbers
from hosl.tasks.prompts import PromptTask, encode_prompt
from hosl.tasks.rows import Row, expanded_path, read_rows


@dataclass(frozen=True, slots=True)
class NewRow:
    """A row to predict the label of."""

    number: int
    """Its number in the file, from 1."""
    columns: dict[str, Any]
    """The columns that it is read from, as the file has them."""
    example: Example
    """Its tokens; its label is 0 whatever the row says: a server that scores it is told no more."""
    label: int | None
    """The index of the label that the row has; None: it has none of the task."""


def check_has_labels(task: TaskConfig) -> None:
    """Refuse a task whose texts are learned token by token.

    Raises:
        ConfigError: naming it.
    """
    if not isinstance(task, PromptsConfig | FilesConfig | DocstringsConfig):
        raise ConfigError(
            "a task of texts to learn (kind: sft) has no labels to score; `hosl predict` writes its answers"
        )


class RowReader:
    """The rows of files as examples of a task, whose own data are not read."""

    def __init__(self, config: TaskConfig, labels: Sequence[str], tokenizer: TextTokenizer) -> None:
        """Make the task.

        Args:
            config: the settings of the task.
            labels: its classes in their order; of prompts the config has them.
            tokenizer: the model's.

        Raises:
            ConfigError: if the task has no labels.
        """
        self._config, self._tokenizer = config, tokenizer
        self._encoder = Encoder(tokenizer, config.max_tokens)
        self.task: Task
        """The task without data of its own: its labels, batches and predictions."""
        match config:
            case PromptsConfig():
                template = config.as_template()
                name = config.name or Path(str(config.train)).stem
                self.task = PromptTask(name, template.labels, (), (), (), pad_id=tokenizer.pad_id)
                self._columns, self._label_column = template.columns, config.label_column
                self._encode: Callable[[Row, str], Example] = lambda row, where: encode_prompt(
                    template.prompt(row), 0, template.options, tokenizer, self._encoder, where
                )
            case FilesConfig() | DocstringsConfig():
                files = config if isinstance(config, FilesConfig) else FilesConfig(train="")
                self.task = ClassificationTask("files", tuple(labels), (), (), (), pad_id=tokenizer.pad_id)
                self._columns, self._label_column = (files.text_column,), files.label_column
                self._encode = self._encode_text
            case _:
                check_has_labels(config)

    def read(self, file: str, split: str = "test") -> Sequence[Row]:
        """The rows of a file, each with the columns that the task needs, texts in them.

        Args:
            file: as in kind: files.
            split: the folder of a saved dataset that has several.

        Raises:
            TaskError: naming the row that cannot serve, before any is predicted.
        """
        path = expanded_path(file)
        if not path.exists():
            raise TaskError(f"{file}: no such file; give a file or a dataset folder of rows")
        read = read_rows(path, split)
        self._file, self._names = file, read.class_names.get(self._label_column)
        self.notes = [note for note in read.notes if note]
        rows = list(read.rows)
        for number, row in enumerate(rows, start=1):
            try:
                self._check(row)
            except TaskError as cause:
                raise TaskError(f"{file}, row {number}: {cause}") from None
        if not rows:
            raise TaskError(f"{file} holds no rows; it should hold one example per row")
        return rows

    def encoded(self, rows: Sequence[Row]) -> Iterator[NewRow]:
        """The rows of `read`, one after the other.

        Raises:
            TaskError: if the model cannot read a row.
        """
        for number, row in enumerate(rows, start=1):
            example = self._encode(row, f"{self._file}, row {number}")
            columns = {name: row[name] for name in self._columns if name in row}
            yield NewRow(number, columns, example, self._label(row))

    def cuts(self) -> list[str]:
        """The line about rows that were cut so far; none if none was."""
        return self._encoder.notes()

    def has_labels(self, rows: Sequence[Row]) -> bool:
        """Whether the rows have the column of the label."""
        return any(self._label_column in row for row in rows)

    def _check(self, row: Row) -> None:
        if isinstance(self._config, PromptsConfig):
            self._config.as_template().prompt(row)
            return
        (column,) = self._columns
        if column not in row:
            raise TaskError(
                f"no column `{column}`; there are {', '.join(map(str, row))}{near_name(column, row)}"
            )
        try:
            text_of(row[column])
        except TaskError as cause:
            raise TaskError(f"`{column}` {cause}") from None

    def _encode_text(self, row: Row, where: str) -> Example:
        example = Example(rows=(self._encoder.encode(row[self._columns[0]]),))
        self._encoder.check({where: [example]})
        return example

    def _label(self, row: Row) -> int | None:
        """The index of a row's label; None: it has none, or one that is not of the task."""
        value = row.get(self._label_column)
        try:
            if isinstance(self._config, PromptsConfig):
                return self._config.as_template().option_of(value, self._names)
            label = label_of(value, self._names)[1]
            known = [*self.task.labels]
            spelt = whole_numbers({label, *known})
            index = {spelt.get(name, name): place for place, name in enumerate(known)}
            return index.get(spelt.get(label, label))
        except TaskError:
            return None
