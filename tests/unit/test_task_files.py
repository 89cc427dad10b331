"""Own files as people have them: what is read, refused and said; right values by hand and by pyarrow."""

import csv
import gzip
import json
import random
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from hosl.config import parse_config
from hosl.errors import ConfigError, TaskError
from hosl.system.model_limits import ModelLimits, limits_of
from hosl.tasks import FilesConfig, PromptsConfig, TextTokenizer, load_task


class Letters(TextTokenizer):
    """A token per character, so that a row of tokens is its text."""

    def __init__(self, limits=None):
        super().__init__(
            tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?")), 0, limits
        )

    def encode(self, text, max_tokens):
        return self.cut(tuple(map(ord, text)), max_tokens)


def texts(part):
    return ["".join(map(chr, example.rows[0])) for example in part]


def pairs(task):
    """Every (text, class name) of a task, whatever the part."""
    return {
        (text, task.labels[example.label])
        for part in (task.train, task.dev, task.test)
        for text, example in zip(texts(part), part, strict=True)
    }


def read(path, **settings):
    return load_task(FilesConfig(train=str(path), **{"max_tokens": 500} | settings), Letters(), seed=0)


def rows(count=40, classes=("ham", "spam")):
    return [{"text": f"text {i}", "label": classes[i % len(classes)]} for i in range(count)]


def write_lines(path, content):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    return path


def write_csv(path, content, separator=",", opened=open):
    with opened(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"], delimiter=separator)
        writer.writeheader()
        writer.writerows(content)
    return path


def expected(content):
    return {(row["text"], str(row["label"])) for row in content}


@pytest.mark.parametrize(
    "inside", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\x1d", "\x1e", "a\r\nb", "\n"]
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_characters_that_python_takes_for_line_ends_stay_in_their_text(tmp_path, kind, inside):
    content = [{**row, "text": f"{row['text']}{inside}goes on"} for row in rows()]
    path = tmp_path / f"rows.{kind}"
    task = read(write_csv(path, content) if kind == "csv" else write_lines(path, content))
    assert pairs(task) == expected(content)


def test_a_file_of_the_old_mac_is_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text,label\r" + b"".join(b"text %d,%s\r" % (i, b"ab"[i % 2 :][:1]) for i in range(40)))
    assert pairs(read(path)) == {(f"text {i}", "ab"[i % 2]) for i in range(40)}


@pytest.mark.parametrize("before", ["\n", "\r\n\n", "\ufeff", "sep=,\r\n"])
def test_what_may_stand_before_the_header_is_no_header(tmp_path, before):
    path = write_csv(tmp_path / "rows.csv", rows())
    path.write_text(before + path.read_text(), encoding="utf-8")
    assert pairs(read(path)) == expected(rows())


def test_a_row_with_more_cells_than_the_header_is_refused_by_its_number(tmp_path):
    path = write_csv(tmp_path / "rows.csv", rows())
    path.write_text(path.read_text() + "I paid, twice,spam\n")
    with pytest.raises(TaskError, match="row 41 has 3 cells, the header has 2: put a text that contains `,`"):
        read(path)


def test_a_cell_may_be_longer_than_csvs_own_limit(tmp_path):
    content = [*rows(), {"text": "x" * 200_000, "label": "ham"}]
    task = read(write_csv(tmp_path / "rows.csv", content), max_tokens="auto")
    assert pairs(task) == expected(content)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_spaces_around_a_label_make_no_second_class_and_are_spoken_of(tmp_path, kind):
    content = [
        {**row, "label": row["label"] + (" ", "\u00a0", "", "\t")[i % 4]} for i, row in enumerate(rows(60))
    ]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    else:
        write_csv(path, content) if kind == "csv" else write_lines(path, content)
    task = read(path)
    assert task.labels == ("ham", "spam")
    assert any("spaces around 45 labels are dropped" in note for note in task.notes)


def test_one_letter_written_in_two_ways_of_unicode_is_one_class(tmp_path):
    content = [{"text": f"text {i}", "label": ("caf\u00e9", "cafe\u0301", "bar")[i % 3]} for i in range(60)]
    assert read(write_lines(tmp_path / "rows.jsonl", content)).labels == ("bar", "caf\u00e9")


def test_labels_that_differ_in_case_are_two_classes_and_spoken_of(tmp_path):
    task = read(write_lines(tmp_path / "rows.jsonl", rows(60, ("Billing", "billing", "other"))))
    assert task.labels == ("Billing", "billing", "other")
    assert any("`Billing` and `billing` are two classes" in note for note in task.notes)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "row 41: `label` is empty"), (None, "row 41: `label` is empty"),
        ("  ", "row 41: `label` is empty"), ("nan", "row 41: `label` is nan, a missing value"),
        (0.5, "row 41: `label` is 0.5; a class is text or a whole number"),
        (float("inf"), "row 41: `label` is inf"), (["a", "b"], "row 41: `label` is a list"),
        ({"name": "a"}, "row 41: `label` is an object"), ("\ud800", "row 41: `label` has half a character"),
    ],
)  # fmt: skip
def test_a_value_that_is_no_class_is_refused_by_its_row(tmp_path, value, said):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows(), {"text": "more", "label": value}]))
    with pytest.raises(TaskError, match=said):
        read(path)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([{"role": "user", "content": "hello"}], "`text` is a list; text is wanted"),
        ({"content": "hello"}, "`text` is an object; text is wanted"), (5, "`text` is a number; text is wanted"),
        (True, "`text` is a truth value; text is wanted"), (float("nan"), "`text` is empty"),
        (None, "`text` is empty"), ("\ud83d", "`text` has half a character"),
    ],
)  # fmt: skip
def test_a_text_that_is_no_text_is_refused_by_its_row(tmp_path, value, said):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows(), {"text": value, "label": "ham"}]))
    with pytest.raises(TaskError, match=f"row 41: {said}"):
        read(path)


