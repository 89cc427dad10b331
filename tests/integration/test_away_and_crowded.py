"""A server that is away, busy, crowded by strangers or cannot save; and a person who ends the run meanwhile."""

import itertools
import json
import random
import signal
import socket
import sys
import threading

import pytest

from hosl.errors import LinkError
from hosl.parties.remote import server as remote_server
from hosl.service import status as service_status
from hosl.service.status import Status
from hosl.wire import hosl_pb2 as pb
from tests.integration.hostile import HandWritten, refused
from tests.integration.network import Server, finished, join, split, wait_until
from tests.integration.peers import Peer, model_of, refused_as
from tests.integration.test_hostile_server import _join


def _refused_first(name, times):
    """The first calls are refused by an error of this name, the later ones are answered."""
    count = itertools.count(1)

    def reply(request, honest, context):
        if next(count) <= times:
            refused(context, name)
        return honest

    return reply


@pytest.mark.usefixtures("unchecked")
def test_a_server_that_is_busy_for_a_moment_is_asked_again(tiny_run, tmp_path, capsys):
    with HandWritten(Step=_refused_first("BusyError", 3)) as server:
        status, kind, said = _join(tiny_run, tmp_path, capsys, server, "frozen")
        assert (status, kind) == (0, None), said


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("failures", "status"), [(2, 0), (99, 1)])
def test_a_save_that_failed_is_tried_again(tiny_run, tmp_path, capsys, monkeypatch, failures, status):
    monkeypatch.setattr(remote_server, "SAVE_PAUSES_S", (0.01, 0.01, 0.01))
    with HandWritten(Save=_refused_first("CheckpointError", failures)) as server:
        found, kind, said = _join(tiny_run, tmp_path, capsys, server, "frozen")
        assert (found, kind) == (status, "CheckpointError" if status else None), said


def test_strangers_that_only_connect_do_not_end_a_run(tiny_run, tmp_path):
    """400 connections that say nothing, at a server that may have 256 files open: the run ends as if they were not."""
    config = tiny_run(method="frozen", max_steps=60, save_steps=1, eval_steps=100)
    halves = split(tmp_path / "model-in", tmp_path / "halves")
    few_files = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); "
    program = [sys.executable, "-c", few_files + "from hosl.cli import main; sys.exit(main())"]
    run, strangers = tmp_path / "joined", []
    with Server(halves / "server", tmp_path / "service", program=program) as server:
        joined = join(halves / "client", server.line, config, "--output-dir", run)
        wait_until(lambda: (run / "metrics.jsonl").exists() or joined.poll() is not None)
        host, _, port = server.address.rpartition(":")
        for _ in range(400):
            strangers.append(socket.create_connection((host, int(port))))
        assert finished(joined)["finished"]
        for stranger in strangers:
            stranger.settimeout(30)  # and each is closed, by itself
            assert stranger.recv(1000) is not None
            stranger.close()
        assert server.stop() == 0


def test_refusals_that_repeat_do_not_fill_the_log(monkeypatch):
    now, lines = [100.0], []
    monkeypatch.setattr(service_status.time, "monotonic", lambda: now[0])
    status = Status(log=lambda line: lines.append(json.loads(line)))
    for _ in range(1000):
        status.refused("?", "Hello", LinkError("no"))
        status.broke("?", "Hello", OSError("no"))
    status.refused("second", "Hello", LinkError("no"))  # another client's are counted apart
    assert [(line["event"], line["client"]) for line in lines] == [
        ("refused", "?"), ("failed", "?"), ("refused", "second")
    ]  # fmt: skip
    now[0] += 11
    status.refused("?", "Hello", LinkError("no"))
    assert sum(line["times"] for line in lines if (line["event"], line["client"]) == ("refused", "?")) == 1001
    assert 'hosl_refusals_total{call="Hello",error="LinkError"} 1002.0' in status.exposition().decode()


def _started(tiny_run, tmp_path, server, method):
    config = tiny_run(method=method, max_steps=1000, save_steps=2)
    halves = split(tmp_path / "model-in", tmp_path / "halves")
    line = server.line
    return join(halves / "client", line, config, "--plaintext", "--output-dir", tmp_path / "joined")


