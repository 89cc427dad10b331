"""Generation in the service: bounded before anything is kept, freed however a call ends, and no run is disturbed."""

import asyncio

import numpy as np
import pytest

from hosl.errors import AccessError, BusyError, HandshakeError, LimitError, LinkError, WireError
from hosl.service.hosted_half import HostedText, NextToken, TextSizes
from hosl.service.incoming import Incoming
from hosl.service.limits import Limits
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import WireArray, pack
from tests.unit.hosted import MODEL, CountingHalf, Service, in_loop, training

WIDTH, TOKEN_BYTES = 4, 10
LIMITS = Limits(cache_bytes=200, cache_total_bytes=300, texts_at_once=2)
# the message of the fixture says that the labels are at the server
ALONE = training(clients=1, halves=pb.PERSONAL, order=pb.SEQUENTIAL)


class Text(HostedText):
    """A text that counts its tokens; its answer is how many updates the half has had."""

    def __init__(self, half):
        self.half, self.tokens = half, 0
        half.texts += 1

    def go_on(self, hidden):
        self.tokens += hidden.data.shape[1]
        return NextToken(tokens=[self.half.updates], logits=[0.5])

    @property
    def size_bytes(self):
        return TOKEN_BYTES * self.tokens

    def close(self):
        self.half.texts -= 1


class TextHalf(CountingHalf):
    """A counting half that goes on with texts; it knows how many there are."""

    texts = 0

    def text_sizes(self):
        return TextSizes(WIDTH, TOKEN_BYTES, positions=50)

    def open_text(self, candidates):
        return Text(self)


def service_of(folder, **how):
    return Service(folder, limits=LIMITS, half=TextHalf(), **how)


def ask(most_tokens=20, **more):
    return pb.GenerateRequest(
        ask=pb.AskGenerate(
            **({"protocol": 1, "model": MODEL, "most_tokens": most_tokens, "candidates": 1} | more)
        )
    )


def hidden(tokens=1, shape=None):
    packed = pack(WireArray(np.ones(shape or (1, tokens, WIDTH), np.float32), "float32"), "none")
    return [pb.GenerateRequest(hidden=packed.header), *(pb.GenerateRequest(chunk=c) for c in packed.chunks())]


class Conversation:
    """A call of one client that stays open: `ask` sends, and gets the next reply."""

    def __init__(self, service, client):
        self.sent = asyncio.Queue()
        self.service, self.context = service, service.status.call(client, "_generate")
        self.context.__enter__()
        incoming = Incoming(self._frames(), idle_s=5.0, check_access=lambda: None)
        self.replies = service.calls._generate(client, incoming)

    async def _frames(self):
        while (message := await self.sent.get()) is not None:
            yield message.SerializeToString()

    async def ask(self, *messages):
        for message in messages:
            self.sent.put_nowait(message)
        return await anext(self.replies)

    async def end(self):
        self.sent.put_nowait(None)
        assert [reply async for reply in self.replies] == []


def left(service):
    """What is left of texts: in the half, the metrics and the room for others."""
    state, caches = service.status.state(), service.calls._texts._caches
    return service.half.texts, state["texts"], state["cache_bytes"], caches._bytes.total(), caches._texts


NOTHING = (0, 0.0, 0.0, 0, 0)


def test_a_text_goes_on_in_the_half_as_it_was_split_and_nothing_is_left_of_it(tmp_path):
    async def work():
        service = service_of(tmp_path)
        text = Conversation(service, "ann")
        ready = (await text.ask(ask())).ready
        assert (ready.run, ready.step) == ("", 0)
        told = (await text.ask(*hidden(7))).next
        assert (list(told.tokens), list(told.logits), told.step) == ([0], [0.5], 0)
        await text.ask(*hidden())
        assert left(service) == (1, 1.0, 80.0, 200, 1)
        assert service.status.state()["clients"]["ann"]["cache_bytes"] == 80
        await text.end()
        assert left(service) == NOTHING
        (end,) = [line for line in service.log if line["event"] == "generated"]
        assert (end["client"], end["tokens"], end["cache_bytes"]) == ("ann", 2, 80)

    in_loop(work())


