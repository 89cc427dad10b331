"""Labels and texts as a file holds them, by type; the classes of a task, their order, and what is said of them."""

import difflib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from hosl.errors import TaskError

_WHOLE = re.compile(r"(-?[0-9]+)(?:\.0*)?")
_KINDS = {
    bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object", bytes: "bytes",
}  # fmt: skip
_SHOWN = 20
"""The classes that a line names."""
_FEW = 4
"""The number of classes up to which labels are never taken for free text."""
_ROWS_PER_LABEL = 3
"""The rows per label from which on labels are taken for classes."""


def class_order(
    found: Iterable[str], wanted: Sequence[str] | None = None, *, said_by: str = "task.labels"
) -> tuple[str, ...]:
    """The classes of a task in their order: those of `wanted`; without it whole numbers by value, other text sorted.

    Args:
        found: the labels in the data.
        wanted: the list that settles classes and order; it may have classes without a row.
        said_by: the name of that list in errors.

    Raises:
        TaskError: if the data has a label that `wanted` lacks, or `wanted` has one twice.
    """
    if wanted is None:
        return _sorted(set(found))
    order = tuple(wanted)
    strange = _sorted(set(found) - set(order))
    if strange:
        raise TaskError(f"{said_by} lacks {_listed(strange)}, which the data has; it lists {_listed(order)}")
    twice = [label for label, count in Counter(order).items() if count > 1]
    if twice:
        raise TaskError(f"{said_by} has `{twice[0]}` twice; name every class once")
    return order


def label_of(value: object, names: Sequence[str] | None = None) -> tuple[str, str]:
    """The kind of a label's value, and the label: text without spaces around it, or a whole number as it is written.

    Args:
        value: the value in the file.
        names: the classes' names, where the file holds their indices.

    Raises:
        TaskError: if it is no class, with the reason.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise TaskError("is empty; fill it or drop the row")
    if names is not None and type(value) is int:
        if not 0 <= value < len(names):
            raise TaskError(f"is {value}, but its classes are 0..{len(names) - 1}; fill it or drop the row")
        value = names[value]
    if isinstance(value, float):
        if not value.is_integer():
            raise TaskError(f"is {value}; a class is text or a whole number")
        return _KINDS[float], f"{int(value)}.0"  # as it is written, for `whole_numbers`
    if isinstance(value, bool | int):
        return _KINDS[type(value)], str(value)
    return "text", unicodedata.normalize("NFC", text_of(value)).strip()


def near_name(word: str, names: Iterable[object]) -> str:
    """The question whether the nearest of `names` was meant; empty if none is near."""
    near = difflib.get_close_matches(word, [*map(str, names)], n=1)
    return f"; did you mean `{near[0]}`?" if near else ""


def text_of(value: object) -> str:
    """A text as the file has it.

    Raises:
        TaskError: if it is empty, or no text, with the reason.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise TaskError("is empty; fill it or drop the row")
    if not isinstance(value, str):
        raise TaskError(f"is {_KINDS.get(type(value), type(value).__name__)}; text is wanted, one per row")
    if not value.strip():
        raise TaskError("is empty; fill it or drop the row")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise TaskError("has half a character (a lone surrogate); write it anew as UTF-8") from None
    return value


def whole_numbers(labels: Collection[str]) -> dict[str, str]:
    """Label -> the whole number that it is: 1.0 is 1 where all labels are whole numbers, or where there is a 1 as well.

    Raises:
        TaskError: if the labels are numbers and truth values.
    """
    matches = {label: match[1] for label in labels if (match := _WHOLE.fullmatch(label))}
    others = set(labels) - set(matches)
    if matches and others and all(label.casefold() in ("true", "false") for label in others):
        raise TaskError(
            f"labels are numbers and truth values: {_listed(_sorted(labels))}; write all as one kind"
        )
    return {label: whole for label, whole in matches.items() if not others or whole in matches}


def renamed_labels(renamed: Mapping[str, str]) -> str:
    """The line about whole numbers that are written otherwise, 1.0 for 1; empty if there are none."""
    pairs = [
        f"`{_short(label)}` is `{_short(whole)}`"
        for label, whole in sorted(renamed.items())
        if label != whole
    ]
    return f"labels that are one whole number are one class: {', '.join(pairs[:_SHOWN])}" if pairs else ""


def check_classes(pairs: Collection[tuple[str, str]], name: str) -> None:
    """Refuse labels that look like free text: a new one in every three rows or fewer.

    Args:
        pairs: the texts of training and their labels.
        name: of the file.

    Raises:
        TaskError: if they look so, or if there is only one class.
    """
    unique, labels = len(set(pairs)), {label for _, label in pairs}
    if len(labels) < 2:
        raise TaskError(f"{name}: a classification needs two labels or more, found only {_listed(labels)}")
    if len(labels) > _FEW and _ROWS_PER_LABEL * len(labels) >= unique:
        raise TaskError(
            f"{name}: labels look like free text: {len(labels):,} in {unique:,} rows, such as "
            f"{_listed(_sorted(labels)[:2])}; is task.label_column right? If they are classes, list them in task.labels"
        )


def near_labels(labels: Iterable[str]) -> str:
    """The line about two classes that differ only in case or in spaces; empty if there are none."""
    first: dict[str, str] = {}
    for label in labels:
        other = first.setdefault(" ".join(label.casefold().split()), label)
        if other != label:
            return f"labels `{other}` and `{label}` are two classes, though only case or spaces differ"
    return ""


def class_counts(labels: Sequence[str], parts: Mapping[str, Sequence[int]]) -> list[str]:
    """The lines about the classes of a task: their number, names and rows in each part, and what a part lacks.

    Args:
        labels: the classes.
        parts: the name of a part -> the class of each of its rows.
    """
    counts = {part: Counter(of_rows) for part, of_rows in parts.items()}
    rows = [
        f"{_short(label)} {'/'.join(str(of_part[index]) for of_part in counts.values())}"
        for index, label in enumerate(labels)
    ]
    more = f", and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    lines = [f"{len(labels)} classes, rows in {'/'.join(parts)}: {', '.join(rows[:_SHOWN])}{more}"]
    for part, of_part in counts.items():
        absent = [label for index, label in enumerate(labels) if not of_part[index]]
        if absent:
            lines.append(f"no row in {part} has the class {_listed(absent)}; its scores say nothing of that")
    return lines


def _sorted(labels: Collection[str]) -> tuple[str, ...]:
    numeric = all(re.fullmatch("-?[0-9]+", label) for label in labels)
    return tuple(sorted(labels, key=lambda label: (int(label) if numeric else 0, label)))


def _listed(labels: Collection[str]) -> str:
    more = f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
    return ", ".join(f"`{_short(label)}`" for label in [*labels][:_SHOWN]) + more


def _short(label: str) -> str:
    return label if len(label) <= 40 else f"{label[:39]}…"
