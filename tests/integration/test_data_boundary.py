"""All bytes of a run, decoded: no token ids, no text, and with labels at the client no label."""

import csv
import json
import random
import re

import numpy as np
import pytest
import yaml
from google.protobuf.unknown_fields import UnknownFieldSet

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
    """`captured(labels, method, zo)`: the client's messages of a plaintext run, its task, and the raw bytes.

    With `gives` the client gives its half at the end, and what `hosl merge` sends stands in place of the task.
    """

    def run(labels, method, zo=None, *, gives=False):
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
        give = ["--give-half"] * gives
        with Server(halves / "server", tmp_path / "service", "--plaintext", *give) as server:
            line = JoinLine.parse(server.line)
            recorder = Recorder((line.host, line.port))
            through = f"hosl://127.0.0.1:{recorder.port}#{line.token}"
            words = ["--plaintext", "--output-dir", tmp_path / "joined", *give]
            assert finished(join(halves / "client", through, config, *words))["finished"]
            recorder.close()
            if gives:
                merging = Recorder((line.host, line.port))
                through = f"hosl://127.0.0.1:{merging.port}#{line.token}"
                words = ["merge", str(tmp_path / "joined"), "--to", through, "--plaintext"]
                assert main([*words, "-o", str(tmp_path / "merged")]) == 0
                merging.close()
                sent = [[m for stream in r.sent for m in messages(stream)] for r in (recorder, merging)]
                return sent[0], sent[1], b"".join(bytes(stream) for stream in recorder.sent)
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
    assert set(fields) == {"activations", "mask", "labels", "half", "merge", "hello"}
    assert fields["half"]["sent"] == "never, unless joined with --give-half: once, at the end"
    assert not any(b"journal" in m for m in sent)  # not asked to give it; the next test is of one that was
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


def test_audit_tells_what_a_given_half_and_a_merge_send_and_the_capture_agrees(captured, tmp_path, capsys):
    sent, merging, _ = captured("server", "hosl", gives=True)
    capsys.readouterr()
    words = [str(tmp_path / "halves" / "client"), "--config", str(tmp_path / "config.yaml")]
    assert main(["audit", *words, "--json"]) == 0
    fields = {row["field"]: row for row in json.loads(capsys.readouterr().out)["fields"]}
    assert any(b"journal" in m for m in sent)  # so a run that gives nothing is seen to give none
    given = [m for m in sent if _is(pb.GiveRequest, m) and pb.GiveRequest.FromString(m).chunk]
    entries = 4 * 2  # steps and directions
    assert max(len(pb.GiveRequest.FromString(m).chunk) for m in given) == 16 * entries
    assert fields["half"]["shape"] == "the journal, 16 bytes a direction"
    assert fields["merge"]["sent"] == "never, unless `hosl merge` is called on the device"
    assert (
        fields["merge"]["shape"] == "the run's name, a step, a digest of what the server listed and an offset"
    )
    asked = [pb.HalfRequest.FromString(m) for m in merging if _is(pb.HalfRequest, m)]
    assert len(asked) == len(merging) == 2  # for the list, then for its bytes
    run_id = json.loads((tmp_path / "joined" / "record.json").read_text())["run_id"]
    assert [(ask.run, ask.step) for ask in asked] == [(run_id, 4)] * 2
    assert asked[0].list_digest == "" != asked[1].list_digest
    assert {field.name for field in pb.HalfRequest.DESCRIPTOR.fields} == {
        "run",
        "step",
        "list_digest",
        "offset",
    }
    assert not all(_is(pb.HalfRequest, m) for m in sent)  # the search tells other messages from these


def _is(kind, message):
    """Whether these bytes are one message of this kind and nothing else."""
    try:
        return kind.FromString(message).SerializeToString() == message and not _unknown(
            kind.FromString(message)
        )
    except Exception:
        return False


def _unknown(message):
    return len(UnknownFieldSet(message))
