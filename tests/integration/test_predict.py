"""`hosl predict`: labels of new rows, held against plain transformers on the exported model."""

import csv
import json

import numpy as np
import pytest
import torch
import transformers
import yaml

from hosl.cli import main
from tests.integration.conftest import WORDS as PLAIN_WORDS
from tests.integration.languages import WORDS, language_model, tuning

OPTIONS = {"fine": " great", "finer": " great was", "bad": " terrible"}
"""The first is a prefix of the second."""


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def predicted(out):
    return [json.loads(line) for line in out.read_text().splitlines()]


def predict(capsys, *words):
    """The JSON result of `hosl predict`, and what it said."""
    capsys.readouterr()
    assert main(["predict", *map(str, words), "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """The folder of a finished run of a prompt task on own columns, beside its config and its rows."""
    folder = tmp_path_factory.mktemp("prompts")
    rows = [{"review": f"w{i} w{i + 40}", "by": f"w{i % 7}", "mood": [*OPTIONS][i % 3]} for i in range(48)]
    task = {
        "kind": "prompts", "template": "{by} {review}\nIt was", "options": OPTIONS, "label_column": "mood",
        "train": str(lines(folder / "rows.jsonl", rows)),
    }  # fmt: skip
    config = tuning(folder, language_model(folder / "model", "llama"), task=task)
    assert main(["train", str(config), "--json"]) == 0
    return folder


def log_likelihoods(model, prompt):
    """The mean log-likelihood per token of each option after a prompt, by plain transformers, a row at a time."""
    scores = {}
    for name, option in OPTIONS.items():
        before, ids = ([WORDS.index(word) for word in text.split()] for text in (prompt, prompt + option))
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        own = range(len(before), len(ids))
        scores[name] = float(np.mean([logits[at - 1, ids[at]] for at in own]))
    return scores


def test_options_are_scored_as_plain_transformers_scores_them(prompts, tmp_path, capsys):
    rows = [{"review": f"w{i} w3 w{i + 1}", "by": "w5"} for i in range(20)]  # without labels
    result, err = predict(
        capsys, prompts / "run", lines(tmp_path / "new.jsonl", rows), "-o", tmp_path / "out.jsonl"
    )
    assert result == {"out": str(tmp_path / "out.jsonl"), "rows": 20}
    assert f"{prompts / 'run'} after step 4" in err
    model = transformers.AutoModelForCausalLM.from_pretrained(prompts / "run" / "model").eval()
    for number, (line, row) in enumerate(zip(predicted(tmp_path / "out.jsonl"), rows, strict=True), start=1):
        due = log_likelihoods(model, f"{row['by']} {row['review']}\nIt was")
        assert line.keys() == {"row", "label", "probabilities", "scores"}
        assert line["row"] == number
        assert line["scores"] == pytest.approx(due, abs=1e-5)
        assert line["label"] == max(due, key=lambda name: due[name])
        total = sum(np.exp([*due.values()]))
        assert line["probabilities"] == pytest.approx(
            {name: np.exp(score) / total for name, score in due.items()}, abs=1e-5
        )


def test_an_exported_model_with_its_config_predicts_the_same_bits(prompts, tmp_path, capsys):
    of_run, _ = predict(capsys, prompts / "config.yaml", prompts / "rows.jsonl", "-o", tmp_path / "run.jsonl")
    of_model, _ = predict(
        capsys, prompts / "run" / "model", prompts / "rows.jsonl", "--config", prompts / "config.yaml",
        "-o", tmp_path / "model.jsonl",
    )  # fmt: skip
    assert (tmp_path / "run.jsonl").read_bytes() == (tmp_path / "model.jsonl").read_bytes()
    assert of_run["accuracy"] == of_model["accuracy"]
    assert of_run["labelled"] == of_run["rows"] == 48


def test_accuracy_is_over_the_rows_that_have_a_label_of_the_task(prompts, tmp_path, capsys):
    rows = [
        {"review": "w1", "by": "w2", "mood": mood} for mood in ("fine", "finer", "bad", "awful", None, "")
    ]
    result, err = predict(
        capsys, prompts / "run", lines(tmp_path / "new.jsonl", rows), "-o", tmp_path / "out.jsonl"
    )
    assert (result["rows"], result["labelled"]) == (6, 3)
    assert result["accuracy"] == pytest.approx(1 / 3)  # one text, three labels: one of them is right
    assert "3 of 6 rows have no label of bad, fine, finer; the accuracy is that of the others" in err


def test_a_classifiers_probabilities_are_plain_transformers_and_its_accuracy_that_of_eval(
    tiny_run, tmp_path, capsys
):
    config = tiny_run()
    assert main(["train", str(config)]) == 0
    with (tmp_path / "data.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    texts = tmp_path / "texts.csv"
    texts.write_text("text\n" + "".join(f"{row['text']}\n" for row in rows))
    result, _ = predict(capsys, tmp_path / "run", texts, "-o", tmp_path / "out.jsonl", "--keep-columns")
    assert "accuracy" not in result
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    found = predicted(tmp_path / "out.jsonl")
    for line, row in zip(found, rows, strict=True):
        assert line["columns"] == {"text": row["text"]}
        ids = torch.tensor([[2 + PLAIN_WORDS.index(word) for word in row["text"].split()]])
        with torch.no_grad():
            due = model(ids).logits[0].softmax(-1).tolist()
        assert [*line["probabilities"]] == ["colour", "other"]
        assert [*line["probabilities"].values()] == pytest.approx(due, abs=1e-5)
        assert line["label"] == ["colour", "other"][int(np.argmax(due))]
    with_labels, _ = predict(
        capsys, tmp_path / "run", tmp_path / "data.csv", "-o", tmp_path / "labelled.jsonl"
    )
    assert with_labels["accuracy"] == np.mean(
        [a["label"] == b["label"] for a, b in zip(found, rows, strict=True)]
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"review": "w1"}, "row 2: no column `by`; there are review"),
        ({"review": " ", "by": "w1"}, "row 2: `review` is empty"),
        ({"review": 7, "by": "w1"}, "row 2: `review` is a number"),
    ],
    ids=["column", "empty", "number"],
)  # fmt: skip
def test_a_row_that_cannot_serve_is_named_and_nothing_is_written(prompts, tmp_path, capsys, row, said):
    rows = lines(tmp_path / "new.jsonl", [{"review": "w1", "by": "w2"}, row])
    assert main(["predict", str(prompts / "run"), str(rows), "-o", str(tmp_path / "out.jsonl")]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "row 2" in text]
    assert said in line
    assert [*tmp_path.iterdir()] == [rows]


def test_what_is_there_already_is_not_overwritten(prompts, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text("mine")
    words = ["predict", str(prompts / "run"), str(prompts / "rows.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    assert main(words) == 2
    assert "nothing is overwritten: choose another name, or remove it" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "rows.jsonl", "--config", "config.yaml"], "is a run and has its own config; leave --config out"),
        (["run/model", "rows.jsonl"], "is no run's folder"),
        (["run", "gone.jsonl"], "gone.jsonl: no such file; give a file"),
        (["run/model", "rows.jsonl", "--config", "config.yaml", "--best"], "--best is for the folder of a run"),
        (["run", "rows.jsonl", "--temperature", "1"], "--temperature is for answers, and this task has labels"),
        (["model", "rows.jsonl", "--config", "classes.yaml"], "its head was never trained for these 2 classes"),
    ],
    ids=["config of a run", "no config", "no rows", "best of a model", "texts", "new head"],
)  # fmt: skip
def test_what_cannot_predict_is_refused_in_one_line(prompts, tmp_path, capsys, monkeypatch, words, said):
    task = {"kind": "files", "train": "rows.jsonl", "labels": ["a", "b"]}
    model = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    monkeypatch.chdir(prompts)
    (prompts / "texts.yaml").write_text("task: {kind: sft, train: rows.jsonl}\n")
    if "classes.yaml" in words:
        transformers.BertModel(model).save_pretrained(tmp_path / "bert")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "bert" / name).write_bytes((prompts / "model" / name).read_bytes())
        (prompts / "classes.yaml").write_text(yaml.safe_dump({"model": {"cut": 1}, "task": task}))
        words = [str(tmp_path / "bert"), *words[1:]]
    capsys.readouterr()
    assert main(["predict", *words, "-o", str(tmp_path / "out.jsonl")]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("hosl: ")]
    assert said in line
    assert not (tmp_path / "out.jsonl").exists()