@pytest.mark.parametrize("column", ["text", "label"])
def test_bytes_in_a_parquet_file_are_no_text(tmp_path, column):
    content = [{**row, column: row[column].encode()} for row in rows()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / "rows.parquet")
    with pytest.raises(TaskError, match=f"row 1: `{column}` is bytes; text is wanted"):
        read(tmp_path / "rows.parquet")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_whole_number_is_one_class_however_it_is_written(tmp_path, kind):
    content = [{"text": f"text {i}", "label": i % 2 if i % 4 < 2 else float(i % 2)} for i in range(40)]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        content = [{**row, "label": float(row["label"])} for row in content]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    else:
        write_csv(path, content) if kind == "csv" else write_lines(path, content)
    task = read(path)
    assert task.labels == ("0", "1")
    assert pairs(task) == {(f"text {i}", str(i % 2)) for i in range(40)}


def test_one_number_written_in_two_ways_is_one_class_beside_words_too(tmp_path):
    task = read(write_csv(tmp_path / "rows.csv", rows(60, ("1", "1.0", "unknown", "1.1"))))
    assert task.labels == ("1", "1.1", "unknown")
    assert Counter(label for _, label in pairs(task)) == {"1": 30, "1.1": 15, "unknown": 15}


@pytest.mark.parametrize("truth", ["true", "FALSE"])
def test_numbers_and_truth_values_in_one_column_of_csv_are_refused(tmp_path, truth):
    with pytest.raises(TaskError, match=f"labels are numbers and truth values: `0`, `1`, `{truth}`"):
        read(write_csv(tmp_path / "rows.csv", rows(60, ("0", "1", truth))))


