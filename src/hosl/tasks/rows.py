"""Rows of a file, read by its ending: separated values, JSON, Parquet, or a saved Hugging Face dataset."""

import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosl.errors import TaskError

Row = dict[str, Any]
_SEPARATORS = ",;\t|"
_BREAK = re.compile(r"\r\n?|\n")
_SEPARATED, _LINES = (".csv", ".tsv"), (".jsonl", ".ndjson", ".json")
_READ = (*_SEPARATED, *_LINES)
_SPLIT_FOLDERS = {"dev": ("dev", "validation")}
"""The names that a saved dataset may give to a split."""
_ELSE = {
    b"\x1f\x8b": "gzip; add .gz to its name",
    b"PK\x03\x04": "a ZIP archive, as .xlsx is; save the sheet as CSV in UTF-8, or unpack the file",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file; save the sheet as CSV in UTF-8",
    b"BZh91AY&SY": "bzip2; unpack it", b"\xfd7zXZ": "xz; unpack it", b"\x28\xb5\x2f\xfd": "Zstandard; unpack it",
    b"PAR1\x15": "Parquet; name it .parquet", b"ARROW1\0": "Arrow; save it as Parquet", b"%PDF-": "PDF",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8", b"\xfe\xff": "text in UTF-16; save it as UTF-8",
    b"<!doctype html": "a web page; fetch the file itself", b"<html": "a web page; fetch the file itself",
}  # fmt: skip
"""The beginning of a file in lower case or as it is -> what the file is, and what to do."""


