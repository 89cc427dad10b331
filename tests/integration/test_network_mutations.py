"""Messages that went wrong on their way, or were made to: refused by name, by a server that stays as it is."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import WireArray, pack
from tests.integration.network import Server, enrol
from tests.integration.peers import WIDTH, Peer, model_of, refused_as


def mutated(chance, frames):
    """One of the ways in which a message can go wrong."""
    frames = list(frames)
    place = chance.randrange(len(frames))
    data = bytearray(frames[place])
    match chance.randrange(8):
        case 0:
            for _ in range(chance.randrange(1, 5)):
                if data:
                    data[chance.randrange(len(data))] = chance.randrange(256)
        case 1:
            data = data[: chance.randrange(len(data) + 1)]
        case 2:
            data += chance.randbytes(chance.randrange(1, 50))
        case 3:
            data = bytearray(chance.randbytes(chance.randrange(100)))
        case 4:
            frames.insert(place, frames[chance.randrange(len(frames))])
        case 5:
            del frames[place]
            return frames
        case 6:
            chance.shuffle(frames)
            return frames
        case _:
            start = chance.randrange(len(data) + 1)
            del data[start : start + chance.randrange(1, 20)]
    frames[place] = bytes(data)
    return frames


def _resident_mib(process):
    with open(f"/proc/{process.pid}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def text_of(model):
    """A valid text of a prompt and two tokens, as messages in bytes."""
    ask = pb.AskGenerate(protocol=1, model=model, most_tokens=9, candidates=2, base=True)
    frames = [pb.GenerateRequest(ask=ask)]
    for tokens in (5, 1, 1):
        packed = pack(WireArray(np.full((1, tokens, WIDTH), 0.1, np.float32), "float32"), "none")
        frames.append(pb.GenerateRequest(hidden=packed.header))
        frames += [pb.GenerateRequest(chunk=chunk) for chunk in packed.chunks()]
    return [frame.SerializeToString() for frame in frames]


def _valid(peer):
    """One valid question of every call, in the peer's present session."""
    where = pb.Where(session=peer.session, step=1)
    return {
        "Hello": peer.hello(), "Losses": peer.upload("losses", count=2), "Scores": peer.upload("scores", step=0),
        "Gradient": peer.upload("gradient"), "Step": peer.upload("step"),
        "Probe": peer.upload("probe", count=2, seed=1, epsilon=1e-3),
        "Descend": [pb.DescendRequest(where=where, seeds=[1], coefficients=[0.1]).SerializeToString()],
        "Journal": [pb.JournalRequest(where=where, seeds=[1], scales=[0.1], examples=3).SerializeToString()],
        "Save": [pb.SaveRequest(where=where).SerializeToString()],
        "States": peer.upload("losses"), "StepStates": peer.upload("step"), "Generate": text_of(peer.model),
    }  # fmt: skip


def _attack(peers, messages, seed):
    """Send mutated messages of every call, each peer in its own thread; how many were refused, by error."""

    def attack(peer):
        chance, found = random.Random(f"{seed}/{peer.run}"), {}
        valid = None
        for _ in range(messages // len(peers)):
            if valid is None:
                peer.greet()
                valid = _valid(peer)
            call = chance.choice(list(valid))
            named = refused_as(peer, call, mutated(chance, valid[call]))
            assert named != "FailureError", f"{call} met a bug of ours; the server's log has its trace"
            found[named] = found.get(named, 0) + 1
            if (
                named is None or named == "SessionError"
            ):  # what went through may have moved the session or the step
                valid = None
        return found

    with ThreadPoolExecutor(len(peers)) as pool:
        totals = {}
        for found in pool.map(attack, peers):
            for name, count in found.items():
                totals[name] = totals.get(name, 0) + count
    return totals


@pytest.mark.parametrize("messages", [600, pytest.param(20_001, marks=pytest.mark.slow)])
def test_mutated_messages_neither_crash_nor_hang_nor_swell_the_server(halves, tmp_path, capsys, messages):
    service = tmp_path / "service"
    words = ["--plaintext", "--calls-per-s", "100000", "--idle", "3", "--runs-at-once", "4"]
    facts = model_of(json.loads((halves / "client" / "half.json").read_text()))
    with Server(halves / "server", service, *words) as server:
        lines = [server.line, *(enrol(service, name, capsys) for name in ("second", "third"))]
        peers = [Peer(line, facts, run=f"by-hand-{place}") for place, line in enumerate(lines)]
        _attack(peers, messages // 2, "warm-up")
        before_mib = _resident_mib(server.process)
        refused = _attack(peers, messages, "attack")
        grown_mib = _resident_mib(server.process) - before_mib
        print(f"{messages} mutated messages: refused {refused}; memory grew by {grown_mib:.1f} MiB")
        assert messages - refused.pop(None, 0) > messages / 2
        assert grown_mib < 16
        peers[0].greet()
        assert peers[0].call("Losses", peers[0].upload("losses"))
        for peer in peers:
            peer.channel.close()
