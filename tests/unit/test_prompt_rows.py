"""Prompts on own columns: templates, options and labels; the paper's six as instances of the same mechanism."""

import csv
import json
import re
from typing import Any

import msgspec
import pytest
import tokenizers

from hosl.config.files import dump_config, parse_config
from hosl.errors import ConfigError, TaskError
from hosl.tasks import PromptsConfig, TextTokenizer, load_task, task_digest

OPTIONS: dict[str | int, str] = {"negative": " negative", "positive": " positive"}
TEMPLATE = "{text}\nSentiment:"
GOLDEN = {
    "SST-2": "78edec871c45", "CB": "c350a7a9d2a9", "RTE": "1249a74e3297", "WiC": "e245b0ec7d48", "WSC": "2e06129d7b36",
    "BoolQ": "4e21442a90eb",
}  # fmt: skip
"""The digest of all encoded examples with OPT's tokenizer, as version 0.2 makes them."""


class Letters(TextTokenizer):
    """A token per character, an opening token; `?` for what it does not know, and characters that it drops."""

    def __init__(self, dropped: str = "") -> None:
        letters = {chr(code): code for code in range(10, 127)}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 1, "?": 2} | letters, unk_token="?"))
        if dropped:
            inner.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex(f"[{dropped}]"), "")
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(".|\n"), "isolated")
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        super().__init__(inner, 0)

    def text(self, ids: Any) -> str:
        return "".join(map(chr, ids))


def review(number: int, label: Any = None) -> dict[str, Any]:
    label = ("negative", "positive")[number % 2] if label is None else label
    return {"text": f"film {number}", "label": label, "by": f"critic {number}"}


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def own(tmp_path, rows=None, **settings: Any) -> PromptsConfig:
    train = lines(tmp_path / "rows.jsonl", [review(i) for i in range(40)] if rows is None else rows)
    return PromptsConfig(**{"template": TEMPLATE, "options": OPTIONS, "train": train} | settings)


def test_a_row_is_its_prompt_with_each_option(tmp_path):
    reader = Letters()
    config = own(tmp_path, template="{by} says {{of {text}}}:")
    task = load_task(config, reader, seed=0)
    assert (task.labels, task.head, task.name) == (("negative", "positive"), "causal", "rows")
    parts = [*task.train, *task.dev, *task.test]
    assert len(parts) == 40
    said = set()
    for example in parts:
        for row, length, option in zip(example.rows, example.option_lengths, OPTIONS.values(), strict=True):
            assert reader.text(row[len(row) - length :]) == option
            said.add((reader.text(row[1 : len(row) - length]), example.label))
    assert said == {(f"critic {i} says {{of film {i}}}:", i % 2) for i in range(40)}
    assert any(re.match(r"test \(\d+ rows\) and dev \(\d+ rows\) drawn from", note) for note in task.notes)


