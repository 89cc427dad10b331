"""Data that cannot serve: refused before anything is trained, with the reason and the way out."""

import json
from typing import Any

import pyarrow
import pytest
import tokenizers

from hosl.errors import TaskError
from hosl.tasks import FilesConfig, PromptsConfig, TextTokenizer, load_task


@pytest.fixture
def words():
    return TextTokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?")), 0, None)


def write(path, pairs):
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in pairs))
    return str(path)


def write_dataset(folder, table, state=None):
    folder.mkdir()
    with (
        pyarrow.OSFile(str(folder / "data.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, table.schema) as stream,
    ):
        stream.write_table(table)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data.arrow"}]} | (state or {}))
    )
    return str(folder)


ROWS = [(f"text {i}", ("ham", "spam")[i % 2]) for i in range(40)]


def test_a_saved_selection_of_a_dataset_is_not_read_as_all_its_rows(tmp_path, words):
    """`dataset.select(...).save_to_disk(...)` of older versions keeps every row and a file of indices."""
    table = pyarrow.table({"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]})
    whole = write_dataset(tmp_path / "whole", table, {"_indices_data_files": None})
    task = load_task(FilesConfig(train=whole), words, seed=0)
    assert len(task.train) + len(task.dev) + len(task.test) == 40
    part = write_dataset(tmp_path / "part", table, {"_indices_data_files": [{"filename": "indices.arrow"}]})
    with pytest.raises(TaskError, match=r"part is a selection of the rows .* after `flatten_indices\(\)`"):
        load_task(FilesConfig(train=part), words, seed=0)


@pytest.mark.parametrize(
    ("train", "more", "left"),
    [(ROWS, {"test": ROWS}, "train"), (ROWS, {"dev": ROWS, "test": ROWS[:1]}, "train"), (ROWS[:2], {}, "dev"),
     (ROWS[:4], {"dev": ROWS[:1], "test": ROWS[:4]}, "train")],
)  # fmt: skip
def test_a_part_without_a_row_of_its_own_is_refused(tmp_path, words, train, more, left):
    files: dict[str, Any] = {
        name: write(tmp_path / f"{name}.csv", rows) for name, rows in ({"train": train} | more).items()
    }
    with pytest.raises(TaskError, match=f"no row is left for {left} once the splits are disjoint; give more"):
        load_task(FilesConfig(**files), words, seed=0)


def test_prompts_whose_training_rows_are_all_in_test_are_refused(tmp_path, words):
    row = {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"}
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(TaskError, match="no row is left for train once the splits are disjoint"):
        load_task(PromptsConfig(name="RTE", folder=str(tmp_path)), words, seed=0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", r"rows\.csv is empty; it should hold one example per row"),
        ("text,label\n", r"rows\.csv holds no rows; it should hold one example per row"),
        ("text,label\n" + "".join(f"text {i},ham\n" for i in range(40)), "needs two labels or more, found only `ham`"),
    ],
    ids=["no byte", "a header alone", "one class"],
)  # fmt: skip
def test_a_file_that_nothing_can_be_learned_from_is_refused(tmp_path, words, content, said):
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(TaskError, match=said):
        load_task(FilesConfig(train=str(tmp_path / "rows.csv")), words, seed=0)


def test_a_label_that_a_datasets_own_list_lacks_is_refused(tmp_path, words):
    table = pyarrow.table({"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]})
    folder = write_dataset(tmp_path / "saved", table)
    feature = {"label": {"names": ["ham", "eggs"], "_type": "ClassLabel"}}
    (tmp_path / "saved" / "dataset_info.json").write_text(json.dumps({"features": feature}))
    with pytest.raises(TaskError, match=r"the list of its own classes lacks `spam`.* it lists `ham`, `eggs`"):
        load_task(FilesConfig(train=folder), words, seed=0)


@pytest.mark.parametrize("folder", ["empty", "split"])
def test_a_folder_that_is_no_saved_dataset_is_refused(tmp_path, words, folder):
    (tmp_path / folder).mkdir()
    if folder == "split":
        (tmp_path / folder / "train").mkdir()
        (tmp_path / folder / "train" / "rows.csv").write_text("text,label\na,b\n")
    with pytest.raises(TaskError, match=r"no \.arrow file in it or in train/; use `save_to_disk`"):
        load_task(FilesConfig(train=str(tmp_path / folder)), words, seed=0)