@pytest.mark.parametrize("other", [True, "1", "yes"])
def test_labels_of_two_kinds_in_one_column_are_refused(tmp_path, other):
    content = [*rows(40, (0, 1)), {"text": "more", "label": other}]
    with pytest.raises(
        TaskError, match=r"`label` is a number in row 1, .* in row 41; write all labels as one"
    ):
        read(write_lines(tmp_path / "rows.jsonl", content))


@pytest.mark.parametrize("content", ["chat", "numbers"])
def test_free_text_in_the_label_column_is_asked_about_and_may_be_meant(tmp_path, content):
    labels = [f"my secret {i}" if content == "chat" else f"0.{i:03}" for i in range(200)]
    path = write_csv(tmp_path / "rows.csv", [{"text": f"text {i}", "label": labels[i]} for i in range(200)])
    with pytest.raises(TaskError, match="labels look like free text: 200 in 200 rows"):
        read(path)
    assert read(path, labels=tuple(labels)).labels == tuple(labels)


def test_many_classes_with_rows_enough_are_no_free_text(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", rows(400, tuple(f"class {i:02}" for i in range(100))))
    assert len(read(path).labels) == 100


SAME = {
    ".tsv": lambda path, content: write_csv(path, content, "\t"),
    ".csv": lambda path, content: write_csv(path, content, ";"),
    ".CSV": lambda path, content: write_csv(path, content, "|"),
    ".txt.csv": lambda path, content: write_csv(path, content, "\t"),
    ".csv.gz": lambda path, content: write_csv(path, content, opened=gzip.open),
    ".ndjson": write_lines,
    ".json": lambda path, content: path.write_text(json.dumps(content, indent=1)),
    ".lines.json": write_lines,
    ".jsonl.gz": lambda path, content: path.write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in content).encode())
    ),
}


@pytest.mark.parametrize("ending", SAME)
def test_every_ending_and_separator_gives_the_same_rows(tmp_path, ending):
    content = [{**row, "text": f"{row['text']}, and; more"} for row in rows()]
    SAME[ending](tmp_path / f"rows{ending}", content)
    task = read(tmp_path / f"rows{ending}")
    assert pairs(task) == expected(content)
    assert any("separates the columns" in note for note in task.notes) == (
        ending in (".csv", ".CSV", ".txt.csv")
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv.gz", gzip.compress(b"text,label\na,b\n" * 50, mtime=0)[:-12], "is not gzip, or is cut short"),
        ("a.csv.gz", b"text,label\na,b\n", "is not gzip, or is cut short"),
        ("a.json", b'{"text": {"0": "a"},\n "label": {"0": "b"}}', "line 1 is not JSON"),
        ("a.json", b"[1, 2]", "element 1 is not a JSON object but int"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.jsonl", b'{"text": "a", "text": "b", "label": "c"}\n', "line 1 is not JSON: it has the key `text` twice"),
        ("a.csv", b"text,label,text\na,b,c\n", "has the column `text` twice"),
        ("a.xlsx", b"PK", "cannot tell what `.xlsx` holds; allowed: .csv, .tsv"),
        ("a.parquet.gz", b"PAR1", "cannot tell what `.gz` holds"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_its_ending_says_is_refused_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=said):
        read(tmp_path / name)


def features(names):
    return {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": names, "_type": "ClassLabel"}}


def write_arrow(path, content, names=None):
    table = pyarrow.Table.from_pylist(content)
    if names:
        info = {"info": {"features": features(names)}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
        return
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def write_dataset(folder, shards):
    """A folder as `datasets.Dataset.save_to_disk` writes it."""
    folder.mkdir(parents=True)
    files = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        write_arrow(folder / file, shard)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file} for file in files]}))
    return folder