def test_ctrl_c_ends_a_run_whose_server_is_away(tiny_run, tmp_path):
    with HandWritten() as server:
        process = _started(tiny_run, tmp_path, server, "hosl")
        wait_until(lambda: any(name == "Save" for name, _ in server.messages))
    process.stderr.readline()
    for text in iter(process.stderr.readline, ""):
        if "trying again" in text:
            break
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "go on with: the same command" in err
    assert "Traceback" not in err
    assert json.loads(out.splitlines()[-1])["finished"] is False


@pytest.mark.parametrize("call", ["Losses", "Step"])
def test_two_sigterms_end_a_run_whose_server_does_not_answer(tiny_run, tmp_path, call):
    reached, release = threading.Event(), threading.Event()

    def never(request, honest, context):
        reached.set()
        release.wait(120)
        return honest

    with HandWritten(**{call: never}) as server:
        process = _started(tiny_run, tmp_path, server, "hosl")
        try:
            assert reached.wait(120)
            process.terminate()
            wait_until(lambda: _handled(process))
            process.terminate()
            _, err = process.communicate(timeout=60)
        finally:
            release.set()
            process.kill()
    assert process.returncode == 130
    assert "interrupted; go on with the same `hosl join`" in err
    assert "Traceback" not in err


def _handled(process):
    """Whether no SIGTERM is pending in the process."""
    with open(f"/proc/{process.pid}/status", encoding="ascii") as status:
        pending = next(line.split()[1] for line in status if line.startswith("ShdPnd"))
    return not int(pending, 16) & 1 << (signal.SIGTERM - 1)


def test_no_well_formed_question_meets_a_bug_of_ours(halves, tmp_path):
    """Hellos of every enumerated setting, and every call after those that are answered: never a FailureError."""
    model = model_of(json.loads((halves / "client" / "half.json").read_text()))
    words, chance = ["--plaintext", "--calls-per-s", "100000", "--runs-at-once", "200"], random.Random(20)
    found = set()
    with Server(halves / "server", tmp_path / "service", *words) as server:
        for number in range(60):
            training = pb.Training(
                method=chance.choice(pb.Method.values()[1:]), seed=chance.choice([0, 7, 2**63, 2**64 - 1]),
                distribution=chance.choice(pb.Distribution.values()[1:]),
                trainable=chance.choice(pb.Trainable.values()[1:]), learning_rate=chance.choice([0.0, 1e-3, 1e6]),
                optimiser=pb.Optimiser(
                    name=chance.choice(pb.OptimiserName.values()[1:]), momentum=chance.choice([0.0, 0.9]),
                    weight_decay=chance.choice([0.0, 1e-2, 1e6]),
                ),
                lora=pb.Lora(
                    r=chance.choice([1, 1024]), alpha=chance.choice([1, 2**20]),
                    target_modules=chance.choice([[], ["query"], ["nobody"], ["LayerNorm"], ["weight"]]),
                ),
                schedule=chance.choice(pb.Schedule.values()), warmup_steps=chance.choice([0, 3, 2**31]),
                max_steps=chance.choice([1, 3, 2**31]), compression=chance.choice(pb.Compression.values()),
                clients=chance.choice([1, 2, 4096]), halves=chance.choice(pb.Halves.values()),
                order=chance.choice(pb.Order.values()), grace_s=chance.choice([1e-3, 86400.0]),
            )  # fmt: skip
            peer = Peer(server.line, model, training, run=f"run-{number}")
            named = refused_as(peer, "Hello", peer.hello())
            found.add(named)
            if named is None:
                peer.greet()
                where = pb.Where(session=peer.session, step=1)
                questions = {
                    "Losses": peer.upload("losses", count=2), "Step": peer.upload("step", want_gradient=True),
                    "Probe": peer.upload("probe", count=2, seed=2**64 - 1, epsilon=0.5),
                    "Gradient": peer.upload("gradient"), "Scores": peer.upload("scores", step=0),
                    "Descend": [pb.DescendRequest(where=where, seeds=[2**64 - 1], coefficients=[1e17])],
                    "Save": [pb.SaveRequest(where=pb.Where(session=peer.session, step=1))],
                }  # fmt: skip
                for call, frames in questions.items():
                    data = [f if isinstance(f, bytes) else f.SerializeToString() for f in frames]
                    found.add(refused_as(peer, call, data))
            peer.channel.close()
        failed = [event for event in server.events if event["event"] == "failed"]
    assert failed == []
    assert "FailureError" not in found
    assert None in found
