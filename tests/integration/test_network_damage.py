"""A network run with a damaged checkpoint on either side goes back to the newest intact pair, and ends the same."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.integration.network import Server, finished, join, newest, split
from tests.integration.test_network_kills import joining

HERE = Path(__file__).parent


def left(run, service):
    """Every exact byte that a run leaves on both sides."""
    served = service / "runs" / json.loads((run / "record.json").read_text())["run_id"]
    exact = {"metrics": (run / "metrics.jsonl").read_bytes()}
    for side, folder in (("client", newest(run / "checkpoints")), ("server", newest(served / "checkpoints"))):
        exact |= {f"{side}/{p.name}": p.read_bytes() for p in (folder / side).iterdir()}
    return exact


@pytest.fixture
def torn_apart(tiny_run, tmp_path):
    """What an unharmed run leaves, and a copy on demand of one whose both sides were killed after saves of 2 and 4."""
    config = tiny_run(max_steps=8, save_steps=2, eval_steps=4, wire={"idle_s": 5.0})
    halves, service = split(tmp_path / "model-in", tmp_path / "halves"), tmp_path / "service"
    with Server(halves / "server", service) as server:
        finished(join(halves / "client", server.line, config, "--output-dir", tmp_path / "whole"))
        expected = left(tmp_path / "whole", service)
        dying = [sys.executable, str(HERE / "dying_client.py"), "Step", "6", "before"]
        client = joining(halves, server.line, config, tmp_path / "killed", program=dying)
        client.communicate(timeout=240)
        assert client.returncode == -signal.SIGKILL
        line, address = server.line, server.address

    def copy(name):
        """The folders of a copy of both sides, and `(words) -> process, log` that lets them go on."""
        run, copied = tmp_path / name / "killed", tmp_path / name / "service"
        shutil.copytree(tmp_path / "killed", run)
        shutil.copytree(service, copied)

        def go_on():
            with Server(halves / "server", copied, listen=address) as again:
                client = joining(halves, line, config, run)
                out, err = client.communicate(timeout=240)
                return client.returncode, out + err, [e for e in again.events if e["event"] == "damaged"]

        served = copied / "runs" / json.loads((run / "record.json").read_text())["run_id"]
        return run, copied, run / "checkpoints", served / "checkpoints", go_on

    return expected, copy


def flip(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))


def test_either_side_damaged_goes_back_to_the_newest_intact_pair(torn_apart):
    expected, copy = torn_apart
    for side in ("client", "server"):
        run, service, *checkpoints, go_on = copy(side)
        for folder in checkpoints:
            assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000004"]
        if side == "client":
            flip(checkpoints[0] / "step-00000004" / "client" / "journal.bin")
        else:
            flip(checkpoints[1] / "step-00000004" / "server" / "trained.safetensors")
        status, said, events = go_on()
        assert status == 0, said
        told = said if side == "client" else str(events)
        assert "the newest intact one is of step 2" in told
        assert left(run, service) == expected


def test_without_an_intact_pair_both_sides_keep_what_they_have(torn_apart):
    _, copy = torn_apart
    _, _, mine, theirs, go_on = copy("both")
    flip(mine / "step-00000004" / "client" / "journal.bin")
    flip(theirs / "step-00000002" / "server" / "trained.safetensors")
    before = {p: p.read_bytes() for folder in (mine, theirs) for p in folder.rglob("*") if p.is_file()}
    status, said, _ = go_on()
    assert status == 2
    assert "both go on from step 0, and what is later is deleted" in said
    assert "Traceback" not in said
    assert {
        p: p.read_bytes() for folder in (mine, theirs) for p in folder.rglob("*") if p.is_file()
    } == before
