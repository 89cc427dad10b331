"""A fine-tuned head keeps the order of its classes, from the model's folder to the export and across devices."""

import csv
import json

import pytest
import torch
import transformers as hf

from hosl.cli import main
from hosl.config import load_config
from hosl.evaluation import evaluate
from hosl.split import export_checkpoint, split_folder, split_model
from hosl.tasks import TextTokenizer, load_task, model_labels
from hosl.training.local_session import new_session
from tests.integration.network import Server, enrol, join, split


def _rows(tmp_path):
    with (tmp_path / "data.csv").open(newline="") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def _fine_tuned(tmp_path, names):
    """Fine-tune the model of `tiny_run` by plain transformers on the data, classes in the order `names`.

    Returns its accuracy by the names that transformers' own config gives.
    """
    folder = tmp_path / "model-in"
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the new head's
        model = hf.AutoModelForSequenceClassification.from_pretrained(
            folder, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
            num_labels=len(names), ignore_mismatched_sizes=True,
        ).eval()  # fmt: skip
    rows = _rows(tmp_path)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text, _ in rows])
    fold = [name.casefold() for name in names]
    truth = torch.tensor([fold.index(label) for _, label in rows])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(200):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(ids).logits, truth).backward()
        optimiser.step()
    model.save_pretrained(folder)
    with torch.no_grad():
        said = [model.config.id2label[int(index)].casefold() for index in model(ids).logits.argmax(1)]
    return sum(name == label for name, (_, label) in zip(said, rows, strict=True)) / len(rows)


@pytest.mark.parametrize(
    "names",
    [("other", "colour"), ("Other", "COLOUR"), ("shape", "other", "colour")],
    ids=["order", "case", "more"],
)
def test_a_fine_tuned_head_keeps_its_accuracy_before_the_first_step(tiny_run, tmp_path, names):
    """Sorted by text, `colour` would be class 0, which is this head's `other`: accuracy 0.000 for 1.000."""
    config = tiny_run()
    assert _fine_tuned(tmp_path, names) == 1.0
    session = new_session(load_config(config))
    assert [label.casefold() for label in session.task.labels] == [name.casefold() for name in names]
    scored = evaluate(
        session.client, session.server_to_call(in_round=False), session.task,
        [*session.task.train, *session.task.dev, *session.task.test], rows_per_batch=64,
    )  # fmt: skip
    assert scored.accuracy == 1.0
    # a device reads the same order from its half
    halves = tmp_path / "halves"
    split_folder(str(tmp_path / "model-in"), 2, halves, head="classification")
    device = load_task(
        load_config(config).task, TextTokenizer.load(halves / "client"), seed=0,
        model_labels=model_labels(halves / "client"),
    )  # fmt: skip
    assert device.labels == session.task.labels


def test_a_trained_model_exports_and_goes_on_with_the_order_of_its_head(tiny_run, tmp_path, capsys):
    config = str(tiny_run(max_steps=2, method="frozen", server={"learning_rate": 0.0}))
    assert _fine_tuned(tmp_path, ("other", "colour")) == 1.0
    for run, name in (("run", "model-in"), ("again", "run/model")):
        words = ["--output-dir", str(tmp_path / run), "--model.name", str(tmp_path / name)]
        assert main(["train", config, *words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["test_accuracy"] == 1.0
        exported = hf.AutoConfig.from_pretrained(tmp_path / run / "model")
        assert exported.id2label == {0: "other", 1: "colour"}
        assert exported.label2id == {"other": 0, "colour": 1}


def test_twelve_integer_classes_are_exported_by_their_numbers(tiny, tmp_path):
    model = tiny("bert")
    client_half, server_half = split_model(model, 1)
    export_checkpoint(client_half, server_half, tmp_path / "out", labels=[str(i) for i in range(12)])
    config = hf.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == {i: str(i) for i in range(12)}
    assert config.label2id == {str(i): i for i in range(12)}


def test_a_head_for_other_classes_is_said_before_the_run(tiny_run, tmp_path, capsys):
    config = tiny_run(max_steps=1)
    folder = tmp_path / "model-in"
    hf.AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=2,
        id2label={0: "NEG", 1: "POS"},
        label2id={"NEG": 0, "POS": 1},
        ignore_mismatched_sizes=True,
    ).save_pretrained(folder)
    said = "`colour` is its `NEG`, `other` is its `POS`; task.labels sets the order"
    capsys.readouterr()
    assert main(["train", str(config)]) == 0
    assert capsys.readouterr().err.count(said) == 1
    halves = split(folder, tmp_path / "halves")
    with Server(halves / "server", tmp_path / "service") as server:
        out, err = join(halves / "client", server.line, config, "--output-dir", tmp_path / "a").communicate()
    assert json.loads(out.splitlines()[-1])["finished"]
    assert err.count(said) == 1


def test_two_devices_with_different_classes_do_not_train_one_head(tiny_run, tmp_path, capsys):
    """A: colour = 0, other = 1; B: other = 0, shape = 1. The second is refused by one line, the first goes on."""
    config = tiny_run(max_steps=3, clients={"count": 2})
    with (tmp_path / "other.csv").open("w", newline="") as file:
        renamed = [(text, "shape" if label == "colour" else label) for text, label in _rows(tmp_path)]
        csv.writer(file).writerows([("text", "label"), *renamed])
    halves = split(tmp_path / "model-in", tmp_path / "halves")
    with Server(halves / "server", tmp_path / "service") as server:
        second = enrol(tmp_path / "service", "second", capsys)
        out, err = join(
            halves / "client", server.line, config, "--output-dir", tmp_path / "a" / "run"
        ).communicate()
        assert json.loads(out.splitlines()[-1])["finished"], err
        refused = join(
            halves / "client", second, config, "--output-dir", tmp_path / "b" / "run",
            "--task.train", tmp_path / "other.csv",
        )  # fmt: skip
        out, err = refused.communicate()
    assert refused.returncode == 2
    (line,) = [line for line in err.splitlines() if "other classes" in line]
    assert "set task.labels to one list on every device" in line
    assert "Traceback" not in err
    assert not (tmp_path / "b" / "run").exists()
