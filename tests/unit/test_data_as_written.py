"""Files as they are written elsewhere: stray quotes, numbers as labels, content of another kind than its ending."""

import csv
import gzip
import io
import json
import zipfile
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import tokenizers

from hosl.errors import TaskError
from hosl.tasks import FilesConfig, TextTokenizer, load_task
from hosl.tasks.label_order import in_model_order
from hosl.tasks.rows import read_rows


class Letters(TextTokenizer):
    """A token per character."""

    def __init__(self):
        super().__init__(tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?")), 0, None)

    def encode(self, text, max_tokens):
        return self.cut(tuple(map(ord, text)), max_tokens)


def read(path, **settings) -> Any:
    return load_task(FilesConfig(train=str(path), max_tokens=500, **settings), Letters(), seed=0)


def pairs(task):
    return sorted(
        ("".join(map(chr, example.rows[0])), task.labels[example.label])
        for part in (task.train, task.dev, task.test)
        for example in part
    )


def rows(count=40, classes=("ham", "spam")):
    return [(f"text {i}", classes[i % len(classes)]) for i in range(count)]


STRAY = {"an opening quote": '"I paid', "a size at the end": 'a pipe of 5"', "a title": '"Emma" is a book',
         "a whole text": '"I paid twice"', "one quote": '"'}  # fmt: skip


@pytest.mark.parametrize("stray", STRAY.values(), ids=STRAY)
def test_a_quote_in_a_tsv_is_a_character_and_merges_no_rows(tmp_path, stray):
    content = rows()
    content[4], content[9] = (f"{stray} 4", "ham"), (stray, "spam")
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in content))
    right = [*csv.reader(io.StringIO(path.read_text()), delimiter="\t", quoting=csv.QUOTE_NONE)][1:]
    task = read(path)
    assert pairs(task) == sorted(map(tuple, right)) == sorted(content)
    said = [
        note for note in task.notes if "cells that begin with a double quote: 2, the first in row 5" in note
    ]
    assert len(said) == stray.startswith('"')


def test_a_tsv_whose_header_is_in_quotes_has_quotes_around_its_cells(tmp_path):
    content = [(f'he said "{text}",\tand\nmore', label) for text, label in rows()]
    with (tmp_path / "rows.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL).writerows([("text", "label"), *content])
    assert pairs(read(tmp_path / "rows.tsv")) == sorted(content)


@pytest.mark.parametrize(("line", "said"), [("a\tb\tham", "has 3 cells, the header has 2: a line of .tsv is a row"),
                                            ("the text goes on", "`label` is empty")])  # fmt: skip
def test_a_line_of_a_tsv_with_other_cells_than_the_header_is_refused_by_its_number(tmp_path, line, said):
    lines = ["text\tlabel", *("\t".join(pair) for pair in rows())]
    lines.insert(8, line)
    (tmp_path / "rows.tsv").write_text("\n".join(lines))
    with pytest.raises(TaskError, match=f"row 8.*{said}"):
        read(tmp_path / "rows.tsv")


def test_rows_that_a_stray_quote_joins_in_a_csv_are_said_with_their_number(tmp_path):
    content = rows()
    content[4], content[9] = ('"I paid', "ham"), ('a pipe of 5"', "spam")
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in content))
    task = read(path)
    assert len(pairs(task)) == 35  # rows 5 to 10 are one, for csv and for everyone who reads CSV
    assert [note for note in task.notes if "several lines" in note] == [
        f"{path}: rows over several lines: 1, the longest is row 5 with 6; a stray double quote joins rows like this"
    ]


@pytest.mark.parametrize("places", [(4,), (4, 9), (39,)])
def test_a_quote_that_does_not_end_in_a_csv_is_refused_by_its_row(tmp_path, places):
    content = rows()
    for place in places:
        content[place] = ('"I paid', "ham")
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"{text},{label}\n" for text, label in content)
    )
    with pytest.raises(TaskError, match=rf"row {places[0] + 1} is not CSV: .* begin with a double quote"):
        read(tmp_path / "rows.csv")


def write_numbers(path, labels):
    content = [{"text": f"text {i}", "label": labels[i % len(labels)]} for i in range(40)]
    if path.suffix == ".csv":
        path.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in content))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.mark.parametrize("wanted", [("2.0", "1.0"), ("2", "1"), (2, 1), ("2.", "1.00")])
@pytest.mark.parametrize("labels", [("1.0", "2.0"), (1.0, 2.0), (1, 2), ("1", "2.0")])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_task_labels_names_a_whole_number_however_it_is_written(tmp_path, kind, labels, wanted):
    task = read(write_numbers(tmp_path / f"rows.{kind}", labels), labels=wanted)
    assert task.labels == ("2", "1")
    assert pairs(task) == sorted((f"text {i}", "12"[i % 2]) for i in range(40))