def test_only_the_shards_of_a_saved_dataset_are_read_not_caches_or_an_earlier_save(tmp_path):
    content, stale = rows(60), [{"text": "stale", "label": "old"}]
    folder = write_dataset(tmp_path / "saved", [content[:40], content[40:]])
    write_arrow(folder / "cache-0123456789abcdef.arrow", stale)
    write_arrow(folder / "data-00002-of-00003.arrow", stale)
    write_arrow(folder / "tmpabc.arrow", stale)
    assert pairs(read(folder)) == expected(content)
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(TaskError, match=r"data-00001-of-00002\.arrow is not an Arrow stream"):
        read(folder)
    for damage in (b"{", b"[]", b'{"_data_files": ["a"]}', b'{"_split": "train"}'):
        (folder / "state.json").write_bytes(damage)
        with pytest.raises(
            TaskError, match=r"state\.json (is damaged|names no files).*save the dataset again"
        ):
            read(folder)
    (folder / "state.json").unlink()
    with pytest.raises(TaskError, match=r"4 .arrow files and no state.json"):
        read(folder)


def test_the_validation_split_of_a_saved_dataset_serves_as_dev(tmp_path):
    content = rows(60)
    write_dataset(tmp_path / "saved" / "train", [content[:40]])
    write_dataset(tmp_path / "saved" / "validation", [content[40:50]])
    write_dataset(tmp_path / "saved" / "test", [content[50:]])
    task = read(tmp_path / "saved", dev=str(tmp_path / "saved"), test=str(tmp_path / "saved"))
    assert [texts(part) for part in (task.train, task.dev, task.test)] == [
        [row["text"] for row in part] for part in (content[:40], content[40:50], content[50:])
    ]


@pytest.mark.parametrize("place", ["parquet", "schema", "dataset_info"])
def test_class_names_of_a_dataset_are_its_labels_in_its_order(tmp_path, place):
    names = ["world", "sports", "business", "never used"]
    content = rows(60, (0, 1, 2))
    if place == "parquet":
        path = tmp_path / "rows.parquet"
        write_arrow(path, content, names)
    else:
        path = write_dataset(tmp_path / "saved", [content])
        if place == "schema":
            write_arrow(path / "data-00000-of-00001.arrow", content, names)
        else:
            (path / "dataset_info.json").write_text(json.dumps({"features": features(names)}))
    task = read(path)
    assert task.labels == tuple(names)
    assert pairs(task) == {(row["text"], names[row["label"]]) for row in content}
    assert sum("`never used`" in note for note in task.notes) == 3


