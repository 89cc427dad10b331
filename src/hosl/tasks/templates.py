"""Prompt templates: a text with columns of a row in it, and the options that may follow; the paper's six among them."""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hosl.errors import ConfigError, TaskError
from hosl.tasks.labels import label_of, near_name, text_of

_WHOLE = re.compile(r"(-?[0-9]+)\.0*")


@cache
def template_parts(text: str) -> tuple[tuple[str, str], ...]:
    """The parts of a template: a literal text, and the column whose text follows it; empty at the end.

    Raises:
        ConfigError: if it names anything but columns, or none.
    """
    advice = "write a column as {text}, a brace of the text itself twice: {{ or }}"
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as cause:
        raise ConfigError(f"task.template {text!r}: {cause}; {advice}") from None
    parts = []
    for literal, column, spec, conversion in parsed:
        asked = (
            None
            if column is None
            else f"{column}{f'!{conversion}' * bool(conversion)}{f':{spec}' * bool(spec)}"
        )
        if column is not None and (
            asked != column or not column or column.isdigit() or re.search(r"[.\[\]{}]", column)
        ):
            raise ConfigError(
                f"task.template names {{{asked}}}: the name of a column is allowed there and nothing else, no number, "
                f"attribute, index or format; {advice}"
            )
        parts.append((literal, column or ""))
    if not any(column for _, column in parts):
        raise ConfigError(f"task.template {text!r} names no column, so all rows would be alike; {advice}")
    return tuple(parts)


@dataclass(frozen=True, slots=True)
class Template:
    """The prompt of a row, and the options of which one follows it directly."""

    text: str
    """The prompt, columns in braces."""
    options: Mapping[str, str]
    """Label -> continuation, in the order of the labels."""
    changes: Mapping[str, Callable[[str], str]] = field(default_factory=dict)
    """Column -> what is done to its text."""
    within: str = ""
    """A column of objects whose fields stand for columns too, where a row has it."""
    built_in: bool = False
    """Whether a label may also be an option's number, and options are reported by their own words."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the options, as results show them."""
        return (
            tuple(option.strip() for option in self.options.values())
            if self.built_in
            else tuple(self.options)
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the prompt is made of, each once."""
        return tuple(dict.fromkeys(column for _, column in template_parts(self.text) if column))

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row.

        Raises:
            TaskError: if the row lacks a column, or has no text there, with the reason.
        """
        inner = row.get(self.within)
        row = {**row, **inner} if self.within and isinstance(inner, dict) else row
        return "".join(
            literal + (self._text(row, column) if column else "")
            for literal, column in template_parts(self.text)
        )

    def option_of(self, value: object, names: Sequence[str] | None = None) -> int:
        """The index of the option that a label names.

        Args:
            value: the label, as the file has it.
            names: the classes' names, where the file holds their indices.

        Raises:
            TaskError: if it names none, with the reason.
        """
        label = label_of(value, None if self.built_in else names)[1]
        whole = _WHOLE.fullmatch(label)
        keys, spelt = (
            list(self.options),
            [label, *([whole[1]] if whole else []), *([str(value)] if names else [])],
        )
        found = next((keys.index(name) for name in spelt if name in keys), None)
        if found is None and self.built_in and label in map(str, range(len(keys))):
            found = int(label)
        if found is None:
            raise TaskError(f"label `{label}` is none of {', '.join(f'`{key}`' for key in keys)}")
        return found

    def _text(self, row: Mapping[str, Any], column: str) -> str:
        if column not in row:
            raise TaskError(
                f"no column `{column}`; there are {', '.join(map(str, row))}{near_name(column, row)}"
            )
        try:
            return self.changes.get(column, str)(text_of(row[column]))
        except TaskError as cause:
            raise TaskError(f"`{column}` {cause}") from None


def _as_question(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('?')}"


TEMPLATES: dict[str, Template] = {
    "SST-2": Template(
        "{sentence} It was", {"0": " terrible", "1": " great"}, {"sentence": str.strip}, built_in=True
    ),
    "CB": Template(
        'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"},
        built_in=True,
    ),
    "RTE": Template(
        '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        {"entailment": "Yes", "not_entailment": "No"},
        built_in=True,
    ),
    "WiC": Template(
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
        {"False": "No", "True": "Yes"},
        built_in=True,
    ),
    "WSC": Template(
        '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n',
        {"False": "No", "True": "Yes"},
        {"span2_text": str.lower},
        within="target",
        built_in=True,
    ),
    "BoolQ": Template(
        "{passage} {question}?\n", {"False": "No", "True": "Yes"}, {"question": _as_question}, built_in=True
    ),
}
"""The paper's tasks, by name; templates follow MeZO's (arXiv 2305.17333)."""
