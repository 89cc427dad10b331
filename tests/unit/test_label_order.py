"""The classes of a task follow the model's own head, and devices of one run must have one list of them."""

import hashlib
import json
from pathlib import Path
from unittest.mock import create_autospec

import pytest

from hosl.config import Config, WireConfig
from hosl.errors import HandshakeError
from hosl.network.handshake import training_message
from hosl.service.hosted_half import HostedHalf
from hosl.service.runs import ServedRun
from hosl.tasks import Example, labels_digest, model_labels
from hosl.tasks.classification import ClassificationTask
from hosl.tasks.label_order import in_model_order, label_note
from hosl.wire import hosl_pb2 as pb


def _task(labels):
    """One example per class in every part; its only token is 100 + the class's place in the data's own order."""
    examples = [Example(rows=((100 + index,),), label=index) for index in range(len(labels))]
    return ClassificationTask("t", tuple(labels), examples, examples[:1], examples[1:], pad_id=0)


@pytest.mark.parametrize(
    ("data", "model", "expected"),
    [
        (["banana", "apple"], ["apple", "banana"], ["apple", "banana"]),
        (["negative", "positive"], ["POSITIVE", "NEGATIVE"], ["positive", "negative"]),
        (["no", "yes"], ["yes", "maybe", "no"], ["yes", "maybe", "no"]),
        (["0", "1", "2"], ["2", "0", "1"], ["2", "0", "1"]),
        (["apple", "banana"], ["banana", "cherry"], ["apple", "banana"]),
        (["apple", "banana", "cherry"], ["cherry", "banana"], ["apple", "banana", "cherry"]),
        (["a", "A"], ["A", "a"], ["a", "A"]),
        (["a", "b"], [], ["a", "b"]),
    ],
)
def test_classes_take_the_order_of_the_models_head_where_it_has_all_of_them(data, model, expected):
    task = in_model_order(_task(data), model)
    assert list(task.labels) == expected
    for part in (task.train, task.dev, task.test):
        for example in part:
            assert task.labels[example.label] == data[example.rows[0][0] - 100]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}, ("no", "yes")),
        ({"label2id": {"yes": 0, "no": 1}}, ("yes", "no")),
        ({"id2label": {str(i): str(i * 2) for i in range(12)}}, tuple(str(i * 2) for i in range(12))),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, ()),
        ({"id2label": {"0": "no", "2": "yes"}}, ()),
        ({"id2label": None}, ()),
        ({"id2label": ["no", "yes"]}, ()),
        ({}, ()),
        (None, ()),
    ],
)
def test_a_models_own_names_are_read_from_its_config(tmp_path, config, expected):
    (tmp_path / "config.json").write_text("not JSON" if config is None else json.dumps(config))
    assert model_labels(tmp_path) == expected


def test_a_head_that_was_trained_for_other_classes_is_said_to_be_so():
    assert label_note(["bad", "good"], ["POSITIVE", "NEGATIVE"]) == (
        "the model's head was trained for other classes and goes on from them: `bad` is its `POSITIVE`, `good` is its "
        "`NEGATIVE`; task.labels sets the order"
    )
    assert label_note(["bad", "good"], ["a", "b", "c"]) == label_note(["a", "b"], ["A", "B"]) == ""


@pytest.mark.parametrize("reorder", [True, False])
@pytest.mark.parametrize(
    ("data", "model", "said"),
    [
        (["bad", "good"], ["POSITIVE", "NEGATIVE"], "`bad` is its `POSITIVE`, `good` is its `NEGATIVE`"),
        (["bad", "good", "so so"], ["POSITIVE", "NEGATIVE"], ""),
        (["bad", "good"], [], ""),
    ],
)
def test_a_head_for_other_classes_is_one_of_the_notes_of_its_task(data, model, said, reorder):
    notes = in_model_order(_task(data), model, reorder=reorder).notes
    assert len(notes) == bool(said)
    assert all("trained for other classes" in note and said in note for note in notes)


def test_classes_that_task_labels_sets_in_another_order_are_said_to_be_so():
    (note,) = in_model_order(_task(["no", "yes"]), ["yes", "no"], reorder=False).notes
    assert "`no` is its `yes`, `yes` is its `no`; task.labels sets the order" in note
    assert not in_model_order(_task(["no", "yes"]), ["yes", "no"]).notes


def _run(digest):
    training = pb.Training(clients=2, max_steps=5, labels_digest=digest)
    return ServedRun("fruit", pb.Model(), training, create_autospec(HostedHalf, instance=True), Path("fruit"))


def test_a_device_with_another_list_of_classes_is_refused_by_the_server():
    """A: apple = 0, banana = 1; B: banana = 0, cherry = 1; C: the classes of A in another order."""
    first = labels_digest(["apple", "banana"])
    assert first == hashlib.sha256(b'["apple", "banana"]').hexdigest()
    run = _run(first)
    run.agree(pb.Model(), pb.Training(clients=2, max_steps=5, labels_digest=first))
    for other in (
        ["banana", "cherry"],
        ["banana", "apple"],
        ["apple", "banana", "cherry"],
        ["apple, banana"],
    ):
        with pytest.raises(
            HandshakeError, match=r"run fruit: this device has other classes.*set task.labels to one"
        ):
            run.agree(pb.Model(), pb.Training(clients=2, max_steps=5, labels_digest=labels_digest(other)))
    with pytest.raises(HandshakeError, match="max_steps = 5, this client 6"):
        run.agree(pb.Model(), pb.Training(clients=2, max_steps=6, labels_digest=first))


def test_a_run_of_an_older_version_takes_the_list_of_the_first_device_that_tells_one():
    run, first = _run(""), labels_digest(["apple", "banana"])
    run.agree(pb.Model(), pb.Training(clients=2, max_steps=5, labels_digest=first))
    with pytest.raises(HandshakeError, match="other classes"):
        run.agree(pb.Model(), pb.Training(clients=2, max_steps=5, labels_digest=labels_digest(["banana"])))


def test_labels_that_stay_with_the_client_are_not_told_by_their_digest():
    digest = labels_digest(["apple", "banana"])
    assert training_message(Config(), digest).labels_digest == digest
    assert not training_message(Config(wire=WireConfig(labels="client")), digest).labels_digest