@pytest.mark.parametrize("indices", [True, False])
def test_class_names_of_a_dataset_that_are_numbers_name_its_labels(tmp_path, indices):
    labels = (0, 1, 2) if indices else ("5.0", "1.0", "3.0")
    table = pyarrow.table(
        {"text": [f"text {i}" for i in range(60)], "label": [labels[i % 3] for i in range(60)]}
    )
    feature = {"names": ["5.0", "1.0", "3.0"], "_type": "ClassLabel"}
    info = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(info), tmp_path / "rows.parquet")
    task = read(tmp_path / "rows.parquet")
    assert task.labels == ("5", "1", "3")
    assert pairs(task) == sorted((f"text {i}", "513"[i % 3]) for i in range(60))
    assert (
        "labels that are one whole number are one class: `1.0` is `1`, `3.0` is `3`, `5.0` is `5`"
        in task.notes
    )


@pytest.mark.parametrize("labels", [("3", "3.0", "x"), (3, 3.0, 4), ("3", "3.00", "4")])
def test_two_spellings_of_a_number_that_become_one_class_are_said(tmp_path, labels):
    kind = "csv" if isinstance(labels[0], str) else "jsonl"
    task = read(write_numbers(tmp_path / f"rows.{kind}", labels))
    assert task.labels == ("3", str(labels[2]))
    assert f"labels that are one whole number are one class: `{labels[1]}` is `3`" in task.notes
    assert not [n for n in read(write_numbers(tmp_path / "a.csv", (3, 4))).notes if "whole number" in n]


def test_one_class_listed_in_two_spellings_is_refused(tmp_path):
    with pytest.raises(TaskError, match=r"task\.labels has `1` twice; name every class once"):
        read(write_numbers(tmp_path / "rows.csv", ("1", "2")), labels=("1", "2", "1.0"))


def test_a_head_whose_classes_are_numbers_keeps_its_order_however_they_are_written(tmp_path):
    task = in_model_order(read(write_numbers(tmp_path / "rows.csv", ("1", "2", "3"))), ["3.0", "1.0", "2.0"])
    assert task.labels == ("3", "1", "2")
    assert pairs(task) == sorted((f"text {i}", "123"[i % 3]) for i in range(40))


CSV = b"text,label\n" + b"".join(b"text %d,%s\n" % (i, (b"ham", b"spam")[i % 2]) for i in range(40))


def _zip():
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("xl/workbook.xml", "<x/>")
    return file.getvalue()


def _arrow(write, **options):
    write(pyarrow.table({"text": ["a"], "label": ["b"]}), file := io.BytesIO(), **options)
    return file.getvalue()


OTHER = {
    "a gzip": ("rows.csv", gzip.compress(CSV), "but gzip; add .gz to its name"),
    "a gzip of a gzip": ("rows.csv.gz", gzip.compress(gzip.compress(CSV)), "but gzip"),
    "a sheet": ("rows.csv", _zip(), "a ZIP archive, as .xlsx is; save the sheet as CSV in UTF-8"),
    "a sheet as Parquet": ("rows.parquet", _zip(), "a ZIP archive, as .xlsx is"),
    "Parquet": ("rows.tsv", _arrow(pyarrow.parquet.write_table), "but Parquet; name it .parquet"),
    "Arrow": ("rows.parquet", _arrow(pyarrow.feather.write_feather), "but Arrow; save it as Parquet"),
    "UTF-16 of Excel": ("rows.csv", CSV.decode().encode("utf-16"), "but text in UTF-16; save it as UTF-8"),
    "UTF-16, big end first": ("a.jsonl", b"\xfe\xff\x00{\x00}", "but text in UTF-16; save it as UTF-8"),
    "UTF-16 without its mark": (
        "rows.csv",
        CSV.decode().encode("utf-16-le"),
        "NUL bytes, as UTF-16 does; save it",
    ),
    "a web page": ("rows.csv", b"<!DOCTYPE html><html>not found</html>", "but a web page; fetch the file"),
    "JSON as CSV": ("rows.csv", b'{"text": "a", "label": "b"}\n', "but JSON; name it .json or .jsonl"),
    "a JSON list": (
        "rows.jsonl",
        b'[{"text": "a", "label": "b"}]',
        "begins with a list.*name one JSON list .json",
    ),
    "a JSON list over lines": (
        "rows.ndjson",
        b'[\n {"text": "a"}\n]',
        "begins with a list.*name one JSON list",
    ),
}


@pytest.mark.parametrize(("name", "content", "said"), OTHER.values(), ids=OTHER)
def test_a_file_of_another_kind_than_its_ending_says_is_named_for_what_it_is(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=said):
        read(tmp_path / name)


@pytest.mark.parametrize("columns", [("text", "label", "text"), ("text", "label", "id", "id")])
@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv", "tsv"])
def test_a_column_that_a_file_has_twice_is_named(tmp_path, kind, columns):
    table = pyarrow.table([["a"]] * len(columns), names=columns)
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "arrow":
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        path = tmp_path
    else:
        path.write_text((",", "\t")[kind == "tsv"].join(columns) + "\n")
    with pytest.raises(TaskError, match=f"has the column `{columns[-1]}` twice; rename one of them"):
        read_rows(path)
