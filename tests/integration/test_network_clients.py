"""Several devices train one server half: shared and personal halves, both schedules, and what may go wrong."""

import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from hosl.core.journal import Journal
from tests.integration.network import ENVIRONMENT, Server, enrol, finished, join, newest, split, wait_until


def journal_of(run):
    return Journal.from_bytes((newest(run / "checkpoints") / "client" / "journal.bin").read_bytes())


@pytest.mark.parametrize("schedule", ["sequential", "synchronous"])
def test_shared_halves_follow_one_journal(tiny_run, tmp_path, capsys, schedule):
    config = tiny_run(
        max_steps=6, clients={"count": 3, "halves": "shared", "schedule": schedule, "grace_s": 60.0}
    )
    halves = split(tmp_path / "model-in", tmp_path / "halves")
    with Server(halves / "server", tmp_path / "service") as server:
        lines = [server.line, *(enrol(tmp_path / "service", name, capsys) for name in ("second", "third"))]
        runs = [tmp_path / f"device-{place}" / "run" for place in range(3)]
        joined = [
            join(halves / "client", line, config, "--output-dir", run, "--seed", "0")
            for line, run in zip(lines, runs, strict=True)
        ]
        summaries = [finished(process) for process in joined]
        assert server.stop() == 0
    journals = [journal_of(run) for run in runs]
    longest = max(journals, key=len).to_bytes()
    assert all(longest.startswith(journal.to_bytes()) for journal in journals)
    if schedule == "synchronous":  # one update per round, the mean over three: all end equal
        assert len({summary["client_digest"] for summary in summaries}) == 1
        assert [len(journal) for journal in journals] == [
            6 * 3 * 2
        ] * 3  # 6 rounds, 3 clients, 2 directions each
    else:
        assert max(journal.last_step for journal in journals) == 18
        updates = {summary["client_digest"]: summary["journal_updates"] for summary in summaries}
        assert max(updates.values()) == 18  # the last to end has all; the others say how many they have
        assert len(set(updates.values())) == len(updates)  # as many updates, the same half


def test_personal_halves_train_one_server_in_rounds(tiny_run, tmp_path, capsys):
    config = tiny_run(
        method="fo-fo", max_steps=5, clients={"count": 2, "schedule": "synchronous", "grace_s": 60.0}
    )
    halves = split(tmp_path / "model-in", tmp_path / "halves")
    with Server(halves / "server", tmp_path / "service") as server:
        lines = [server.line, enrol(tmp_path / "service", "second", capsys)]
        runs = [tmp_path / f"device-{place}" / "run" for place in range(2)]
        joined = [
            join(halves / "client", line, config, "--output-dir", run)
            for line, run in zip(lines, runs, strict=True)
        ]
        for process in joined:
            assert finished(process)["finished"]
        server.stop()
    (served,) = (tmp_path / "service" / "runs").iterdir()
    assert newest(served / "checkpoints").name == "step-00000005"  # one update per round, not one per client


MALICE = """
import os, random, sys
from hosl.transport.channel import Channel
from hosl.transport.join_line import JoinLine
from hosl.errors import HoslError
chance, channel = random.Random(5), Channel(JoinLine.parse(sys.argv[1]))
class Raw:
    def __init__(self, data): self.data = data
    def SerializeToString(self): return self.data
class Any:
    @staticmethod
    def FromString(data): return data
while True:
    call = chance.choice(["Hello", "Losses", "Step", "Scores", "Save", "Journal", "Probe", "Descend", "Gradient"])
    frames = [Raw(chance.randbytes(chance.randrange(200))) for _ in range(chance.randrange(4))]
    try:
        channel.upload(call, frames, Any)
        sys.exit("the server accepted garbage")
    except HoslError:
        pass
"""


@pytest.mark.slow
def test_eight_clients_for_two_hundred_rounds_with_three_that_fail(tiny_run, tmp_path, capsys):
    """One is killed, one is stopped again and again, one sends garbage; the others end equal, hash for hash."""
    config = tiny_run(
        max_steps=200, eval_steps=100, save_steps=100, zo={"directions": 1},
        clients={"count": 7, "halves": "shared", "schedule": "synchronous", "grace_s": 4.0},
    )  # fmt: skip
    halves = split(tmp_path / "model-in", tmp_path / "halves")
    with Server(halves / "server", tmp_path / "service") as server:
        names = [f"device-{place}" for place in range(1, 8)]
        lines = [server.line, *(enrol(tmp_path / "service", name, capsys) for name in names)]
        malicious = subprocess.Popen([sys.executable, "-c", MALICE, lines[7]], env=ENVIRONMENT)
        joined = [
            join(halves / "client", line, config, "--output-dir", tmp_path / f"device-{place}" / "run")
            for place, line in enumerate(lines[:7])
        ]
        first = tmp_path / "device-0" / "run" / "metrics.jsonl"
        wait_until(lambda: first.exists(), 300)
        wait_until(lambda: any(event["event"] == "hello" for event in server.events), 300)
        joined[5].kill()  # in its first steps: a fast machine ends the run in less than a minute
        while joined[0].poll() is None:
            joined[6].send_signal(signal.SIGSTOP)
            with suppress(subprocess.TimeoutExpired):
                joined[0].wait(6)
            joined[6].send_signal(signal.SIGCONT)
            with suppress(subprocess.TimeoutExpired):
                joined[0].wait(6)
        honest = [finished(process, 600) for place, process in enumerate(joined) if place != 5]
        assert malicious.poll() is None, "the malicious client was let in, or ended"
        malicious.kill()
        malicious.wait()
        joined[5].communicate()
        of_garbage = [e for e in server.events if e["event"] == "refused" and e["client"] == "device-7"]
        dropped = [event for event in server.events if event["event"] == "dropped"]
        assert server.stop() == 0
    assert sum(event["times"] for event in of_garbage) > 100
    assert any("device-5" in event["clients"] for event in dropped)
    assert len({summary["client_digest"] for summary in honest}) == 1
