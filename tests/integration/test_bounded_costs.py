"""A small question cannot have a large cost: every number is bounded before anything is made by it."""

import asyncio
import json
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from hosl.cli import main
from hosl.service.calls import Calls
from hosl.service.limits import Limits
from hosl.service.scheduler import Scheduler
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import WireArray
from tests.conftest import build
from tests.integration.network import Server
from tests.integration.peers import Peer, model_of

WORDS = [
    "--plaintext",
    "--calls-per-s",
    "100000",
    "--idle",
    "2",
    "--tensor-limit",
    "1",
    "--runs-at-once",
    "99",
]


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """The halves of a tiny language model."""
    folder = tmp_path_factory.mktemp("causal")
    build("opt").save_pretrained(folder / "model")
    words = ["split", str(folder / "model"), str(folder / "halves"), "--cut", "2", "--head", "causal"]
    words += ["--labels-at", "server"]
    assert main(words) == 0
    return folder / "halves"


@pytest.fixture(scope="module")
def server(causal, tmp_path_factory):
    with Server(causal / "server", tmp_path_factory.mktemp("bounded") / "service", *WORDS) as server:
        yield server


@pytest.fixture
def peer(server, causal):
    made = Peer(server.line, model_of(json.loads((causal / "client" / "half.json").read_text())))
    yield made
    made.channel.close()


def _peak_mib(process):
    with open(f"/proc/{process.pid}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("lora.r", 8_000_000),
        ("lora.alpha", 2**32 - 1),
        ("learning_rate", math.inf),
        ("learning_rate", math.nan),
        ("grace_s", math.inf),
        ("grace_s", -1.0),
        ("max_steps", 2**32 - 1),
        ("clients", 2**32 - 1),
        ("optimiser.weight_decay", math.inf),
        ("optimiser.momentum", math.nan),
    ],
)
def test_a_number_that_no_run_has_is_refused_before_weights_are_made_by_it(server, peer, path, value):
    """279 bytes with a rank of 8,000,000 took 7 GiB."""
    training = pb.Training()
    training.CopyFrom(peer.training)
    training.trainable = pb.LORA
    *parents, name = path.split(".")
    setattr(getattr(training, parents[0]) if parents else training, name, value)
    before_mib = _peak_mib(server.process)
    named, details = peer.refusal("Hello", peer.hello(run=f"number-{path}", training=training))
    assert (named, path in details) == ("HandshakeError", True), details
    assert _peak_mib(server.process) - before_mib < 64


def test_lists_of_a_hello_have_a_length(peer):
    names = pb.Training()
    names.CopyFrom(peer.training)
    names.lora.target_modules.extend(["q_proj"] * 1000)
    named, details = peer.refusal("Hello", peer.hello(run="names", training=names))
    assert (named, "lora.target_modules" in details) == ("HandshakeError", True)
    many = pb.HelloRequest.FromString(peer.hello(run="many")[0])
    many.restorable.extend(range(100_000))
    named, details = peer.refusal("Hello", [many.SerializeToString()])
    assert (named, "100001 checkpoints" in details) == ("WireError", True), details


def test_options_at_all_positions_are_refused_before_their_logits_are_computed(peer):
    """Half a MiB of activations; logits of 220 x 64 positions x 97 tokens in float32 are 5.2 MiB, the limit is 4."""
    peer.greet(run="logits")
    rows, seq, width = 220, 64, 32
    targets = pb.Targets(
        mask=pb.Mask(rows=rows, seq=seq, bits=b"\xff" * (rows * seq // 8)),
        options=pb.Options(span=seq, positions=[*range(seq)] * rows, tokens=[1] * (rows * seq)),
    )
    ask = pb.AskLosses(
        where=pb.Where(session=peer.session, step=1), targets=targets,
        activations=[pb.Tensor(shape=[rows, seq, width], dtype=pb.BFLOAT16)],
    )  # fmt: skip
    named, details = peer.refusal("Losses", [pb.Upload(losses=ask).SerializeToString()])
    assert named == "LimitError"
    assert f"take {rows * seq * 97 * 4} bytes; the limit is {4 << 20}" in details


def test_a_tensor_that_drips_in_is_dropped(peer):
    """A byte each 0.3 s is never idle for 2 s; 1,920 bytes would take ten minutes."""
    peer.greet(run="drip")
    targets = pb.Targets(
        mask=pb.Mask(rows=3, seq=5, bits=b"\xff\x7f"),
        options=pb.Options(span=1, positions=[0] * 3, tokens=[1] * 3),
    )
    first, *_ = peer.upload("losses", targets=targets)
    sent = []

    def drip():
        yield first
        for _ in range(100):
            yield pb.Upload(chunk=b"\0").SerializeToString()
            sent.append(1)
            time.sleep(0.3)

    named, details = peer.refusal("Losses", drip(), timeout=60)
    assert (named, "a tensor came too slowly" in details) == ("LinkError", True), details
    assert len(sent) < 100


@pytest.mark.parametrize("call", ["Descend", "Journal"])
def test_an_update_of_forty_thousand_directions_is_refused(peer, call):
    peer.greet(run="directions")
    where, seeds, numbers = pb.Where(session=peer.session, step=1), [1] * 40_000, [0.1] * 40_000
    message = (
        pb.DescendRequest(where=where, seeds=seeds, coefficients=numbers)
        if call == "Descend"
        else pb.JournalRequest(where=where, seeds=seeds, scales=numbers, examples=1)
    )
    named, details = peer.refusal(call, [message.SerializeToString()])
    assert (named, "at most 4096 directions" in details) == ("LimitError", True)


@pytest.mark.usefixtures("unchecked")
def test_empty_calls_cost_their_turn():
    """One client queues 40 calls that carry nothing, another then two of 64 tokens: the second is not behind all 40."""
    served, gate = [], threading.Event()

    async def run():
        scheduler = Scheduler()
        status = SimpleNamespace(computed=lambda tokens: None)
        calls = Calls(None, None, scheduler, status, Limits(), idle_s=1.0)
        holding = asyncio.create_task(scheduler.run("first", 0, gate.wait))
        await asyncio.sleep(0.05)
        array = WireArray(np.zeros((8, 8, 2), np.float32), "float32")
        asked = [("empty", [])] * 40 + [("honest", [array])] * 2
        waiting = [
            asyncio.create_task(
                calls._compute(
                    SimpleNamespace(client=client), arrays, lambda client=client: served.append(client)
                )
            )
            for client, arrays in asked
        ]
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.gather(holding, *waiting)
        scheduler.close()

    asyncio.run(run())
    assert served[:4] == ["empty", "honest", "empty", "honest"]
