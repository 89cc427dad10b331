"""Rows in TRL's formats, by their columns: `text`; `prompt` and `completion`; `messages`. Checked, not encoded."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from hosl.errors import TaskError
from hosl.tasks.labels import text_of

ROLES = ("system", "developer", "user", "assistant", "tool")
FORMATS = {
    "`messages`": ("messages",),
    "`prompt` and `completion`": ("prompt", "completion"),
    "`text`": ("text",),
}
"""The formats in words -> their columns; of several that a row has, the first is read."""
_ELSEWHERE = {
    "conversations": "messages", "conversation": "messages", "chat": "messages", "dialog": "messages",
    "instruction": "prompt", "question": "prompt", "query": "prompt", "input": "prompt",
    "output": "completion", "response": "completion", "answer": "completion", "chosen": "completion",
    "content": "text", "document": "text",
}  # fmt: skip
"""A column of other tools' formats -> what it is called here."""

Message: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    """A text to go on with."""

    text: str


@dataclass(frozen=True)
class Completion:
    """A prompt, and the text that follows it directly."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Messages, of which the assistant's are learned."""

    messages: Sequence[Message]
    prompt: int | None = None
    """The number of messages that are the prompt, where the row tells prompt and completion apart."""
    tools: Any = None
    """What the template gets as tools."""


@dataclass(frozen=True)
class SftRow:
    """A checked row."""

    where: str
    """The file and the row's number, for errors."""
    key: str
    """All that is read of it, as text: equal for equal rows."""
    content: Text | Completion | Chat


@dataclass(frozen=True)
class Question:
    """What a row asks for: the text or chat that an answer follows, and the answer that the row itself has."""

    asked: str | Chat
    wanted: str | None
    """The completion or the last turn of the assistant; None: the row has none."""


@dataclass(frozen=True)
class SftRows:
    """The rows of a file, all of one format."""

    rows: list[SftRow]
    notes: list[str]
    """The format and the columns that are not read, and what was guessed in reading."""


def sft_rows(rows: Iterable[Mapping[str, Any]], name: str, notes: Sequence[str] = ()) -> SftRows:
    """The checked rows of a file.

    Args:
        rows: as the reader gives them.
        name: of the file, for errors.
        notes: what was guessed in reading.

    Raises:
        TaskError: if there is no row, or a row is of no known format, of another than the first, or cannot be learned.
    """
    checked, unread, first = [], dict[str, None](), ""
    for number, row in enumerate(rows, start=1):
        where = f"{name}, row {number}"
        form = _format(row, where)
        first = first or form
        if form != first:
            raise TaskError(
                f"{where} is {form}, the rows before it are {first}; write all rows in one format"
            )
        try:
            content = _content(row, form)
        except TaskError as cause:
            raise TaskError(f"{where}: {cause}") from None
        read = (*FORMATS[form], *(("tools",) if isinstance(content, Chat) else ()))
        key = json.dumps([row.get(c) for c in read], sort_keys=True, ensure_ascii=False, default=str)
        checked.append(SftRow(where, key, content))
        unread |= dict.fromkeys(str(column) for column in row if column not in read)
    if not checked:
        raise TaskError(f"{name} holds no rows; it should hold one example per row")
    others = f"; columns that are not read: {', '.join(unread)}" if unread else ""
    return SftRows(checked, [*filter(None, notes), f"{name}: rows of {first}{others}"])


def question(row: Mapping[str, Any]) -> Question:
    """What a row asks for: its `messages` up to the assistant's last turn, its `prompt`, or its `text` to go on with.

    Raises:
        TaskError: if there is none of these columns, or what it holds cannot be asked.
    """
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
        answered = len(messages) > 1 and messages[-1]["role"] == "assistant"
        asked = messages[:-1] if answered else messages
        return Question(Chat(asked, tools=_tools(row)), _written(messages[-1]) if answered else None)
    if "prompt" in row:
        prompt, completion = row["prompt"], row.get("completion")
        if isinstance(prompt, list):
            after = _messages(completion, "completion") if completion else []
            asked = Chat(_messages(prompt, "prompt"), tools=_tools(row))
            return Question(asked, _written(after[0]) if after else None)
        return Question(_text(row, "prompt"), completion if isinstance(completion, str) else None)
    if "text" in row:
        return Question(_text(row, "text"), None)
    raise TaskError(
        f"the columns are {', '.join(map(str, row)) or 'none'}; one of `messages`, `prompt` and `text` is wanted"
    )


