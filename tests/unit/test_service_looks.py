"""Sessions that only look at a run: they ask for scores of its present state, and change nothing of it."""

import numpy as np
import pytest

from hosl.errors import AccessError, HandshakeError, SessionError, StepError, WireError
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import WireArray, pack
from tests.unit.hosted import ACTIVATIONS, MODEL, CountingHalf, Service, in_loop, training

ALONE = training(clients=1, order=pb.SEQUENTIAL, halves=pb.PERSONAL)


@pytest.fixture
def service(tmp_path, monkeypatch):
    monkeypatch.setattr(
        CountingHalf, "scores", lambda half, h, targets: np.full((len(h.data), 1), half.updates, np.float32)
    )
    return Service(tmp_path)


async def look(service, client, run="run", **more):
    """Begin a session that looks; returns the reply."""
    request = pb.HelloRequest(protocol=1, run=run, model=MODEL, look=True, **more)
    (reply,) = await service.call("_hello", client, request)
    return reply


async def scores(service, client, session, step):
    packed = pack(WireArray(ACTIVATIONS, "float32"), "none")
    rows, seq, _ = ACTIVATIONS.shape
    targets = pb.Targets(
        mask=pb.Mask(rows=rows, seq=seq, bits=b"\xff"), classes=pb.Classes(labels=[0] * rows)
    )
    ask = pb.AskScores(where=pb.Where(session=session, step=step), activations=packed.header, targets=targets)
    chunks = (pb.Upload(chunk=chunk) for chunk in packed.chunks())
    (reply,) = await service.call("_scores", client, pb.Upload(scores=ask), *chunks)
    return np.frombuffer(reply.values, "<f4").tolist()


async def trained(service, steps=3):
    """The session of a client that has trained."""
    session = (await service.hello("a", ALONE)).session
    for step in range(1, steps + 1):
        await service.step("a", session, step)
    return session


def test_who_looks_gets_the_scores_of_the_present_state_and_the_training_goes_on(service):
    async def run():
        training_session = await trained(service)
        looking = await look(service, "a")
        assert looking.start == 3
        assert await scores(service, "a", looking.session, 3) == [3.0, 3.0]
        assert await service.step("a", training_session, 4) == 4.0  # its session and step are as they were
        with pytest.raises(StepError, match="has gone on from step 3 to 4 while it is used; wait until its"):
            await scores(service, "a", looking.session, 3)
        again = (await service.hello("a", ALONE, current=4)).session  # a Hello of the one who trains
        assert (await look(service, "a")).start == 4
        assert await service.step("a", again, 5) == 5.0

    in_loop(run())


def test_who_looks_can_change_nothing(service):
    async def run():
        await trained(service)
        session = (await look(service, "a")).session
        with pytest.raises(WireError, match="only looks at its run: it may ask for scores and states"):
            await service.step("a", session, 4)
        for work in (service.save("a", session, 3), service.hand_in("a", session, 4)):
            with pytest.raises(WireError, match="only looks"):
                await work
        assert service.half.updates == 3
        await service.leave("a", session)
        with pytest.raises(SessionError):
            await scores(service, "a", session, 3)

    in_loop(run())


def test_a_half_as_it_was_split_is_looked_at_without_a_run(service, tmp_path):
    async def run():
        looking = await look(service, "a", run="")
        assert looking.start == 0
        assert await scores(service, "a", looking.session, 0) == [0.0, 0.0]
        assert not [*tmp_path.glob("runs/*")]

    in_loop(run())


def test_only_a_client_that_trains_a_run_may_look_at_it_and_with_its_own_half(service):
    async def run():
        await trained(service)
        with pytest.raises(AccessError, match="client b takes no part in run run, which is of a"):
            await look(service, "b")
        with pytest.raises(HandshakeError, match="no run is called 'gone' here"):
            await look(service, "a", run="gone")
        other = pb.Model(family="bert", cut=1)
        with pytest.raises(HandshakeError, match="cut is 2 on the server and 1 on the client"):
            await service.call("_hello", "a", pb.HelloRequest(protocol=1, run="run", model=other, look=True))

    in_loop(run())
