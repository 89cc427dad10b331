"""Either side killed at any message, started again by the same command: the end is the same, bit for bit."""

import random
import signal
import sys
import time
from pathlib import Path

import pytest

from hosl.parties.remote.server import SAVE_PAUSES_S
from tests.integration.forked import Forked
from tests.integration.network import ENVIRONMENT, HOSL, Server, finished, join, newest, split, wait_until

HERE = Path(__file__).parent
CALLS = {
    "hosl": ("Hello", "Losses", "Step", "Scores", "Save"),
    "fo-fo": ("Step", "Save"),
    "zo-zo": ("Probe", "Descend"),
    "labels": ("States", "StepStates", "Save"),  # hosl with the labels at the client
}
POINTS = [
    (method, side, call, when)
    for method, calls in CALLS.items()
    for side in ("server", "client")
    for call in calls
    for when in ("before", "after")
]
_NUMBER = {"Hello": 1, "Scores": 2, "Save": 2}
"""At which question of a call the process dies; 7 for those that come more often: after the first checkpoint."""


@pytest.fixture
def whole(tiny_run, tmp_path):
    """`whole(method)`: config, halves, and what an uninterrupted network run leaves."""

    def make(method, **settings):
        labels = "client" if method == "labels" else "server"
        config = tiny_run(
            method="hosl" if method == "labels" else method, client={"learning_rate": 1e-3},
            max_steps=8, save_steps=3, snapshot_steps=3, eval_steps=4,
            wire={"idle_s": 5.0, "labels": labels}, **settings,
        )  # fmt: skip
        halves = split(tmp_path / "model-in", tmp_path / "halves", **{"labels-at": labels})
        with Server(halves / "server", tmp_path / "whole-service") as server:
            finished(join(halves / "client", server.line, config, "--output-dir", tmp_path / "whole"))
        return config, halves, left(tmp_path / "whole", tmp_path / "whole-service")

    return make


def left(run, service):
    """Every exact byte that a run leaves on both sides."""
    (served,) = (service / "runs").iterdir()
    exact = {"metrics": (run / "metrics.jsonl").read_bytes()}
    for side, folder in (("client", newest(run / "checkpoints")), ("server", newest(served / "checkpoints"))):
        exact |= {f"{side}/{p.name}": p.read_bytes() for p in (folder / side).iterdir()}
    return exact


IMPATIENT = [
    sys.executable,
    "-c",
    "import sys; from hosl.cli import main; from hosl.parties.remote import server; "
    "server.SAVE_PAUSES_S = tuple(0.1 for _ in server.SAVE_PAUSES_S); sys.exit(main())",
]
"""`hosl` that waits less until it asks again for a checkpoint."""


def joining(halves, line, config, run, program=None):
    command = [
        *(program or HOSL),
        "join",
        str(halves / "client"),
        "--to",
        line,
        "--config",
        str(config),
        "--json",
    ]
    return Forked([*command, "--output-dir", str(run)], env=ENVIRONMENT)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "side", "call", "when"), POINTS, ids=["-".join(p) for p in POINTS])
def test_a_side_killed_at_a_message_changes_nothing(whole, tmp_path, method, side, call, when):
    config, halves, expected = whole(method)
    run, service = tmp_path / "killed", tmp_path / "service"
    number = _NUMBER.get(call, 7)
    dying = [sys.executable, str(HERE / f"dying_{side}.py"), call, str(number), when]
    server = Server(halves / "server", service, program=dying if side == "server" else None)
    line, address = server.line, server.address
    client = joining(halves, line, config, run, program=dying if side == "client" else None)
    if side == "server":
        assert server.process.wait(120) == -signal.SIGKILL
        server.close()
        server = Server(halves / "server", service, listen=address)
    else:
        client.communicate(timeout=120)
        assert client.returncode == -signal.SIGKILL
        client = joining(halves, line, config, run)
    with server:
        finished(client)
    assert left(run, service) == expected


def test_a_killed_server_and_a_killed_client_change_nothing(whole, tmp_path):
    """One of each, in the suite; every call and moment stands in the slow test."""
    config, halves, expected = whole("hosl")
    run, service = tmp_path / "killed", tmp_path / "service"
    dying = [sys.executable, str(HERE / "dying_server.py"), "Step", "5", "after"]
    server = Server(halves / "server", service, program=dying)
    line, address = server.line, server.address
    client = joining(halves, line, config, run)
    assert server.process.wait(120) == -signal.SIGKILL
    server.close()
    with Server(halves / "server", service, listen=address):
        wait_until(lambda: (run / "checkpoints" / "step-00000006").is_dir())
        client.send_signal(signal.SIGKILL)
        client.communicate()
        finished(joining(halves, line, config, run))
    assert left(run, service) == expected


def test_a_full_disk_on_the_server_loses_nothing(whole, tmp_path):
    """The client hears of it and stops; with space again, the same command goes on to the same end."""
    config, halves, expected = whole("hosl")
    run, service = tmp_path / "killed", tmp_path / "service"
    with Server(halves / "server", service, program=[sys.executable, str(HERE / "full_server.py")]) as server:
        line, address = server.line, server.address
        client = joining(halves, line, config, run, program=IMPATIENT)
        _, err = client.communicate(timeout=120)
        assert client.returncode == 1
        assert err.count("trying again in") == len(SAVE_PAUSES_S)
        assert "No space left on device" in err
        assert "the one before it is intact" in err
        assert server.process.poll() is None
    with Server(halves / "server", service, listen=address):
        finished(joining(halves, line, config, run))
    assert left(run, service) == expected


@pytest.mark.slow
def test_fifty_random_kills_change_nothing(whole, tmp_path):
    """Fifty kills at random moments of either side, over as many runs as it takes."""
    config, halves, expected = whole("hosl")
    chance, kills, count = random.Random(7), 0, 0
    while kills < 50:
        count += 1
        run, service = tmp_path / f"killed-{count}", tmp_path / f"service-{count}"
        server = Server(halves / "server", service)
        line, address = server.line, server.address
        client = joining(halves, line, config, run)
        while client.poll() is None and kills < 50:
            time.sleep(chance.uniform(0.2, 6.0))
            if client.poll() is not None:
                break
            kills += 1
            if chance.random() < 0.5:
                client.kill()
                client.communicate()
                if (run / "report.html").is_file():  # it was done; the same command would say so
                    break
                client = joining(halves, line, config, run)
            else:
                server.process.kill()
                server.process.wait()
                server.close()
                server = Server(halves / "server", service, listen=address)
        if client.returncode is None or not (run / "report.html").is_file():
            finished(client)
        else:
            client.communicate()
        server.close()
        assert left(run, service) == expected
    print(f"{kills} kills over {count} runs")