def question_of(content: Text | Completion | Chat) -> Question | None:
    """What a checked row asks for, and its own answer; None: a text, which asks nothing."""
    if isinstance(content, Text):
        return None
    if isinstance(content, Completion):
        return Question(content.prompt, content.completion)
    answers = [i for i, message in enumerate(content.messages) if message["role"] == "assistant"]
    last = answers[-1] if content.prompt is None else content.prompt
    return Question(Chat(content.messages[:last], tools=content.tools), _written(content.messages[last]))


def _written(message: Message) -> str | None:
    """The text of a message; None: it has none, as a turn that only calls tools."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) and content else None


def _format(row: Mapping[str, Any], where: str) -> str:
    found = next((form for form, columns in FORMATS.items() if all(c in row for c in columns)), None)
    if found is not None:
        return found
    known = [column for columns in FORMATS.values() for column in columns]
    advice = []
    for column in map(str, row):
        near = difflib.get_close_matches(column.lower(), known, n=1, cutoff=0.75)
        meant = _ELSEWHERE.get(column.lower()) or (near[0] if near else None)
        if meant and meant not in row:
            advice.append(f"`{column}` to `{meant}`")
    renamed = f"; rename {' and '.join(dict.fromkeys(advice))}?" if advice else ""
    raise TaskError(
        f"{where}: the columns are {', '.join(map(str, row)) or 'none'}; known formats: {', or '.join(FORMATS)}"
        f"{renamed}"
    )


def _content(row: Mapping[str, Any], form: str) -> Text | Completion | Chat:
    if "text" in FORMATS[form]:
        return Text(_text(row, "text"))
    if "messages" in FORMATS[form]:
        messages = _messages(row["messages"], "messages")
        if not any(message["role"] == "assistant" for message in messages):
            raise TaskError(
                "`messages` has no turn of the assistant, so there is nothing to learn; drop the row"
            )
        return Chat(messages, tools=_tools(row))
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before, after = _messages(prompt, "prompt"), _messages(completion, "completion")
        strange = next((message["role"] for message in after if message["role"] != "assistant"), None)
        if strange:
            raise TaskError(
                f"`completion` has a turn of {strange}; it is the assistant's alone: write the whole chat as `messages`"
            )
        return Chat([*before, *after], prompt=len(before), tools=_tools(row))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise TaskError(
            "one of `prompt` and `completion` is a list of messages; write both as text, or both as lists"
        )
    if not isinstance(prompt, str):
        raise TaskError(f"`prompt` is {_kind(prompt)}; text is wanted")
    return Completion(prompt if not prompt.strip() else _text(row, "prompt"), _text(row, "completion"))


def _text(row: Mapping[str, Any], column: str) -> str:
    try:
        return text_of(row[column])
    except TaskError as cause:
        raise TaskError(f"`{column}` {cause}") from None


def _messages(value: object, column: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        hint = (
            "; a file of separated values cannot hold them, name a .jsonl" if isinstance(value, str) else ""
        )
        raise TaskError(f"`{column}` is {_kind(value)}; a list of {{role, content}} is wanted{hint}")
    for number, message in enumerate(value, start=1):
        where = f"message {number} of `{column}`"
        if not isinstance(message, dict) or "role" not in message:
            found = (
                f"has the keys {', '.join(map(str, message))}"
                if isinstance(message, dict)
                else f"is {_kind(message)}"
            )
            raise TaskError(f"{where} {found}; {{role, content}} is wanted")
        if message["role"] not in ROLES:
            raise TaskError(f"{where} has the role {message['role']!r}; known: {', '.join(ROLES)}")
        _check_content(message, where)
    return value


def _check_content(message: Message, where: str) -> None:
    """Refuse what is no text, and an answer without any."""
    content, calls = message.get("content"), message.get("tool_calls")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) or (text is None and calls) for text in texts):
        raise TaskError(f"the content of {where} is {_kind(content)}; text is wanted")
    written = "".join(text for text in texts if text)
    if message["role"] == "assistant" and not written.strip() and not calls:
        raise TaskError(f"{where} is an answer without text; fill it or drop the row")
    if written.strip():
        try:
            text_of(written)
        except TaskError as cause:
            raise TaskError(f"the content of {where} {cause}") from None


def _tools(row: Mapping[str, Any]) -> Any:
    """The tools of a row: a list, or its JSON."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as cause:
            raise TaskError(f"`tools` is not JSON: {cause}") from None
    if tools and not isinstance(tools, list):
        raise TaskError(f"`tools` is {_kind(tools)}; a list of functions is wanted, or its JSON")
    return tools or None


def _kind(value: object) -> str:
    if value is None or value == []:
        return "empty"
    kinds = {
        str: "text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), type(value).__name__)
