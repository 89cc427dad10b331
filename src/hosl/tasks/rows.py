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
_SEPARATED, _LINES = (".csv", ".tsv"), (".jsonl", ".ndjson", ".json")
_READ = (*_SEPARATED, *_LINES)
_SPLIT_FOLDERS = {"dev": ("dev", "validation")}
"""The names that a saved dataset may give to a split."""


@dataclass(frozen=True)
class Rows:
    """The rows of a file, and what else the file says of them."""

    rows: Iterable[Row]
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column -> names of its classes, where the file has them (ClassLabel); the column holds their indices."""
    note: str = ""
    """What was guessed, in one line."""


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
    text = _text_of(path, packed=packed)
    if ending in _SEPARATED:
        return _separated_rows(path, text, "\t" if ending == ".tsv" else None)
    if ending == ".json" and text.lstrip().startswith("["):
        return Rows(_json_rows(path, "", text))
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


def _text_of(path: Path, *, packed: bool) -> str:
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if packed else data
    except (OSError, EOFError, zlib.error) as cause:
        raise TaskError(f"{path} is not gzip, or is cut short: {cause}; fetch it again") from cause
    try:
        if b"\0" in data:
            raise ValueError("it holds NUL bytes")
        return data.decode("utf-8-sig")
    except ValueError as cause:
        raise TaskError(f"{path} is not text in UTF-8: {cause}; save it as UTF-8 {path.suffix}") from cause


def _separated_rows(path: Path, text: str, separator: str | None) -> Rows:
    """Rows of separated values. Lines end where csv says, not where `str.splitlines` does: U+2028 belongs to a text."""
    csv.field_size_limit(sys.maxsize)  # a long document is one cell
    text = text.lstrip("\r\n")
    if stated := re.match(r"sep=(.)\r?\n", text):  # as Excel writes and reads it
        separator, text = stated[1], text[stated.end() :]
    found = separator or max(_SEPARATORS, key=lambda s: len(_cells(path, text, s)))
    header = _cells(path, text, found)
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise TaskError(f"{path} has the column `{twice[0]}` twice; rename one of them")
    note = f"{path}: `{found}` separates the columns" if found not in (",", separator) else ""
    return Rows(_separated(path, text, found, len(header)), note=note)


def _cells(path: Path, text: str, separator: str) -> list[str]:
    """The cells of the first row that has any."""
    try:
        return next(
            (row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if row), []
        )
    except csv.Error as cause:
        raise TaskError(f"{path} is not CSV: {cause}") from cause


def _separated(path: Path, text: str, separator: str, columns: int) -> Iterator[Row]:
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for number, row in enumerate(rows, start=1):
            if None in row:
                raise TaskError(
                    f"{path}, row {number} has {columns + len(row[None])} cells, the header has {columns}: put a text "  # type: ignore[index]
                    f"that contains `{separator}` in double quotes, and a double quote in it twice"
                )
            yield row
    except csv.Error as cause:
        raise TaskError(f"{path} is not CSV: {cause}") from cause


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

    try:
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
