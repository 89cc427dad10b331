"""Own data from file to report: what a run says, refuses and scores, beside plain transformers."""

import csv
import json
import random
import re

import pytest
import torch
import transformers
import yaml

from hosl.cli import main
from hosl.config import load_config
from hosl.planner.model_shape import ModelShape
from hosl.tasks import TextTokenizer, load_task
from tests.integration.conftest import WORDS
from tests.integration.network import Server, finished, join, split


def changed(config, **task):
    """The config with settings of its task changed."""
    settings = yaml.safe_load(config.read_text())
    settings["task"] |= task
    config.write_text(yaml.safe_dump(settings))
    return config


def write_rows(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def long_rows(count=60, words=40):
    chance = random.Random(0)
    return [
        (" ".join(chance.choice(WORDS) for _ in range(words - i % 3)), ("even", "odd")[i % 2])
        for i in range(count)
    ]


def test_eval_and_report_tell_each_class_as_plain_transformers_finds_them(tiny_run, tmp_path, capsys):
    config = tiny_run(method="fo-fo", max_steps=30, server={"learning_rate": 5e-2})
    assert main(["train", str(config)]) == 0
    run = tmp_path / "run"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model")
    task = load_task(load_config(config).task, TextTokenizer.load(run / "model"), seed=0)
    names = [model.config.id2label[index] for index in range(2)]
    confusion = [[0, 0], [0, 0]]
    for example in task.test:
        with torch.no_grad():
            predicted = model(torch.tensor([example.rows[0]])).logits.argmax().item()
        confusion[example.label][predicted] += 1
    assert min(map(sum, confusion)) > 0
    capsys.readouterr()
    assert main(["eval", str(run), "--split", "test", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["confusion"] == confusion
    assert [row["label"] for row in found["classes"]] == names == ["colour", "other"]
    for index, row in enumerate(found["classes"]):
        hits, predicted = confusion[index][index], confusion[0][index] + confusion[1][index]
        assert row["support"] == sum(confusion[index])
        assert row["recall"] == hits / sum(confusion[index])
        assert row["precision"] == (hits / predicted if predicted else 0)
    kept = json.loads((run / "evaluation.json").read_text())
    assert (kept["labels"], kept["confusion"]) == (names, confusion)
    assert main(["eval", str(run), "--split", "test"]) == 0
    assert re.search(r"class colour: precision .*, taken for: ", capsys.readouterr().out)
    page = (run / "report.html").read_text()
    assert "taken for colour" in page
    for name, counts in zip(names, confusion, strict=True):
        assert re.search(rf"<td>\s*{name}.*?{sum(counts)}\D+{counts[0]}\D+{counts[1]}\D", page, re.DOTALL)


def test_a_run_says_its_classes_and_its_cuts_before_its_first_step(tiny_run, tmp_path, capsys):
    write_rows(tmp_path / "long.csv", long_rows())
    config = changed(tiny_run(max_steps=2), train=str(tmp_path / "long.csv"), max_tokens=16)
    assert main(["train", str(config)]) == 0
    said = capsys.readouterr().err
    # 15 % of 60 are 9, a tenth of 51 are 5
    assert re.search(r"2 classes, rows in train/dev/test: even 23/[23]/[45], odd 23/[23]/[45]\n", said)
    assert "max_tokens: 16 cuts 60 of 60 rows" in said
    assert (
        said.index("2 classes")
        < said.index("max_tokens: 16")
        < said.index("hosl on long")
        < said.index("done")
    )
    assert "macro F1" in said


def test_auto_trains_on_whole_rows_and_too_many_tokens_are_refused_before_a_folder_is_made(
    tiny_run, tmp_path, capsys
):
    write_rows(tmp_path / "long.csv", long_rows())
    config = changed(tiny_run(max_steps=2), train=str(tmp_path / "long.csv"), max_tokens="auto")
    assert main(["train", str(config)]) == 0
    assert json.loads((tmp_path / "run" / "record.json").read_text())["longest_batch"]["tokens"] == 40
    assert "max_tokens" not in capsys.readouterr().err
    write_rows(tmp_path / "longer.csv", long_rows(words=80))  # the model has 64 positions
    arguments = [
        str(config),
        "--task.train",
        str(tmp_path / "longer.csv"),
        "--output-dir",
        str(tmp_path / "new"),
    ]
    assert main(["train", *arguments, "--task.max-tokens", "200"]) == 2
    assert re.search(r"has (78|79|80) tokens, the model has 64 positions", capsys.readouterr().err)
    assert not (tmp_path / "new").exists()
    assert main(["train", *arguments]) == 0
    assert "max_tokens: auto cuts 60 of 60 rows" in capsys.readouterr().err


@pytest.mark.parametrize("labels", [None, [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 12]])
def test_integer_labels_keep_their_numbers_in_the_exported_model(tiny_run, tmp_path, labels):
    """As text they would be in the order 0, 1, 10, 11, 2: then id2label of 2 is 10."""
    write_rows(tmp_path / "numbers.csv", [(f"{a} {b}", (10 * i + j) % 12) for i, a in enumerate(WORDS)
                                          for j, b in enumerate(WORDS)])  # fmt: skip
    config = changed(
        tiny_run(method="frozen", max_steps=1), train=str(tmp_path / "numbers.csv"), labels=labels
    )
    assert main(["train", str(config)]) == 0
    exported = transformers.AutoConfig.from_pretrained(tmp_path / "run" / "model")
    assert exported.id2label == dict(enumerate(map(str, labels or range(12))))


@pytest.mark.parametrize("part", ["train", "dev", "test"])
def test_a_batch_that_the_server_would_not_take_is_refused_before_the_first_step(tiny_run, tmp_path, part):
    """1 MiB is 8192 tokens of width 32 in float32, and 134 rows of 61 tokens are 8174."""
    files = {}
    for name in ("train", "dev", "test"):
        rows = long_rows(150, 60 if name == part else 10)
        files[name] = str(
            write_rows(tmp_path / f"{name}.csv", [(f"{text} {name}", label) for text, label in rows])
        )
    setting = "per_device_train_batch_size" if part == "train" else "per_device_eval_batch_size"
    config = changed(tiny_run(method="frozen", max_steps=1, **{setting: 140}), max_tokens="auto", **files)
    halves = split(tmp_path / "model-in", tmp_path / "halves")
    with Server(halves / "server", tmp_path / "service", "--tensor-limit", "1") as server:
        process = join(halves / "client", server.line, config)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2, said
        assert f"a batch of {part}, 140 rows of 61 tokens, takes 1,093,120 bytes" in said
        assert f"set {setting} to 134 or less" in said
        assert "Traceback" not in said
    with Server(halves / "server", tmp_path / "service-2", "--tensor-limit", "1") as server:
        assert finished(join(halves / "client", server.line, config, f"--{setting}", 134))["finished"]


def test_a_plan_knows_robertas_positions():
    """RobertaConfig: position ids begin after the padding token's, so 514 embeddings are 512 positions."""
    config = transformers.RobertaConfig(max_position_embeddings=514, pad_token_id=1)
    assert ModelShape("roberta", config, "classification").longest == 512
