"""Rows of a file, each with the answer of a model that goes on with texts. No torch: the model may be elsewhere."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from hosl.errors import TaskError
from hosl.inference.text_model import TextModel
from hosl.tasks.rows import Row, expanded_path, read_rows
from hosl.tasks.sft.formats import Chat, Question, question


@dataclass(frozen=True, slots=True)
class AskedRow:
    """A row that is to be answered."""

    where: str
    """The file and the row's number, for errors."""
    columns: Row
    """The row as the file has it."""
    question: Question


@dataclass(frozen=True)
class AskedRows:
    """The rows of a file."""

    rows: Sequence[AskedRow]
    notes: Sequence[str]
    """What was guessed in reading, a line each."""


def asked_rows(file: str, split: str = "test") -> AskedRows:
    """The rows of a file as questions: of `messages`, `prompt` or `text`, the answer needs not be there.

    Args:
        file: as in kind: sft.
        split: the folder of a saved dataset that has several.

    Raises:
        TaskError: naming the row that cannot be asked, before any is answered.
    """
    path = expanded_path(file)
    if not path.exists():
        raise TaskError(f"{file}: no such file; give a file or a dataset folder of rows")
    read, asked = read_rows(path, split), list[AskedRow]()
    for number, row in enumerate(read.rows, start=1):
        where = f"{file}, row {number}"
        try:
            asked.append(AskedRow(where, row, question(row)))
        except TaskError as cause:
            raise TaskError(f"{where}: {cause}") from None
    if not asked:
        raise TaskError(f"{file} holds no rows; it should hold one example per row")
    return AskedRows(asked, [note for note in read.notes if note])


def check_room(speaker: TextModel, rows: Sequence[AskedRow], max_new_tokens: int) -> list[str]:
    """The line about answers that have less room than wanted; none if all have it.

    Raises:
        TaskError: naming the row that the model cannot read or the chat template refuses.
    """
    short = 0
    for row in rows:
        try:
            short += speaker.room(row.question.asked) < max_new_tokens
        except TaskError as cause:
            raise TaskError(f"{row.where}: {cause}") from None
    if not short:
        return []
    return [
        f"{short:,} of {len(rows):,} prompts leave less than {max_new_tokens:,} tokens of what the model reads for the "
        "answer: these answers may be cut there"
    ]


def write_answers(
    speaker: TextModel,
    rows: Sequence[AskedRow],
    out: TextIO,
    *,
    with_columns: bool,
    done: Callable[[int], None],
) -> dict[str, Any]:
    """Write one JSON object per row; returns what is said of all rows at the end.

    Args:
        speaker: the model.
        rows: the rows, of which the number keys the draws, as that of a prompt does.
        out: where to write.
        with_columns: whether the row stands beside its answer as the file has it.
        done: is called with the number of rows that are written.
    """
    tokens = unfinished = 0
    for number, row in enumerate(rows):
        asked, wanted = row.question.asked, row.question.wanted
        made = speaker.answer(asked, number)
        line: dict[str, Any] = {"row": number + 1}
        line |= {"messages": asked.messages} if isinstance(asked, Chat) else {"prompt": asked}
        line |= {"answer": made.text, "tokens": len(made.tokens), "end": made.end}
        if wanted is not None:
            line["wanted"] = wanted
        if with_columns:
            line["columns"] = row.columns
        out.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        tokens, unfinished = tokens + len(made.tokens), unfinished + (made.end == "length")
        done(number + 1)
    return {"rows": len(rows), "tokens": tokens, "ended by length": unfinished}
