"""Three devices whose questions are answered together: the half that they would train if each were answered alone."""

import sys
from pathlib import Path

import pytest
import torch

from tests.integration.network import Server, enrol, finished, join, server_state, split, wait_until
from tests.integration.test_ranks import program as ranks_program

SLOW = [sys.executable, str(Path(__file__).parent / "slow_server.py")]


def case(name, *, killed=False, ranks=(), slow=True):
    return pytest.param(killed, ranks, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    ("killed", "ranks"),
    [
        case("undisturbed", slow=False), case("the server is killed", killed=True),
        case("two ranks", ranks=("--ranks", "2")),
    ],
)  # fmt: skip
def test_devices_end_with_merging_as_without(tiny_run, tmp_path, capsys, killed, ranks):
    clients = {"count": 3, "halves": "shared", "schedule": "synchronous", "grace_s": 60.0}
    config = tiny_run(max_steps=4, save_steps=2, eval_steps=4, clients=clients, wire={"idle_s": 5.0})
    parts = split(tmp_path / "model-in", tmp_path / "halves")
    trained, journals = {}, {}
    for tokens in ("0", "512"):
        service = tmp_path / f"service-{tokens}"
        words = ("--merge-tokens", tokens, *ranks)
        program = ranks_program() if ranks else SLOW
        server = Server(parts / "server", service, *words, program=program)
        lines = [server.line, *(enrol(service, name, capsys) for name in ("second", "third"))]
        runs = [tmp_path / f"device-{place}-{tokens}" / "run" for place in range(3)]
        joined = [
            join(parts / "client", line, config, "--output-dir", run)
            for line, run in zip(lines, runs, strict=True)
        ]
        if killed and tokens == "512":
            wait_until(lambda service=service: list(service.glob("runs/*/checkpoints/step-*2")), 240)
            server.process.kill()
            server.process.wait()
            address = server.address
            server.close()
            server = Server(parts / "server", service, *words, program=SLOW, listen=address)
        summaries = [finished(process) for process in joined]
        assert server.stop() == 0
        assert len({summary["client_digest"] for summary in summaries}) == 1
        (stopped,) = [event for event in server.events if event["event"] == "stopped"]
        if not killed:
            assert (stopped["merged_questions"] > stopped["merged_passes"]) == (tokens == "512")
        trained[tokens], journals[tokens] = server_state(service), summaries[0]["journal_updates"]
    assert journals["0"] == journals["512"]
    for name, alone in trained["0"].items():
        # losses differ by 3e-7; over 2 epsilon = 2e-3 that moves a direction by 1.5e-4, and the half by rounding
        torch.testing.assert_close(trained["512"][name], alone, rtol=0, atol=1e-5)
