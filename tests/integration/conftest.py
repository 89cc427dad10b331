"""A tiny model with a tokenizer, a small labelled file, and a config over both: a whole run takes seconds."""

import csv
from contextlib import contextmanager

import pytest
import tokenizers
import yaml

from tests.conftest import build
from tests.integration.network import split

WORDS = ["red", "green", "blue", "round", "flat", "long", "warm", "cold", "old", "new"]


def write_classifier(folder):
    """Write `folder`/model-in, a tiny classifier with its tokenizer, and `folder`/data.csv, rows to train it on."""
    model = folder / "model-in"
    build("bert").save_pretrained(model)
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with (folder / "data.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for a in WORDS:
            for b in WORDS:
                rows.writerow([f"{a} {b}", "colour" if a in WORDS[:3] else "other"])


@pytest.fixture
def tiny_run(tmp_path):
    """`tiny_run(**settings)` writes model, data and config.yaml; returns the config's path. zo: adds to its own."""

    def make(**settings):
        model = tmp_path / "model-in"
        write_classifier(tmp_path)
        config = {
            "output_dir": str(tmp_path / "run"),
            "method": "hosl",
            "model": {"name": str(model), "cut": 2},
            "task": {"kind": "files", "train": str(tmp_path / "data.csv")},
            "zo": {"directions": 2, "distribution": "gaussian"},
            "client": {"learning_rate": 1e-3},
            "server": {"learning_rate": 1e-2, "optimiser": {"name": "sgd"}},
            "max_steps": 12, "per_device_train_batch_size": 8, "eval_steps": 5, "save_steps": 4, "snapshot_steps": 6,
        }  # fmt: skip
        # of 16 directions, the default, a run would take its time
        settings["zo"] = config["zo"] | settings.get("zo", {})
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config | settings))
        return path

    return make


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """The folder of a tiny classifier that was split."""
    folder = tmp_path_factory.mktemp("refusals")
    build("bert").save_pretrained(folder / "model")
    return split(folder / "model", folder / "halves")


@pytest.fixture
def power_failure(monkeypatch):
    """`with power_failure(Session, step)`: a session of that class raises OSError in place of the round of `step`."""

    @contextmanager
    def failing(session_class, at):
        rounds = session_class.round

        def power_fails(session, batch, step):
            if step == at:
                raise OSError("the power fails here")
            return rounds(session, batch, step)

        with monkeypatch.context() as patched:
            patched.setattr(session_class, "round", power_fails)
            yield

    return failing