def test_a_class_without_a_name_is_refused(tmp_path):
    write_arrow(tmp_path / "rows.parquet", [*rows(40, (0, 1)), {"text": "more", "label": -1}], ["no", "yes"])
    with pytest.raises(TaskError, match=r"row 41: `label` is -1, but its classes are 0\.\.1"):
        read(tmp_path / "rows.parquet")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_numbers_as_labels_are_in_the_order_of_their_values(tmp_path, kind):
    path, content = tmp_path / f"rows.{kind}", rows(120, tuple(range(-1, 11)))
    task = read(write_csv(path, content) if kind == "csv" else write_lines(path, content))
    assert task.labels == ("-1", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10")
    assert pairs(task) == expected(content)


@pytest.mark.parametrize("labels", [("spam", "ham"), ("never used", "ham", "spam"), (2, 10, 1)])
def test_task_labels_sets_the_classes_and_their_order(tmp_path, labels):
    classes = tuple(label for label in labels if label != "never used")
    content = rows(60, tuple(reversed(classes)))
    task = read(write_lines(tmp_path / "rows.jsonl", content), labels=labels)
    assert task.labels == tuple(map(str, labels))
    assert pairs(task) == expected(content)


def test_data_with_a_class_that_task_labels_lacks_is_refused(tmp_path):
    train = write_lines(tmp_path / "train.jsonl", rows(60, ("a", "b", "c")))
    with pytest.raises(TaskError, match=r"task.labels lacks `c`, which the data has; it lists `b`, `a`"):
        read(train, labels=("b", "a"))
    with pytest.raises(TaskError, match=r"task.labels has `a` twice"):
        read(train, labels=("a", "b", "c", "a"))
    test = write_lines(tmp_path / "test.jsonl", [{"text": "new", "label": "d"}])
    with pytest.raises(
        TaskError, match=r"test.jsonl, row 1: label `d` is not in task.labels; known: a, b, c"
    ):
        read(train, labels=("a", "b", "c"), test=str(test))
    with pytest.raises(ConfigError, match=r"task.labels needs two classes or more"):
        FilesConfig(train="x", labels=("a",))


def test_classes_that_yaml_takes_for_truth_values_are_refused_with_the_way_out():
    content = {"task": {"kind": "files", "train": "x", "labels": [False, True]}}
    with pytest.raises(
        ConfigError, match="YAML reads yes, no, on, off, true and false as truth values: write them"
    ):
        parse_config(content, where="my.yaml")


def test_two_devices_whose_files_hold_other_classes_share_one_list(tmp_path):
    fruit = ("apple", "banana", "cherry")
    here, there = (
        read(write_lines(tmp_path / f"{classes[0]}.jsonl", rows(40, classes)), labels=fruit)
        for classes in (("apple", "banana"), ("banana", "cherry"))
    )
    assert here.labels == there.labels == fruit
    assert {label for _, label in pairs(here)} == {"apple", "banana"}
    assert {label for _, label in pairs(there)} == {"banana", "cherry"}


def test_the_classes_and_their_rows_in_every_part_are_told(tmp_path):
    task = read(write_lines(tmp_path / "rows.jsonl", rows(60)))
    counts = [Counter(task.labels[e.label] for e in part) for part in (task.train, task.dev, task.test)]
    of = {label: "/".join(str(count[label]) for count in counts) for label in task.labels}
    assert f"2 classes, rows in train/dev/test: ham {of['ham']}, spam {of['spam']}" in task.notes


@pytest.mark.parametrize("field", ["premise", "hypothesis"])
@pytest.mark.parametrize("value", [None, 5, ["a"], {"a": "b"}])
def test_a_prompt_is_not_made_of_what_is_no_text(tmp_path, field, value):
    row = {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"}
    for split in ("train", "validation"):
        write_lines(tmp_path / f"{split}.jsonl", [row, {**row, field: value}])
    with pytest.raises(TaskError, match=rf"row 2: `{field}` is .*(text is wanted|empty)"):
        load_task(PromptsConfig(name="RTE", folder=str(tmp_path)), Letters(), seed=0)


def rare(count=200, positive=8):
    """Rows of which a few are positive; their places are drawn."""
    chosen = set(random.Random(1).sample(range(count), positive))
    return [{"text": f"text {i}", "label": "yes" if i in chosen else "no"} for i in range(count)]


def by_part(task):
    return [Counter(task.labels[e.label] for e in part) for part in (task.train, task.dev, task.test)]


def test_eight_positives_in_two_hundred_rows_are_in_every_part(tmp_path):
    train, dev, test = by_part(read(write_lines(tmp_path / "rows.jsonl", rare())))
    assert (train.total(), dev.total(), test.total()) == (153, 17, 30)
    assert (train["yes"], dev["yes"], test["yes"]) == (6, 1, 1)  # 15 % of 8 is 1.2, a tenth of 7 is 0.7


@pytest.mark.parametrize("sizes", [(500, 300, 200), (970, 20, 10), (334, 333, 333)])
def test_every_part_has_every_class_by_its_share(tmp_path, sizes):
    content = [{"text": f"{c} {i}", "label": f"c{c}"} for c, size in enumerate(sizes) for i in range(size)]
    random.Random(0).shuffle(content)
    task = read(write_lines(tmp_path / "rows.jsonl", content))
    for share, part in zip((0.765, 0.085, 0.15), by_part(task), strict=True):
        assert part.total() == round(share * 1000)
        for label, count in Counter(row["label"] for row in content).items():
            assert abs(part[label] - share * count) <= 1.5  # the test's rounding, and dev's of what is left


def test_a_class_of_three_rows_is_in_every_part_of_one_row_only_in_training(tmp_path):
    content = [*rows(200), *({"text": f"{label} {i}", "label": label} for label, count in
               (("three", 3), ("two", 2), ("one", 1)) for i in range(count))]  # fmt: skip
    task = read(write_lines(tmp_path / "rows.jsonl", content))
    counts = {label: [part[label] for part in by_part(task)] for label in ("three", "two", "one")}
    assert counts == {"three": [1, 1, 1], "two": [1, 1, 0], "one": [1, 0, 0]}
    assert "no row in dev has the class `one`; its scores say nothing of that" in task.notes
    assert any(note.startswith("no row in test has the class `one`, `two`") for note in task.notes)


@pytest.mark.parametrize("train_rows", [10, 20, 77])
def test_a_few_training_rows_have_every_class_too(tmp_path, train_rows):
    path = write_lines(tmp_path / "rows.jsonl", rare())
    first, other = (
        load_task(FilesConfig(train=str(path), train_rows=train_rows), Letters(), seed=seed)
        for seed in (0, 1)
    )
    for task in (first, other):
        assert len(task.train) == train_rows
        assert by_part(task)[0]["yes"] >= max(1, round(train_rows * 6 / 153) - 1)
    assert texts(first.train) != texts(other.train)
    assert texts(first.test) == texts(other.test)


def test_the_split_depends_on_content_alone_and_keeps_equal_texts_together(tmp_path):
    content = [
        *rare(),
        *({**row, "label": "no"} for row in rare() if row["label"] == "yes"),
    ]  # two labels each
    task = read(write_lines(tmp_path / "rows.jsonl", content))
    shuffled = random.Random(7).sample(content * 2, 2 * len(content))
    again = read(write_lines(tmp_path / "again.jsonl", shuffled))
    for part in ("train", "dev", "test"):
        assert set(texts(getattr(task, part))) == set(texts(getattr(again, part)))
    apart = [set(texts(part)) for part in (task.train, task.dev, task.test)]
    assert sum(map(len, apart)) == len(set.union(*apart)) == 200
    assert any("208 rows of train are dropped: they repeat another row" in note for note in again.notes)
    assert any(note.endswith("texts of train have more than one label") for note in task.notes)


def test_training_rows_that_stand_in_a_test_file_are_dropped_and_spoken_of(tmp_path):
    train = write_lines(tmp_path / "train.jsonl", rows(60))
    test = write_lines(tmp_path / "test.jsonl", rows(60)[50:])
    task = read(train, test=str(test))
    assert not set(texts(task.test)) & {*texts(task.train), *texts(task.dev)}
    assert len(task.train) + len(task.dev) == 50
    assert any("10 rows are dropped: their texts are in dev or test" in note for note in task.notes)


def write_long(tmp_path):
    """40 texts of 10 letters, 10 of 100 whose first 90 are the same."""
    content = [*({"text": f"short {i:04}", "label": i % 2} for i in range(40)),
               *({"text": f"{'long ' * 18}{i:010}", "label": i % 2} for i in range(10))]  # fmt: skip
    return write_lines(tmp_path / "rows.jsonl", content)


def test_rows_that_are_cut_are_counted_with_what_they_lose(tmp_path):
    task = read(write_long(tmp_path), max_tokens=64)
    said = (
        "max_tokens: 64 cuts 10 of 50 rows, 25.7% of all tokens; the longest has 100; 9 can no longer be told from "
        "another"
    )
    assert said in task.notes  # 10 x 36 of 40 x 10 + 10 x 100
    assert not any("max_tokens" in note for note in read(write_long(tmp_path), max_tokens=100).notes)


@pytest.mark.parametrize(("positions", "longest"), [(None, 100), (512, 100), (80, 80)])
def test_max_tokens_auto_reads_up_to_the_models_positions(tmp_path, positions, longest):
    reader = Letters(ModelLimits(positions=positions))
    task = load_task(FilesConfig(train=str(write_long(tmp_path)), max_tokens="auto"), reader, seed=0)
    assert max(len(e.rows[0]) for part in (task.train, task.dev, task.test) for e in part) == longest
    assert any("max_tokens: auto cuts 10 of 50 rows" in note for note in task.notes) == (longest == 80)


def test_prompts_say_what_they_lose_and_take_auto(tmp_path):
    row = {"premise": "It rains. " * 20, "hypothesis": "It is wet.", "label": "entailment"}
    for split in ("train", "validation"):
        write_lines(tmp_path / f"{split}.jsonl", [{**row, "hypothesis": f"{split} {i}"} for i in range(9)])
    cut, whole = (
        load_task(PromptsConfig(name="RTE", folder=str(tmp_path), max_tokens=m), Words(), seed=0)
        for m in (24, "auto")
    )
    assert any("max_tokens: 24 cuts 18 of 18 rows" in note for note in cut.notes)
    assert not any("max_tokens" in note for note in whole.notes)
    assert {len(e.rows[0]) for e in whole.test} == {40 + 4 + 2 + 5 + 1}


class Words(TextTokenizer):
    """A token per word."""

    def __init__(self):
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        super().__init__(inner, 0)


@pytest.mark.parametrize("part", ["train", "dev", "test"])
@pytest.mark.parametrize(
    ("bad", "limits", "said"),
    [
        ("x" * 65, ModelLimits(positions=64), "a row of {} has 65 tokens, the model has 64 positions"),
        ("\u4e2d", ModelLimits(vocabulary=20_000), "{} has the token id 20013 .* table has 20000 rows"),
        ("\u200b", ModelLimits(), "a text of {} has no token"),
    ],
)
def test_what_the_model_could_not_read_is_refused_before_the_first_step(tmp_path, part, bad, limits, said):
    class NoZeroWidth(Letters):
        def encode(self, text, max_tokens):
            return super().encode(text.replace("\u200b", ""), max_tokens)

    files = {}
    for number, name in enumerate(("train", "dev", "test")):
        content = [{**row, "text": f"{row['text']} {number}"} for row in rows()]
        content += [{"text": bad, "label": "ham"}] if name == part else []
        files[name] = str(write_lines(tmp_path / f"{name}.jsonl", content))
    with pytest.raises(TaskError, match=said.format(part)):
        load_task(FilesConfig(**files, max_tokens=200), NoZeroWidth(limits), seed=0)


def test_a_padding_token_beyond_the_embedding_is_refused(tmp_path):
    reader = Letters(ModelLimits(vocabulary=128))
    reader.pad_id = 128
    with pytest.raises(TaskError, match="the padding token has the id 128, the model's table has 128 rows"):
        load_task(FilesConfig(train=str(write_lines(tmp_path / "rows.jsonl", rows()))), reader, seed=0)


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        ({"max_position_embeddings": 512, "vocab_size": 30522, "hidden_size": 384}, (512, 30522, 384)),
        ({"n_positions": 1024, "vocab_size": 50257, "n_embd": 768}, (1024, 50257, 768)),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, (512, None, None)),
        ({"text_config": {"max_position_embeddings": 32768, "hidden_size": 640}}, (32768, None, 640)),
        ({"max_position_embeddings": 512, "dim": 768, "model_type": "distilbert"}, (512, None, 768)),
        (
            {"model_type": "mpt", "max_seq_len": 2048, "d_model": 4096, "vocab_size": 50368},
            (2048, 50368, 4096),
        ),
    ],
)
def test_the_models_sizes_are_those_of_its_family(config, limits):
    found = limits_of(config)
    assert (found.positions, found.vocabulary, found.width) == limits
