"""Labelled text from your own files: CSV, JSONL, Parquet, or the folder of a Hugging Face dataset."""

import csv
import difflib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hosl.errors import TaskError
from hosl.tasks.classification import ClassificationTask, LabelledText, carve, encode_classes, without
from hosl.tasks.configs import FilesConfig
from hosl.tasks.tokenizer import TextTokenizer

Row = dict[str, Any]


def files_task(config: FilesConfig, tokenizer: TextTokenizer, *, seed: int) -> ClassificationTask:
    """Read, check and encode the files. Labels are those of the training file, sorted; splits are disjoint by text.

    Raises:
        TaskError: if a file is missing, empty, binary, lacks a column or a text, or has a label that is not in train.
    """
    raw = {name: _labelled(config, name) for name in ("train", "dev", "test") if getattr(config, name)}
    labels = tuple(sorted({label for _, _, label in raw["train"]}))
    if len(labels) < 2:
        raise TaskError(f"{config.train}: a classification needs two labels or more, found only {labels}")
    parts = {name: _indexed(rows, labels, str(getattr(config, name))) for name, rows in raw.items()}
    train = parts["train"]
    test = parts.get("test")
    if test is None:
        test, train = carve(train, [0.15], seed=0)
    dev = parts.get("dev")
    if dev is None:
        dev, train = carve(without(train, test), [0.10], seed=0)
    dev = without(dev, test)
    train = without(train, [*dev, *test])
    if config.train_rows is not None:
        train = carve(train, [config.train_rows], seed)[0]
    for name, part in (("train", train), ("dev", dev), ("test", test)):
        if not part:
            raise TaskError(
                f"{config.train}: no row is left for {name} once the splits are disjoint; give more rows"
            )
    encoded = [encode_classes(part, tokenizer, config.max_tokens) for part in (train, dev, test)]
    return ClassificationTask(Path(config.train).stem, labels, *encoded, pad_id=tokenizer.pad_id)


def read_rows(path: Path, split: str = "train") -> Iterator[Row]:
    """The rows of a file, read by its ending, or of a dataset's folder.

    Raises:
        TaskError: if it is missing, empty, or not of the format of its ending.
    """
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows,
    }  # fmt: skip
    if path.is_dir():
        yield from _dataset_rows(path, split)
    elif not path.exists():
        raise TaskError(
            f"{path}: no such file; task.train, task.dev and task.test name files or dataset folders"
        )
    elif path.suffix not in readers:
        raise TaskError(
            f"{path}: cannot tell what `{path.suffix}` holds; allowed: {', '.join(readers)}, or a folder"
        )
    elif not path.stat().st_size:
        raise TaskError(f"{path} is empty; it should hold one example per row")
    else:
        yield from readers[path.suffix](path)


def expanded_path(name: str) -> Path:
    """A path with ~ and environment variables filled in.

    Raises:
        TaskError: if a variable in it is not set.
    """
    path = os.path.expanduser(os.path.expandvars(name))
    if "$" in path:
        raise TaskError(f"{name}: the environment variable in it is not set; set it, or give the path itself")
    return Path(path)


def _labelled(config: FilesConfig, split: str) -> list[tuple[int, str, str]]:
    """(row number, text, label) of every row of a split."""
    name = str(getattr(config, split))
    labelled = []
    for number, row in enumerate(read_rows(expanded_path(name), split), start=1):
        values = []
        for column in (config.text_column, config.label_column):
            if column not in row:
                near = difflib.get_close_matches(column, row.keys(), n=1)
                best = f"; did you mean `{near[0]}`?" if near else ""
                raise TaskError(f"{name}: no column `{column}`; there are {', '.join(map(str, row))}{best}")
            if row[column] is None or str(row[column]).strip() == "":
                raise TaskError(f"{name}, row {number}: `{column}` is empty; fill it or drop the row")
            values.append(str(row[column]))
        labelled.append((number, values[0], values[1]))
    if not labelled:
        raise TaskError(f"{name} holds no rows; it should hold one example per row")
    return labelled


def _indexed(rows: list[tuple[int, str, str]], labels: tuple[str, ...], name: str) -> list[LabelledText]:
    index_of = {label: index for index, label in enumerate(labels)}
    for number, _, label in rows:
        if label not in index_of:
            shown = ", ".join(labels[:20])
            raise TaskError(f"{name}, row {number}: label `{label}` never occurs in training; known: {shown}")
    return [(text, index_of[label]) for _, text, label in rows]


def _text_of(path: Path) -> str:
    data = path.read_bytes()
    try:
        if b"\0" in data:
            raise ValueError("it holds NUL bytes")
        return data.decode("utf-8-sig")
    except ValueError as cause:
        raise TaskError(f"{path} is not text in UTF-8: {cause}; save it as UTF-8 {path.suffix}") from cause


def _csv_rows(path: Path) -> Iterator[Row]:
    try:
        yield from csv.DictReader(_text_of(path).splitlines(keepends=True), strict=True)
    except csv.Error as cause:
        raise TaskError(f"{path} is not CSV: {cause}") from cause


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text_of(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as cause:
            raise TaskError(f"{path}, line {number} is not JSON: {cause}") from cause
        if not isinstance(row, dict):
            raise TaskError(f"{path}, line {number} is not a JSON object but {type(row).__name__}")
        yield row


def _parquet_rows(path: Path) -> Iterator[Row]:
    _pyarrow()
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as cause:
        raise TaskError(f"{path} is not Parquet: {' '.join(str(cause).split())}") from cause
    yield from table.to_pylist()


def _dataset_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of a dataset saved with `save_to_disk`: Arrow streams, in a folder per split if there are several."""
    source_folder = folder / split if (folder / split).is_dir() else folder
    files = sorted(source_folder.glob("*.arrow"))
    if not files:
        raise TaskError(
            f"{folder} is no saved dataset: no .arrow file in it or in {split}/; use `save_to_disk`"
        )
    _pyarrow()
    import pyarrow

    for file in files:
        try:
            with pyarrow.memory_map(str(file)) as source:
                yield from pyarrow.ipc.open_stream(source).read_all().to_pylist()
        except (pyarrow.ArrowException, OSError) as cause:
            raise TaskError(f"{file} is not an Arrow stream: {' '.join(str(cause).split())}") from cause


def _pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise TaskError("Parquet and dataset folders need pyarrow: `pip install 'hosl[data]'`") from None