def test_every_format_of_rows_gives_the_same_prompts(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [review(i) for i in range(40)]
    digests = {task_digest(load_task(own(tmp_path, rows), Letters(), seed=0))}
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label", "by"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    names = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["negative", "positive"]}}}}
    table = pyarrow.Table.from_pylist([row | {"label": i % 2} for i, row in enumerate(rows)])
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    (tmp_path / "saved").mkdir()
    with (
        pyarrow.OSFile(str(tmp_path / "saved" / "data.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
    for name in ("rows.csv", "rows.tsv", "rows.parquet", "saved"):
        config = own(tmp_path, train=str(tmp_path / name))
        digests.add(task_digest(load_task(config, Letters(), seed=0)))
    assert len(digests) == 1


@pytest.mark.parametrize("labels", [(0, 1), ("0", "1"), (0.0, 1.0)], ids=["whole", "text", "float"])
def test_labels_may_be_numbers(tmp_path, labels):
    rows = [review(i, labels[i % 2]) for i in range(40)]
    config = msgspec.convert(
        {"kind": "prompts", "template": TEMPLATE, "options": {0: " no", 1: " yes"}, "train": own(tmp_path, rows).train},
        PromptsConfig,
    )  # fmt: skip
    task = load_task(config, Letters(), seed=0)
    assert task.labels == ("0", "1")
    assert sorted(e.label for part in (task.train, task.dev, task.test) for e in part) == [0] * 20 + [1] * 20


def test_dev_and_test_files_and_numbers_of_rows_are_as_asked(tmp_path):
    files = {
        name: lines(tmp_path / f"{name}.jsonl", [review(start + i) for i in range(20)])
        for name, start in (("dev", 100), ("test", 200))
    }
    task = load_task(own(tmp_path, **files, train_rows=10, dev_rows=6), Letters(), seed=0)
    assert [len(part) for part in (task.train, task.dev, task.test)] == [10, 6, 20]
    assert "task.dev_rows keeps 6 of 20 rows, by label and content" in task.notes


def test_a_row_that_is_cut_counts_once_whatever_its_options(tmp_path):
    rows = [review(i) for i in range(19)] + [review(19) | {"text": "long " * 40}]
    task = load_task(own(tmp_path, rows, max_tokens=100), Letters(), seed=0)
    (note,) = [note for note in task.notes if note.startswith("max_tokens: 100 cuts")]
    assert note.startswith("max_tokens: 100 cuts 1 of 20 rows, ")


def test_a_config_is_read_back_as_it_was_written(tmp_path):
    config = parse_config({"task": msgspec.to_builtins(own(tmp_path))}, where="here")
    task: Any = config.task
    assert (task.train_rows, task.dev_rows) == (None, None)  # auto, of own files
    import yaml

    again = parse_config(yaml.safe_load(dump_config(config)), where="there")
    assert again == config
    assert [*msgspec.to_builtins(again.task)["options"]] == [*OPTIONS]
    of_folder = PromptsConfig(name="CB", folder="x")
    assert (of_folder.train_rows, of_folder.dev_rows) == (1000, 500)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{text.real}", "names {text.real}: the name of a column is allowed there and nothing else"),
        ("{text[0]}", "names {text[0]}: the name"), ("{0}", "names {0}: the name"), ("{}", "names {}: the name"),
        ("{text!r}", "names {text!r}: the name"), ("{text:>9}", "names {text:>9}: the name"),
        ("{text:{by}}", "names {text:{by}}: the name"), ("{text", "task.template '{text': expected '}'"),
        ("text}", "task.template 'text}': Single '}'"), ("a text", "names no column, so all rows would be alike"),
        ("{{text}}", "names no column"), ("", "names no column"),
        ("{text} {label}", "the prompt would hold the answer"),
    ],
)  # fmt: skip
def test_a_template_names_columns_and_nothing_else(template, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        PromptsConfig(template=template, options=OPTIONS, train="rows.csv")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"options": {"a": " a"}}, "needs two options or more"), ({"options": {}}, "needs two options or more"),
        ({"options": {"a": " x", "b": " x"}}, "each with a continuation of its own"),
        ({"options": {"a": "", "b": " x"}}, "`a` is empty"), ({"options": None}, "options is missing"),
        ({"template": None}, "template is missing"), ({"train": None}, "has no data; set task.train"),
        ({"folder": "x"}, "task.folder is for a task of the paper"), ({"name": "CB"}, "has a template and options"),
        ({"train_rows": 0}, "task.train_rows must be >= 1"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        PromptsConfig(**{"template": TEMPLATE, "options": OPTIONS, "train": "rows.csv"} | settings)


def test_yes_and_no_of_yaml_are_said_to_be_truth_values():
    task = {"kind": "prompts", "template": TEMPLATE, "train": "x", "options": {True: " Yes", False: " No"}}
    with pytest.raises(ConfigError, match="truth values: write them in quotes"):
        parse_config({"task": task}, where="my.yaml")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"txt": "a", "label": "positive"}, "no column `text`; there are txt, label; did you mean `txt`?"),
        ({"text": "a", "lable": "positive"}, "no column `label`; there are text, lable; did you mean `lable`?"),
        ({"text": " ", "label": "positive"}, "`text` is empty"),
        ({"text": 5, "label": "positive"}, "`text` is a number"),
        ({"text": "a", "label": "neutral"}, "label `neutral` is none of `negative`, `positive`"),
        ({"text": "a", "label": None}, "is empty"), ({"text": "a", "label": 1.5}, "is 1.5; a class is"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_serve_is_named(tmp_path, row, said):
    rows = [review(0), review(1), row, review(3)]
    with pytest.raises(TaskError, match=rf"rows\.jsonl, row 3: {re.escape(said)}"):
        load_task(own(tmp_path, rows), Letters(), seed=0)


@pytest.mark.parametrize(
    ("settings", "dropped", "said"),
    [
        ({"options": {"negative": "~", "positive": " good"}}, "~", "option '~' of `negative` gives no token of its"),
        ({"options": {"negative": " bad" * 20, "positive": " good"}}, "", "has 80 tokens, which leaves none before it"),
    ],
    ids=["no token", "no room"],
)  # fmt: skip
def test_an_option_that_cannot_be_scored_is_refused_by_its_row(tmp_path, settings, dropped, said):
    config = own(tmp_path, [review(i) for i in range(9)], **settings, max_tokens=32)
    with pytest.raises(TaskError, match=rf"rows\.jsonl, row \d: .*{re.escape(said)}"):
        load_task(config, Letters(dropped), seed=0)


def test_a_long_prompt_is_cut_at_its_beginning_and_counted(tmp_path):
    reader = Letters()
    rows = [review(i) | {"text": f"{i} " + "long " * 30} for i in range(40)]
    task = load_task(own(tmp_path, rows, max_tokens=30), reader, seed=0)
    for example in task.train:
        for row, option in zip(example.rows, OPTIONS.values(), strict=True):
            assert len(row) == 30
            assert row[0] == 1
            assert reader.text(row[1:]) == f"{'long ' * 30}\nSentiment:{option}"[-29:]
    assert any("max_tokens: 30 cuts 40 of 40 rows" in note for note in task.notes)


HUB = {
    "WSC": (
        {"text": "Mark told Pete {i}.", "target": {"span1_text": "Mark", "span2_text": "He"}},
        {"text": "Mark told Pete {i}.", "span1_text": "Mark", "span2_text": "He", "span1_index": 0, "span2_index": 2},
        (False, True),
    ),
    "CB": ({"premise": "p {i}", "hypothesis": "h"}, {"premise": "p {i}", "hypothesis": "h", "idx": 7},
           ("entailment", "contradiction", "neutral")),
    "BoolQ": ({"passage": "p {i}", "question": "is it"}, {"passage": "p {i}", "question": "is it", "idx": 7},
              (False, True)),
}  # fmt: skip
"""The fields of a row as published, and as the hub's super_glue has them; the labels, which are 0, 1, ... there."""


def numbered(fields, number):
    """The row of a number."""
    return {
        name: text.replace("{i}", str(number)) if isinstance(text, str) else text
        for name, text in fields.items()
    }


@pytest.mark.parametrize("name", HUB)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "own file"])
def test_rows_of_the_hubs_super_glue_give_the_same_examples(tmp_path, name, kind):
    import pyarrow
    import pyarrow.parquet

    as_published, as_on_the_hub, labels = HUB[name]
    digests = []
    for form, row, values in (
        ("published", as_published, labels),
        ("hub", as_on_the_hub, range(len(labels))),
    ):
        folder = tmp_path / form
        folder.mkdir()
        for split, start in (("train", 0), ("validation", 100)):
            rows = [numbered(row, i) | {"label": values[i % len(values)]} for i in range(start, start + 30)]
            if kind == "parquet" and form == "hub":
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")
            else:
                lines(folder / f"{split}.jsonl", rows)
        config = PromptsConfig(name=name, folder=str(folder))
        if kind == "own file":
            config = PromptsConfig(name=name, train=str(folder / "train.jsonl"))
        digests.append(task_digest(load_task(config, Letters(), seed=0)))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_papers_tasks_are_encoded_as_ever(hosl_data, name):
    reader = TextTokenizer.load(hosl_data / "data/tokenizers/opt")
    task = load_task(PromptsConfig(name=name, folder=str(hosl_data / "data/tasks")), reader, seed=0)
    assert task_digest(task)[:12] == GOLDEN[name]


def test_the_order_of_options_tells_two_configs_apart(tmp_path):
    config, other = (
        own(tmp_path, options=dict(pairs)) for pairs in (OPTIONS.items(), [*OPTIONS.items()][::-1])
    )
    assert config != other
    assert hash(config) != hash(other)
    assert config == own(tmp_path)
    assert hash(config) == hash(own(tmp_path))
