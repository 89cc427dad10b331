"""Where the labels are unless it is said: with whom brings text; and what is refused."""

import pytest

from hosl.cli.split import _labels_at
from hosl.config import Config, dump_config, parse_config
from hosl.core.methods import METHODS
from hosl.errors import ConfigError
from hosl.network.handshake import config_of, training_message
from hosl.training.crossing import what_crosses
from hosl.wire import hosl_pb2 as pb

TEXT = {"kind": "sft", "train": "rows.jsonl"}
SIX = {"kind": "prompts", "name": "SST-2", "folder": "."}
FILES = {"kind": "files", "train": "rows.csv"}


def read(**settings):
    return parse_config(settings, where="test")


@pytest.mark.parametrize(("task", "labels"), [(TEXT, "client"), (SIX, "server"), (FILES, "server")])
def test_the_labels_of_a_persons_own_text_stay_and_a_run_says_where_they_were(task, labels):
    config = read(task=task)
    assert config.wire.labels == labels
    assert f"labels: {labels}" in dump_config(config)
    for asked in ("server", "client"):
        said = read(task=task, wire={"labels": asked})
        assert said.wire.labels == asked
        assert f"labels: {asked}" in dump_config(said)
    assert Config().wire.labels == "server"


@pytest.mark.parametrize("method", METHODS)
def test_labels_stay_in_every_method_whose_server_is_trained_by_backprop(method):
    for clients in ({"count": 1}, {"count": 2}, {"count": 2, "schedule": "synchronous"}):
        if METHODS[method].server == "first-order":
            config = read(task=TEXT, method=method, clients=clients)
            model = pb.Model(family="llama", dtype=pb.FLOAT32, labels=pb.LABELS_AT_CLIENT)
            assert config_of(model, training_message(config), device="cpu").wire.labels == "client"
        elif clients.get("schedule") != "synchronous":
            with pytest.raises(ConfigError, match=r"set wire\.labels: server, or method to"):
                read(task=TEXT, method=method, clients=clients)


def test_a_split_does_as_the_config_says_else_as_the_head_suggests(tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text("task: {kind: files, train: rows.csv}\n")
    assert _labels_at(None, None, "causal")[0] == "client"
    assert _labels_at(None, None, "classification")[0] == "server"
    assert _labels_at("server", None, "causal") == (
        "server",
        "split for wire.labels: server, norm and head stay on the server (as asked)",
    )
    labels, why = _labels_at(None, str(config), "causal")
    assert labels == "server"
    assert why.endswith(f"(as wire.labels of {config} says)")
    with pytest.raises(ConfigError, match=r"wire\.labels of .* is server"):
        _labels_at("client", str(config), "causal")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"task": TEXT, "method": "hosl-gradient"},
            "labels at the client; up cross activations, padding mask, scored positions and the gradient at the last "
            "states; down states at the scored positions and the gradient at the cut",
        ),
        (
            {"task": SIX, "method": "hosl"},
            "labels at the server; up cross activations, padding mask and positions and tokens of what is learned; "
            "down losses",
        ),
    ],
)
def test_one_line_says_what_crosses(settings, line):
    assert what_crosses(read(**settings), "causal") == line
