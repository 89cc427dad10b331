"""All bytes of a run, decoded: no token ids, no text, and with labels at the client no label."""

import csv
import json
import random
import re

import numpy as np
import pytest
import yaml

from hosl.cli import main
from hosl.config import load_config
from hosl.tasks import TextTokenizer, load_task
from hosl.transport.join_line import JoinLine
from hosl.wire import hosl_pb2 as pb
from tests.integration.conftest import WORDS
from tests.integration.network import Server, finished, join
from tests.integration.recorder import Recorder, messages

REQUESTS = (pb.Upload, pb.HelloRequest, pb.SaveRequest, pb.JournalRequest, pb.DescendRequest)
_SESSION = re.compile(r"[0-9a-f]{16}\.\d+")


@pytest.fixture
def captured(tiny_run, tmp_path):
    """`captured(labels, method, zo)`: the client's messages of a plaintext run, its task, and the raw bytes."""

    def run(labels, method, zo=None):
        config = tiny_run(
            method=method, zo=zo or {}, max_steps=4, eval_steps=4, save_steps=4, wire={"labels": labels}
        )
        settings = yaml.safe_load(config.read_text())
        chance = random.Random(0)
        with (tmp_path / "data.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            for _ in range(60):
                words = [chance.choice(WORDS) for _ in range(24)]
                rows.writerow([" ".join(words), words[0]])
        settings["task"]["max_tokens"] = 32
        config.write_text(yaml.safe_dump(settings))
        halves = tmp_path / "halves"
        words = ["split", str(tmp_path / "model-in"), str(halves), "--cut", "2", "--head", "classification"]
        assert main([*words, "--labels", str(len(WORDS)), "--labels-at", labels]) == 0
        with Server(halves / "server", tmp_path / "service", "--plaintext") as server:
            line = JoinLine.parse(server.line)
            recorder = Recorder((line.host, line.port))
            through = f"hosl://127.0.0.1:{recorder.port}#{line.token}"
            words = ["--plaintext", "--output-dir", tmp_path / "joined"]
            assert finished(join(halves / "client", through, config, *words))["finished"]
            recorder.close()
        task = load_task(load_config(config).task, TextTokenizer.load(halves / "client"), seed=0)
        raw = b"".join(bytes(stream) for stream in recorder.sent)
        return [m for stream in recorder.sent for m in messages(stream)], task, raw

    return run


def _encodings(ids):
    """A row of token ids as anyone might write it: fixed-width integers, varints, text."""
    array = np.array(ids)
    yield from (array.astype(kind).tobytes() for kind in ("<i2", "<i4", "<i8", ">i2", ">i4", ">i8", "u1"))
    yield pb.Classes(labels=ids).SerializeToString()[2:]
    yield ",".join(map(str, ids)).encode()
    yield " ".join(WORDS[i - 2] for i in ids if i >= 2).encode()


def _decoded(message):
    """The one request that these bytes are, or None for what is no request.

    Short messages parse as more than one kind: the right one is a chunk, a Hello of this run, or names a session.
    """
    for kind in REQUESTS:
        try:
            parsed = kind.FromString(message)
        except Exception:
            continue
        if parsed.SerializeToString() != message:
            continue
        asked = parsed
        if kind is pb.Upload and parsed.WhichOneof("part"):
            asked = getattr(parsed, parsed.WhichOneof("part"))
        if isinstance(asked, bytes) or (kind is pb.HelloRequest and parsed.run.startswith("joined")):
            return parsed
        if hasattr(asked, "where") and _SESSION.fullmatch(asked.where.session):
            return parsed
    return None


@pytest.mark.parametrize("method", ["hosl", "fo-fo", "fo-recompute"])
@pytest.mark.parametrize("labels", ["server", "client"])
def test_no_token_ids_leave_the_device_and_labels_only_when_asked(captured, labels, method):
    sent, task, raw = captured(labels, method)
    decoded = [_decoded(message) for message in sent]
    assert all(parsed is not None for parsed in decoded)
    examples = [*task.train, *task.dev, *task.test]
    assert len(examples[0].rows[0]) == 24
    for example in examples:
        for text in _encodings(list(example.rows[0])):
            assert text not in raw
            assert text[: len(text) // 2] not in raw
    planted = np.array(examples[0].rows[0], "<i4").tobytes()
    assert planted in raw + planted  # the search itself can find what it looks for
    uploads = [parsed for parsed in decoded if isinstance(parsed, pb.Upload)]
    asked = [getattr(u, u.WhichOneof("part")) for u in uploads if u.WhichOneof("part") != "chunk"]
    assert asked
    told = [question for question in asked if hasattr(question, "targets") and question.targets.ByteSize()]
    if labels == "server":
        assert len(told) == len(asked)
        assert {label for q in told for label in q.targets.classes.labels} <= set(range(len(WORDS)))
    else:
        assert told == []
        assert {u.WhichOneof("part") for u in uploads} == {
            "states",
            "step_states",
            "chunk",
        } or method != "hosl"
        assert all(list(question.positions.positions) == [0] for question in asked)


def test_a_run_with_labels_at_the_client_learns_as_the_ordinary_one(tiny_run, tmp_path):
    """Within float32's rounding: the norm's gradient is summed over other rows. Bit for bit within one way."""
    losses = {}
    for labels in ("server", "client"):
        config = tiny_run(max_steps=12, wire={"labels": labels}, output_dir=str(tmp_path / labels))
        halves = tmp_path / f"halves-{labels}"
        words = ["split", str(tmp_path / "model-in"), str(halves), "--cut", "2", "--head", "classification"]
        assert main([*words, "--labels", "2", "--labels-at", labels]) == 0
        with Server(halves / "server", tmp_path / f"service-{labels}") as server:
            assert finished(join(halves / "client", server.line, config))["finished"]
        lines = (tmp_path / labels / "metrics.jsonl").read_text().splitlines()
        losses[labels] = [json.loads(line)["loss_nats"] for line in lines]
    assert losses["client"] == pytest.approx(losses["server"], rel=1e-3)


@pytest.mark.parametrize("point", ["clean", "first-plus"])
def test_audit_tells_what_leaves_and_the_capture_agrees(captured, tmp_path, capsys, point):
    sent, _, _ = captured("server", "hosl", {"server_gradient_at": point})
    words = [
        "audit",
        str(tmp_path / "halves" / "client"),
        "--config",
        str(tmp_path / "config.yaml"),
        "--json",
    ]
    capsys.readouterr()
    assert main(words) == 0
    fields = {row["field"]: row for row in json.loads(capsys.readouterr().out)["fields"]}
    assert set(fields) == {"activations", "mask", "labels", "half", "hello"}
    assert fields["half"]["sent"] == "never, unless joined with --give-half: once, at the end"
    assert not any(b"journal" in m for m in sent)  # this one was not asked to give it
    assert fields["half"]["shape"] == "the journal, 16 bytes a direction"
    shared = yaml.safe_load((tmp_path / "config.yaml").read_text())
    shared["clients"] = {"count": 2, "halves": "shared"}
    (tmp_path / "shared.yaml").write_text(yaml.safe_dump(shared))
    assert main([*words[:2], "--config", str(tmp_path / "shared.yaml"), "--json"]) == 0
    rows = {row["field"]: row for row in json.loads(capsys.readouterr().out)["fields"]}
    assert rows["half"]["shape"] == "a digest"  # the server has the journal already
    chunks = sum(len(u.chunk) for m in sent if (u := _decoded(m)) is not None and isinstance(u, pb.Upload))
    evaluated = sum(
        4 * q.activations.shape[0] * q.activations.shape[1] * q.activations.shape[2]
        for m in sent
        if isinstance(u := _decoded(m), pb.Upload) and u.WhichOneof("part") == "scores"
        for q in [u.scores]
    )
    assert fields["activations"]["bytes_per_step"] == pytest.approx((chunks - evaluated) / 4, rel=0.02)
