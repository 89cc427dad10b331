"""A client that the owner revokes while it trains: its open calls end, and its seat is another's. Over loopback."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from hosl.cli import main
from hosl.wire import hosl_pb2 as pb
from tests.integration.network import Server, enrol, finished, join, split, wait_until
from tests.integration.peers import Peer, model_of, refused_as


def _peers(server, halves, service, capsys, /, **training):
    facts = model_of(json.loads((halves / "client" / "half.json").read_text()))
    lines = [server.line, *(enrol(service, name, capsys) for name in ("second", "third"))]
    peers = [Peer(line, facts) for line in lines]
    for peer in peers:
        for name, value in training.items():
            setattr(peer.training, name, value)
    return peers


def test_a_revoked_client_is_refused_at_every_call_and_another_takes_its_seat(halves, tmp_path, capsys):
    service = tmp_path / "service"
    with Server(halves / "server", service, "--plaintext") as server:
        first, second, _ = _peers(server, halves, service, capsys)
        first.greet()
        frames = first.upload("losses")
        named, said = second.refusal("Hello", second.hello())
        assert (named, "is for 1 clients and has first" in said) == ("HandshakeError", True)
        released = []

        def slowly():
            yield frames[0]
            assert main(["clients", "revoke", "first", "--service", str(service)]) == 0
            second.greet()
            released.append(second.call("Step", second.upload("step")))
            yield frames[1]

        assert first.refusal("Losses", slowly())[0] == "AccessError"  # an open one
        assert released
        for call in ("Hello", "Losses", "Step"):
            sent = first.hello() if call == "Hello" else first.upload(call.lower())
            assert refused_as(first, call, sent) == "AccessError"
        assert second.call("Losses", second.upload("losses", step=2))  # and its session is its own
        for peer in (first, second):
            peer.channel.close()


def test_a_client_revoked_while_it_waits_for_its_round_gets_no_answer(halves, tmp_path, capsys):
    service = tmp_path / "service"
    words = ["--plaintext", "--page", "127.0.0.1:0"]
    with Server(halves / "server", service, *words) as server, ThreadPoolExecutor(2) as pool:
        settings = {"clients": 2, "halves": pb.SHARED, "order": pb.SYNCHRONOUS, "grace_s": 600.0}
        first, second, third = _peers(server, halves, service, capsys, **settings)

        def hand_in(peer, step):
            where = pb.Where(session=peer.session, step=step)
            request = pb.JournalRequest(where=where, seeds=[1], scales=[0.1], examples=3)  # of 3 rows
            return [request.SerializeToString()]

        for peer in (first, second):
            peer.greet()
            peer.call("Step", peer.upload("step"))
        waiting = pool.submit(refused_as, first, "Journal", hand_in(first, 1))
        url = f"{server.said[-1].rpartition(' ')[2]}metrics"
        asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {second.line.token}"})
        begun = b'hosl_calls_total{call="Journal"} 1.0'
        wait_until(lambda: begun in urllib.request.urlopen(asked).read())
        assert main(["clients", "revoke", "first", "--service", str(service)]) == 0
        third.greet()
        third.call("Step", third.upload("step"))
        other = pool.submit(second.call, "Journal", hand_in(second, 1))
        third.call("Journal", hand_in(third, 1))
        assert other.result(60)
        assert waiting.result(60) == "AccessError"
        for peer in (first, second, third):
            peer.channel.close()


def test_a_device_enrolled_again_goes_on_with_the_run_of_its_lost_name(tiny_run, tmp_path, capsys):
    """A lost token cannot be shown again: `hosl clients add` says to revoke it and to enrol under a new name."""
    config = tiny_run(max_steps=12, save_steps=2, eval_steps=100)
    halves, service = split(tmp_path / "model-in", tmp_path / "halves"), tmp_path / "service"
    run = tmp_path / "joined"
    with Server(halves / "server", service) as server:
        line = enrol(service, "again", capsys)
        process = join(halves / "client", server.line, config, "--output-dir", run)
        wait_until(lambda: (run / "checkpoints" / "step-00000004").is_dir() or process.poll() is not None)
        assert main(["clients", "revoke", "first", "--service", str(service)]) == 0
        _, said = process.communicate(timeout=120)
        assert (process.returncode, "client first has been revoked" in said) == (2, True), said
        summary = finished(join(halves / "client", line, config, "--output-dir", run))
        assert (summary["finished"], summary["run"]) == (True, str(run))
    steps = [json.loads(text).get("step") for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted({step for step in steps if step}) == list(range(1, 13))