@pytest.mark.parametrize(
    ("messages", "error", "said"),
    [
        ([ask(21)], LimitError, "asked for 21 tokens of cache, allowed 20"),
        ([ask(0)], WireError, "1 to 50 tokens"),
        ([ask(51)], WireError, "1 to 50 tokens"),
        ([ask(protocol=2)], HandshakeError, "protocol 1"),
        ([ask(model=pb.Model(family="bert", cut=3))], HandshakeError, "cut is 2 on the server and 3"),
        ([ask(run="nobodys")], HandshakeError, "no run is called 'nobodys'"),
        ([*hidden()], WireError, "begins with `ask`"),
        ([ask(), ask()], WireError, "goes on with `hidden`"),
        ([ask(), *hidden(shape=(1, 1, WIDTH + 1))], WireError, r"\[1, tokens, 4\]"),
        ([ask(), *hidden(shape=(2, 1, WIDTH))], WireError, r"\[1, tokens, 4\]"),
        ([ask(), *hidden(21)], WireError, "20 tokens at most, it has 21"),
        ([ask(), *hidden(15), *hidden(6)], WireError, "20 tokens at most, it has 21"),
        ([ask(), hidden(2)[0]], WireError, "ended before"),
    ],
    ids=[
        "limit", "none", "positions", "protocol", "halves", "run", "no-question", "two-questions", "width", "rows",
        "long", "longer", "cut-short",
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_and_nothing_is_left_of_it(tmp_path, messages, error, said):
    async def work():
        service = service_of(tmp_path)
        if "cut" in said:  # a run of the server's own halves is there
            await service.hello("ann", ALONE)
        with pytest.raises(error, match=said):
            await service.call("_generate", "ann", *messages)
        assert left(service) == NOTHING

    in_loop(work())


def test_texts_are_bounded_by_client_and_in_all_and_a_moment_later_there_is_room(tmp_path):
    async def work():
        service = service_of(tmp_path)
        first = Conversation(service, "ann")
        await first.ask(ask(12))
        with pytest.raises(
            BusyError, match="asked for 9 tokens of cache, allowed 8 while other texts of client ann"
        ):
            await service.call("_generate", "ann", ask(9))
        with pytest.raises(BusyError, match="asked for 19 tokens of cache, allowed 18 at the moment"):
            await service.call("_generate", "bob", ask(19))
        second = Conversation(service, "bob")
        await second.ask(ask(1))
        with pytest.raises(BusyError, match="2 of 2 texts are under way"):
            await service.call("_generate", "cid", ask(1))
        await first.end()
        await service.call("_generate", "cid", ask(20))
        await second.end()
        assert left(service) == NOTHING

    in_loop(work())


def test_a_server_can_generate_nothing_at_all(tmp_path):
    async def work():
        service = Service(tmp_path, limits=Limits(texts_at_once=0), half=TextHalf())
        with pytest.raises(LimitError, match="--texts-at-once 0"):
            await service.call("_generate", "ann", ask(1))

    in_loop(work())


def test_nothing_is_left_of_a_text_whose_client_is_gone(tmp_path):
    async def work():
        service = service_of(tmp_path)
        text = Conversation(service, "ann")
        await text.ask(ask())
        await text.ask(*hidden(3))
        waiting = asyncio.ensure_future(anext(text.replies))
        await asyncio.sleep(0)
        assert left(service) == (1, 1.0, 30.0, 200, 1)
        waiting.cancel()  # as gRPC does with the call of a client that is gone
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert left(service) == NOTHING

    in_loop(work())


def test_nothing_is_left_of_a_text_whose_client_says_nothing(tmp_path):
    async def work():
        service = service_of(tmp_path)
        text = Conversation(service, "ann")
        text.replies = service.calls._generate(
            "ann", Incoming(text._frames(), idle_s=0.1, check_access=lambda: None)
        )
        await text.ask(ask())
        with pytest.raises(LinkError, match=r"nothing arrived for 0\.1 s"):
            await anext(text.replies)
        assert left(service) == NOTHING

    in_loop(work())


def test_a_run_that_trains_goes_on_between_the_tokens_of_a_text(tmp_path):
    async def work():
        service = service_of(tmp_path)
        session = (await service.hello("ann", ALONE)).session
        await service.step("ann", session, 1)
        text = Conversation(service, "ann")
        ready = (await text.ask(ask(run="run"))).ready
        assert (ready.run, ready.step) == ("run", 1)
        answers = []
        for step in (2, 3):
            told = (await text.ask(*hidden())).next
            answers.append((told.step, list(told.tokens)))
            assert await service.step("ann", session, step) == step
        assert answers == [(1, [1]), (2, [2])]  # each token by the weights as they are
        await text.end()
        assert await service.save("ann", session, 3) == 3

    in_loop(work())


def with_a_half_for_each_run(service):
    service.sessions._open_half = lambda model, training: TextHalf()
    return service


def test_the_newest_run_of_a_client_is_used_and_opened_from_its_checkpoint(tmp_path):
    async def work():
        service = with_a_half_for_each_run(service_of(tmp_path))
        for name, steps in (("first", 1), ("second", 2)):
            session = (await service.hello("ann", ALONE, run=name)).session
            for step in range(1, steps + 1):
                await service.step("ann", session, step)
            await service.save("ann", session, steps)
            await service.leave("ann", session)
        await service.hello("bob", ALONE, run="of-bob")
        again = with_a_half_for_each_run(service_of(tmp_path))  # another process, with nothing in memory
        for wanted, run, step in (({}, "second", 2), ({"run": "first"}, "first", 1), ({"base": True}, "", 0)):
            ready, told = await again.call("_generate", "ann", ask(**wanted), *hidden())
            assert (ready.ready.run, ready.ready.step) == (run, step)
            assert list(told.next.tokens) == [step]
        with pytest.raises(AccessError, match="ann takes no part in run of-bob"):
            await again.call("_generate", "ann", ask(run="of-bob"))
        assert (await again.hello("ann", ALONE, run="second", restorable=[0, 2], current=0)).start == 2

    in_loop(work())


def test_a_half_makes_no_room_for_another_run_while_a_text_goes_on_in_it(tmp_path):
    async def work():
        service = service_of(tmp_path)
        text = Conversation(service, "ann")
        await text.ask(ask())
        with pytest.raises(LimitError, match="has room for 1 run and is busy with"):
            await service.hello("bob", ALONE)
        await text.end()
        assert (await service.hello("bob", ALONE)).start == 0
        # and no text for a run that trains
        with pytest.raises(LimitError, match="has room for 1 run and is busy with"):
            await service.call("_generate", "ann", ask())

    in_loop(work())