@dataclass(frozen=True)
class Rows:
    """The rows of a file, and what else the file says of them."""

    rows: Iterable[Row]
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column -> names of its classes, where the file has them (ClassLabel); the column holds their indices."""
    notes: Sequence[str] = ()
    """What was guessed, or reads otherwise than it may be meant, a line each."""


def read_rows(path: Path, split: str = "train") -> Rows:
    """The rows of a file, read by its ending (.gz: unpacked first), or of a dataset's folder.

    Raises:
        TaskError: if it is missing, empty, or not of the format of its ending; some of it as the rows are taken.
    """
    if path.is_dir():
        return _dataset_rows(path, split)
    if not path.exists():
        raise TaskError(
            f"{path}: no such file; task.train, task.dev and task.test name files or dataset folders"
        )
    packed = path.suffix.lower() == ".gz"
    ending = Path(path.stem).suffix.lower() if packed else path.suffix.lower()
    if ending not in _READ and (packed or ending != ".parquet"):
        allowed = f"{', '.join(_READ)} (each also as .gz), .parquet, or a folder"
        raise TaskError(f"{path}: cannot tell what `{path.suffix}` holds; allowed: {allowed}")
    if not path.stat().st_size:
        raise TaskError(f"{path} is empty; it should hold one example per row")
    if ending == ".parquet":
        return _parquet_rows(path)
    text = text_of_file(path, packed=packed)
    if ending in _SEPARATED:
        return _separated_rows(path, text, "\t" if ending == ".tsv" else None)
    if text.lstrip().startswith("["):
        if ending == ".json":
            return Rows(_json_rows(path, "", text))
        raise TaskError(f"{path} begins with a list, not with one object per line; name one JSON list .json")
    return Rows(_json_lines(path, text))


def expanded_path(name: str) -> Path:
    """A path with ~ and environment variables filled in.

    Raises:
        TaskError: if a variable in it is not set.
    """
    path = os.path.expanduser(os.path.expandvars(name))
    if "$" in path:
        raise TaskError(f"{name}: the environment variable in it is not set; set it, or give the path itself")
    return Path(path)


def text_of_file(path: Path, *, packed: bool = False) -> str:
    """The text of a file in UTF-8, without a byte order mark; `packed`: it is gzip.

    Raises:
        TaskError: if it is not.
    """
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if packed else data
    except (OSError, EOFError, zlib.error) as cause:
        raise TaskError(f"{path} is not gzip, or is cut short: {cause}; fetch it again") from cause
    _check_kind(path, data)
    try:
        if b"\0" in data:
            raise ValueError("it holds NUL bytes, as UTF-16 does")
        return data.decode("utf-8-sig")
    except ValueError as cause:
        raise TaskError(f"{path} is not text in UTF-8: {cause}; save it as UTF-8 {path.suffix}") from cause


def _check_kind(path: Path, data: bytes) -> None:
    """Refuse content that is of another kind than the ending says."""
    begin = data[:16]
    kind = next(
        (what for magic, what in _ELSE.items() if begin.startswith(magic) or begin.lower().startswith(magic)),
        "",
    )
    if kind:
        raise TaskError(f"{path} is not what its ending says but {kind}")


def _separated_rows(path: Path, text: str, separator: str | None) -> Rows:
    """Rows of separated values. Lines end where csv says, not where `str.splitlines` does: U+2028 belongs to a text.

    In .tsv a line is a row and a double quote a character, unless the header has one (files of R).
    """
    csv.field_size_limit(sys.maxsize)  # a long document is one cell
    text = text.lstrip("\r\n")
    if re.match(r'\s*(\{\s*"|\[\s*[\[{"])', text):
        raise TaskError(f"{path} is not what its ending says but JSON; name it .json or .jsonl")
    plain = separator is not None and '"' not in re.split("[\r\n]", text, maxsplit=1)[0]
    if stated := re.match(r"sep=(.)\r?\n", text):  # as Excel writes and reads it
        separator, text = stated[1], text[stated.end() :]
    found = separator or max(_SEPARATORS, key=lambda s: len(_cells(path, text, s)))
    header = _cells(path, text, found)
    _check_columns(path, header)
    note = f"{path}: `{found}` separates the columns" if found not in (",", separator) else ""
    rows, quotes = _separated(path, text, found, len(header), plain=plain)
    return Rows(rows, notes=(note, quotes))


def _check_columns(path: Path, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise TaskError(f"{path} has the column `{twice[0]}` twice; rename one of them")


def _cells(path: Path, text: str, separator: str) -> list[str]:
    """The cells of the first row that has any."""
    try:
        return next(
            (row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if row), []
        )
    except csv.Error as cause:
        raise TaskError(f"{path} is not CSV: {cause}") from cause


def _separated(path: Path, text: str, separator: str, columns: int, *, plain: bool) -> tuple[list[Row], str]:
    """The rows, and the line about quotes that may be meant otherwise: a stray one joins lines without an error."""
    quoting: Any = csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
    file = io.StringIO(text, newline="")
    rows, noted = list[Row](), list[tuple[int, int]]()
    try:
        for row in csv.DictReader(file, delimiter=separator, strict=True, quoting=quoting):
            number, cells = len(rows) + 1, [cell for cell in row.values() if isinstance(cell, str)]
            if None in row:
                raise TaskError(
                    f"{path}, row {number} has {columns + len(row[None])} cells, the header has {columns}: "  # type: ignore[index]
                    + (
                        "a line of .tsv is a row, a tab ends a cell; name a file with quotes around cells .csv"
                        if plain
                        else f"put a text that contains `{separator}` in double quotes, and a double quote in it twice"
                    )
                )
            rows.append(row)
            count = (
                sum(cell.startswith('"') for cell in cells) if plain else len(_BREAK.findall("".join(cells)))
            )
            if count:
                noted.append((count, number))
    except csv.Error as cause:
        raise TaskError(
            f"{path}, row {len(rows) + 1} is not CSV: {cause}; does a text begin with a double quote that does not end "
            "it? Put the whole text in double quotes, and a double quote in it twice"
        ) from cause
    if not noted:
        return rows, ""
    if plain:
        return rows, (
            f"{path}: cells that begin with a double quote: {sum(count for count, _ in noted)}, the first in row "
            f"{noted[0][1]}; in .tsv it is part of the text (name the file .csv if quotes enclose cells)"
        )
    breaks, longest = max(noted, key=lambda pair: pair[0])
    return rows, (
        f"{path}: rows over several lines: {len(noted)}, the longest is row {longest} with {breaks + 1}; a stray "
        "double quote joins rows like this"
    )


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield from _json_rows(path, f", line {number}", line)


def _json_rows(path: Path, where: str, text: str) -> Iterator[Row]:
    """The objects of a JSON text: one object on a line, or a list of them in a file."""
    try:
        content = json.loads(text, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as cause:
        raise TaskError(f"{path}{where} is not JSON: {cause}") from cause
    for number, row in enumerate([content] if where else content, start=1):
        if not isinstance(row, dict):
            place = where or f", element {number}"
            raise TaskError(f"{path}{place} is not a JSON object but {type(row).__name__}")
        yield row


def _no_key_twice(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has the key `{next(key for key in keys if keys.count(key) > 1)}` twice")
    return row


def _parquet_rows(path: Path) -> Rows:
    _pyarrow()
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as file:
        begin = file.read(16)
    if not begin.startswith(b"PAR1"):
        _check_kind(path, begin)
    try:
        _check_columns(path, pyarrow.parquet.read_schema(path).names)
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as cause:
        raise TaskError(f"{path} is not Parquet: {' '.join(str(cause).split())}") from cause
    return Rows(table.to_pylist(), _class_names(table.schema.metadata))


def _dataset_rows(folder: Path, split: str) -> Rows:
    """The rows of a dataset saved with `save_to_disk`: Arrow streams, in a folder per split if there are several."""
    names = _SPLIT_FOLDERS.get(split, (split,))
    source_folder = next((folder / name for name in names if (folder / name).is_dir()), folder)
    files = _shards(source_folder)
    if not files:
        raise TaskError(
            f"{folder} is no saved dataset: no .arrow file in it or in {split}/; use `save_to_disk`"
        )
    _pyarrow()
    import pyarrow

    rows, class_names = [], {}
    for file in files:
        try:
            with pyarrow.memory_map(str(file)) as source:
                table = pyarrow.ipc.open_stream(source).read_all()
                _check_columns(file, table.column_names)
                rows += table.to_pylist()
                class_names |= _class_names(table.schema.metadata)
        except (pyarrow.ArrowException, OSError) as cause:
            raise TaskError(f"{file} is not an Arrow stream: {' '.join(str(cause).split())}") from cause
    return Rows(rows, class_names or _names_of_features(_json_of(source_folder / "dataset_info.json")))


def _shards(folder: Path) -> list[Path]:
    """The files that state.json names: others beside them are caches, or were left by an earlier save.

    Raises:
        TaskError: if there is no state.json and more than one file, or the dataset is an indexed view of its files.
    """
    state = _json_of(folder / "state.json")
    if not state:
        files = sorted(folder.glob("*.arrow"))
        if len(files) > 1:
            raise TaskError(
                f"{folder} has {len(files)} .arrow files and no state.json that says which are the dataset's; save it "
                "again with `save_to_disk`"
            )
        return files
    if state.get("_indices_data_files"):
        raise TaskError(
            f"{folder} is a selection of the rows in its files; save it with a newer `datasets`, or after "
            "`flatten_indices()`"
        )
    try:
        return [folder / Path(file["filename"]).name for file in state["_data_files"]]
    except (KeyError, TypeError):
        raise TaskError(f"{folder / 'state.json'} names no files; save the dataset again") from None


def _json_of(file: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as cause:
        raise TaskError(f"{file} is damaged: {cause}; save the dataset again") from cause


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Column -> names of its classes, from what `datasets` writes into a schema."""
    try:
        content = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    except ValueError:
        return {}
    return _names_of_features(content.get("info") or {})


def _names_of_features(info: Mapping[str, Any]) -> dict[str, list[str]]:
    features = info.get("features") or {}
    return {
        column: [str(name) for name in feature["names"]]
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def _pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise TaskError("Parquet and dataset folders need pyarrow: `pip install 'hosl[data]'`") from None
